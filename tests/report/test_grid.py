from alignjax.report import findings, front, grid, ink
from tests.report import synthetic


def point(series, reward, kl, half=0.02, **numbers):
  name = f'{series} {grid.label(numbers)}'
  made = synthetic.model(name, grid.MERGED, reward, kl, half=half)
  return made | {'series': series, 'numbers': numbers}


def evaluation(*points):
  init = synthetic.model('init', 'init', 0.45, 0.0)
  run = synthetic.model('run', 'run', 0.6, 5.0)
  return {'models': [init, run, *points], 'reference': 'init'}


def test_labels():
  assert grid.label({'t': 0.3}) == 't 0.3'
  assert grid.label({'density': 0.25, 'scale': 1}) == 'density 0.25, scale 1'
  assert grid.label({'weights': [1, 2.5]}) == 'weights 1:2.5'
  assert grid.label({}) == ''


def test_the_front_is_what_none_beats():
  places = [(0.5, 1.0), (0.5, 1.2), (0.4, 0.9), (0.6, 3), (0.6, 3), (0.59, 3)]
  models = [
    synthetic.model(str(i), 'run', *place) for i, place in enumerate(places)
  ]
  # Those that coincide do not beat each other.
  assert grid.pareto(models) == {'0', '2', '3', '4'}


def test_a_path_joins_the_values_of_the_only_number_that_varies():
  data = evaluation(
    *(point('a', 0.5, t, t=t, seed=1) for t in (0.7, 0.1, 0.4)),
    *(point('b', 0.5, t, t=t, scale=s) for t in (1, 2) for s in (1, 2)),
    point('c', 0.5, 2.0),
  )
  names = [f'a t {t}, seed 1' for t in (0.1, 0.4, 0.7)]
  assert grid.paths(data) == [names]


def test_every_method_has_a_look_and_its_points_have_their_numbers():
  data = evaluation(
    *(point('slerp', 0.5 + t, 1 + t, t=t) for t in (0.1, 0.2)),
    *(point('ties', 0.7, 2 + 3 * d, density=d) for d in (0.3, 0.6)),
  )
  looks = ink.looks(data['models'])
  assert len({looks[m['name']].fill for m in data['models'][1:]}) == 3
  drawn = front.front_svg(data)
  for text in ('slerp', 'ties', 't 0.1', 't 0.2', 'density 0.3', 'density 0.6'):
    assert drawn.count(f'>{text}<') == 1
  # A path is one more line: of one point there is none.
  lone = evaluation(data['models'][2])
  assert '>slerp t 0.1<' in front.front_svg(lone)


def test_findings_say_what_is_measurable():
  high = point('slerp', 0.8, 4.0, t=0.5)
  near = point('linear', 0.79, 4.1, t=0.5)
  low = point('ties', 0.6, 4.3, density=0.5)
  small = point('linear', 0.5, 1.0, t=0.1)
  gain, pareto, best = findings.evaluated(evaluation(high, near, low, small))
  assert gain.startswith('Alignment raises the reward: run')
  assert pareto.startswith('2 of 4 merged models are on the Pareto front')
  assert 'the reward rises measurably 1 of 1 times' in pareto
  assert (
    '1 are measurably beaten by a model that is behind in neither' in pareto
  )
  assert pareto.endswith(': ties density 0.5.')
  assert best.startswith(
    'The best merged model by reward is slerp t 0.5: 0.800'
  )
  assert best.count('no measurable difference') == 1  # near
  assert best.count('higher)') == 2  # ties, run

  # The same with wide intervals: nothing is separated any more.
  wide = [
    m | {'reward': synthetic.bar(m['reward']['mean'], 0.5)}
    for m in (high, near, low | {'kl': synthetic.bar(4.1, 1.0)}, small)
  ]
  _, pareto, best = findings.evaluated(evaluation(*wide))
  assert 'rises measurably 0 of 1 times' in pareto
  assert 'No measurable difference keeps the other 2 off it.' in pareto
  assert best.count('no measurable difference') == 3
