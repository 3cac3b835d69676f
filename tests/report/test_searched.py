from alignjax.report.searched import searched_html


def search(objectives):
  held = {'mean': -0.01, 'low': -0.2, 'high': 0.18}
  gain = {'searched': 0.125, 'held_out': held, 'verdict': 'not < to be told'}
  return {
    'kl_coef': 0.1,
    'objectives': objectives,
    'searched': {'a-b': 0.25, 'best': 0.375},
    'gains': {'a-b': gain},
  }


def test_trials_and_gains():
  page = searched_html({'search': search([0.1, None, 0.375, 0.2])}, 'salt')
  assert page.count('<svg') == 1 and 'best so far' in page
  for text in (
    '<td>a-b</td><td>+0.1250</td>',
    '−0.0100<small>[−0.2000, +0.1800]</small>',
    'not &lt; to be told',
    '1 trial(s) could not be used',
  ):
    assert text in page, text
  again = searched_html({'search': search([0.1, None, 0.375, 0.2])}, 'salt')
  assert again == page


def test_nothing_was_searched():
  assert searched_html({}, 'salt') == ''
  assert searched_html({'search': search([None])}, 'salt') == ''
