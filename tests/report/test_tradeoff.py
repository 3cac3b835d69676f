"""Two rewards against each other: areas, steering, and the page's part."""

import pytest

from alignjax.report import ink, tradeoff


def evaluation(points):
  def around(mean):
    return {'mean': mean, 'low': mean - 0.1, 'high': mean + 0.1}

  return {
    'objectives': ['<code>', 'short'],
    'models': [{'name': 'init', 'kind': 'init'}]
    + [
      {
        'name': f'{policy} {weight:g}',
        'kind': policy,
        'weights': [weight, 1 - weight],
        'scores': {'<code>': around(x), 'short': around(y)},
      }
      for policy, weight, x, y in points
    ],
  }


STEERED = [('CLP', 0.0, 0, 1), ('CLP', 0.5, 0.8, 0.8), ('CLP', 1.0, 1, 0)]
SOUP = [('soup', 0.0, 0, 1), ('soup', 0.5, 0.2, 0.2), ('soup', 1.0, 1, 0)]


@pytest.mark.parametrize(
  'points, area',
  [
    ([(1, 1)], 1.0),
    ([(1, 0.5), (0.5, 1)], 0.75),
    ([(1, 0.5), (0.5, 1), (0.4, 0.4), (0.5, 1)], 0.75),
    ([(0.8, 0.8), (-1, 3), (3, -1)], 0.64),
    ([], 0.0),
  ],
)
def test_hypervolume(points, area):
  assert tradeoff.hypervolume(points, (0, 0)) == pytest.approx(area)
  moved = [(x + 2, y - 3) for x, y in points]
  assert tradeoff.hypervolume(moved, (2, -3)) == pytest.approx(area)


def test_steerability():
  found = tradeoff.lines(evaluation(STEERED[::-1] + SOUP))
  assert [p[0] for p in found['CLP'].points] == [0.0, 0.5, 1.0]
  assert tradeoff.steerability(found['CLP'].points) == 1
  flipped = [(1 - w, x, y) for w, x, y in found['CLP'].points][::-1]
  assert tradeoff.steerability(flipped) == 0
  same = [(w, (1, 1, 1), (1, 1, 1)) for w in (0.0, 0.5, 1.0)]
  assert tradeoff.steerability(same) == 0.5


def test_page_part():
  page = tradeoff.tradeoff_html(evaluation(STEERED + SOUP), 'salt')
  assert '<svg' in page and '&lt;code&gt;' in page and 'mean <code>' not in page
  assert '<td>CLP</td><td>1</td><td>0.64</td><td>1</td>' in page
  assert '<td>soup</td><td>1</td><td>0.04</td>' in page
  assert tradeoff.tradeoff_html({'models': [], 'objectives': []}, 'salt') == ''


def runs(policy, shifts):
  """The policy of STEERED under several seeds, each a bit better or worse."""
  models = []
  for i, shift in enumerate(shifts):
    names = ((f'{policy}_{i}', w, x + shift, y) for _, w, x, y in STEERED)
    models += [m | {'kind': policy} for m in evaluation(names)['models'][1:]]
  return models


def test_findings_rest_on_the_runs_of_a_policy():
  data = evaluation([])
  data['models'] += runs('CLP', (0.2, 0.3)) + runs('soup', (0.0, 0.1))
  areas, steered = tradeoff.tradeoff_lines(data)
  assert areas == (
    'Hypervolume: CLP 0.89 ± 0.071, soup 0.69 ± 0.071; every run of CLP is '
    'above every run of soup.'
  )
  assert steered.endswith('CLP 1 ± 0, soup 1 ± 0.')
  data['models'] += runs('told', (0.1, 0.4))
  areas, _ = tradeoff.tradeoff_lines(data)
  assert areas.endswith('every run of CLP is above every run of soup.')
  data['models'] = evaluation([])['models'] + runs('CLP', (0.2, 0.3))
  data['models'] += runs('soup', (0.25, 0.1))
  assert 'no other policy has all' in tradeoff.tradeoff_lines(data)[0]
  one = tradeoff.tradeoff_lines(evaluation(STEERED + SOUP))
  assert one[0].endswith('one run each tells no difference.')
  assert tradeoff.tradeoff_lines({'models': [], 'objectives': []}) == []


def test_seeds_are_drawn_as_their_mean():
  data = evaluation([])
  data['models'] += runs('CLP', (0.2, 0.3)) + runs('soup', (0.0, 0.1))
  with ink.style('test'):
    (axes,) = tradeoff.draw(data).axes
  drawn = {line.get_label(): line for line in axes.containers}
  assert list(drawn) == ['CLP', 'soup']
  assert list(drawn['CLP'][0].get_xdata()) == pytest.approx([0.25, 1.05, 1.25])
