import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Annotation

from alignjax.report import front, ink, points
from alignjax.report.fronts import DIVERSITY, diversity_html
from alignjax.report.labels import overlap
from tests.report import synthetic


def labels(evaluation, dpi=72):
  """text -> extent in pixels, as drawn."""
  with ink.style('test'):
    figure = front.draw(evaluation)
    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return {
      a.get_text(): a.get_window_extent(canvas.get_renderer()).extents
      for a in figure.axes[0].texts
      if isinstance(a, Annotation) and a.get_text()
    }


@pytest.mark.parametrize('dpi', [72, 90])
def test_no_label_overlaps_another(dpi):
  got = labels(synthetic.evaluation(), dpi)
  assert {'align_1', 'align_2_anchor', 'lerp', '0.4', 'N=8'} <= set(got)
  names = sorted(got)
  for i, a in enumerate(names):
    for b in names[:i]:
      assert overlap(got[a], got[b]) == 0, (a, b)


def test_models_that_coincide_share_a_label():
  got = labels(synthetic.evaluation())
  assert 'slerp · rate 1' in got and 'init · rate 0' in got
  assert 'slerp' not in got and '1' not in got


def test_the_sweep_ends_at_init_and_slerp():
  evaluation = synthetic.evaluation()
  inner = ('liti_0', 'liti_1')
  evaluation['models'] = [
    m for m in evaluation['models'] if m['name'] not in inner
  ]
  path = points.sweep(evaluation)
  assert [p.rate for p in path] == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
  assert (path[0].name, path[-1].name) == ('init', 'slerp')
  evaluation['models'] = evaluation['models'][:3]
  assert points.sweep(evaluation) == []


def rounds():
  """Two LITI paths from one init, each towards its own SLERP."""
  models = [synthetic.model('init', 'init', 0.45, 0.0)]
  for i in (1, 2):
    mine = [
      synthetic.model(f'{i}, {r:g}', 'liti', 0.45 + 0.1 * i * r, 4 * r, r)
      for r in (0.3, 0.6)
    ]
    mine.append(synthetic.model(f'round {i}', 'slerp', 0.45 + 0.1 * i, 4.0 + i))
    models += [m | {'series': f'round {i}'} for m in mine]
  return {'models': models, 'reference': 'init'}


def test_every_round_has_a_path_of_its_own():
  paths = points.sweeps(rounds())
  assert list(paths) == ['round 1', 'round 2']
  for name, path in paths.items():
    assert [p.rate for p in path] == [0.0, 0.3, 0.6, 1.0]
    assert (path[0].name, path[-1].name) == ('init', name)
  assert points.sweep(rounds()) == paths['round 2']
  drawn = front.front_svg(rounds())
  assert drawn.count('>LITI, round 1<') == 1
  assert drawn.count('>LITI, round 2<') == 1
  assert ink.paler(ink.LOOKS['liti'].fill, 1) in drawn
  # Rates are written once, along the last path; the merges have names.
  got = labels(rounds())
  assert {'0.3', '0.6', 'round 1', 'round 2', 'init'} == set(got)


def many_arms(count, seeds=2):
  """An init and runs of several arms under several seeds."""
  models = [synthetic.model('init', 'init', 0.45, 0.0)]
  for i in reversed(range(count)):
    arm = f'arm_{i}'
    models += [
      synthetic.model(f'{arm}_{s}', 'run', 0.5 + 0.02 * i, 1 + i + 0.1 * s)
      | {'series': arm}
      for s in range(seeds)
    ]
  return {'models': models, 'reference': 'init'}


def test_every_arm_has_a_look_of_its_own():
  evaluation = many_arms(12)
  looks = ink.looks(evaluation['models'])
  seen = {}
  for model in evaluation['models'][1:]:
    seen.setdefault(model['series'], set()).add(looks[model['name']])
  assert all(len(of) == 1 for of in seen.values())
  styles = {(look.fill, look.marker) for of in seen.values() for look in of}
  assert len(styles) == 12
  others = [ink.LOOKS[k] for k in ('init', 'anchor', 'lerp', 'slerp', 'liti')]
  assert not styles & {(look.fill, look.marker) for look in others}
  # The legend names them, in their order; and the chart each arm once.
  drawn = front.front_svg(evaluation)
  places = [drawn.index(f'>arm_{i}<') for i in reversed(range(12))]
  assert places == sorted(places) and '>aligned run<' not in drawn
  assert set(labels(evaluation)) == {'init', *(f'arm_{i}' for i in range(12))}
  assert set(labels(many_arms(12, seeds=1))) > {'init', 'arm_0_0', 'arm_11_0'}


def test_kinds_without_a_look_differ_too():
  kinds = ('run', 'CLP full', 'CLP logits', 'soup')
  evaluation = {
    'models': [
      synthetic.model(f'{kind} {i}', kind, 0.5, i)
      for kind in kinds
      for i in range(2)
    ]
  }
  looks = ink.looks(evaluation['models'])
  assert looks['run 0'] == ink.LOOKS['run']
  assert len({(look.fill, look.marker) for look in looks.values()}) == 4
  assert [p.arm for p in points.points(evaluation)[::2]] == ['', *kinds[1:]]


def varied():
  evaluation = synthetic.evaluation()
  for i, model in enumerate(evaluation['models'][:4]):
    model['diversity'] = synthetic.bar(0.1 + 0.05 * i, 0.01)
  return evaluation


def test_diversity_is_drawn_where_it_was_measured():
  assert diversity_html(synthetic.evaluation(), 'salt') == ''
  one = varied()
  del one['models'][1]['diversity'], one['models'][2]['diversity']
  del one['models'][3]['diversity']
  assert diversity_html(one, 'salt') == ''
  page = diversity_html(varied(), 'salt')
  assert page.count('<svg') == 2 and page == diversity_html(varied(), 'salt')
  assert 'Diversity of the completions of a prompt against KL' in page
  assert 'Mean reward against diversity' in page
  assert page.count('>align_2<') == 2 and '>slerp<' not in page
  assert 'best of N' not in page  # it has no such number
  fields = DIVERSITY[1][0]
  found = {p.name: (p.x[0], p.y[0]) for p in points.points(varied(), fields)}
  assert found['align_1'] == (pytest.approx(0.15), 0.698)


def test_a_front_of_one_model_can_be_drawn():
  evaluation = {'models': synthetic.evaluation()['models'][:1]}
  assert 'init' in front.front_svg(evaluation)


def test_svg_is_stable_text_without_anything_remote():
  one = front.front_svg(synthetic.evaluation())
  assert one == front.front_svg(synthetic.evaluation())
  assert 'http' not in one and '<metadata' not in one and '<?xml' not in one
  assert '>align_1<' in one  # text, not paths
  other = front.front_svg(synthetic.evaluation(), 'another chart')
  ids = [set(part.split('id="')[1:]) for part in (one, other)]
  shared = {i.split('"')[0] for i in ids[0]} & {i.split('"')[0] for i in ids[1]}
  assert not shared
