import math

import numpy as np
import pytest

from alignjax.report import arms, findings, fronts, grid, ink, points
from alignjax.report.front import front_svg
from alignjax.report.page import report
from alignjax.report.tables import models_html
from tests.report import synthetic

REWARDS = {  # of three seeds
  ('exp', 0.1): (0.70, 0.72, 0.71),
  ('exp', 0.5): (0.60, 0.61, 0.59),
  ('identity', 0.1): (0.50, 0.52, 0.48),
}


def evaluation(half=0.01, seeds=3):
  """An init and, of two series, three arms that differ in a number."""
  models = [synthetic.model('init', 'init', 0.4, 0.0)]
  for (series, kl_coef), rewards in REWARDS.items():
    for seed, reward in enumerate(rewards[:seeds]):
      name = f'{series}_{kl_coef:g}_{seed}'
      made = synthetic.model(name, 'run', reward, 0.5 / kl_coef, half=half)
      made['best_of_4'] = synthetic.bar(reward, half)
      models.append(made | {'series': series, 'numbers': {'kl_coef': kl_coef}})
  return {'format': 1, 'models': models, 'reference': 'init'}


def test_the_interval_joins_seeds_and_prompts():
  # Without noise of prompts it is Student's, 4.3027 at two degrees of freedom.
  exact = arms.over_seeds([(x, x, x) for x in (1.0, 2.0, 3.0)])
  half = 4.302652729911275 / math.sqrt(3)
  assert exact == pytest.approx((2.0, 2 - half, 2 + half))
  # Without noise of seeds it is that of the prompts, which they share.
  assert arms.over_seeds([(1, 0.9, 1.3)] * 3) == pytest.approx((1, 0.9, 1.3))
  both = arms.over_seeds([(x, x - 3, x + 4) for x in (1.0, 2.0, 3.0)])
  want = 2.0, 2 - math.hypot(half, 3), 2 + math.hypot(half, 4)
  assert both == pytest.approx(want)


def test_the_interval_covers_the_mean_as_often_as_it_says():
  rng = np.random.default_rng(0)
  prompts, hits, trials = 40, 0, 2000
  for _ in range(trials):
    shared = rng.normal(0, 0.5, prompts)  # how hard each prompt is
    runs = rng.normal(0, 0.1, (3, 1)) + shared
    half = 1.96 * shared.std(ddof=1) / math.sqrt(prompts)
    means = runs.mean(1)
    _, low, high = arms.over_seeds([(m, m - half, m + half) for m in means])
    hits += low <= 0 <= high
  assert hits / trials > 0.95


def test_models_that_differ_in_names_only_are_one_arm():
  pooled = arms.pooled(evaluation())
  names = [m['name'] for m in pooled['models']]
  assert names == [
    'init',
    'exp kl_coef 0.1',
    'exp kl_coef 0.5',
    'identity',
  ]
  arm = pooled['models'][1]
  assert arm['seeds'] == ['exp_0.1_0', 'exp_0.1_1', 'exp_0.1_2']
  assert arm['reward']['mean'] == pytest.approx(0.71)
  assert arm['kl']['mean'] == pytest.approx(5.0)
  assert arm['indicators']['empty'] == pytest.approx(0.01)
  assert (
    pooled['models'][0] is evaluation()['models'][0] or arms.seeds(arm) == 3
  )
  assert [arms.seeds(m) for m in pooled['models']] == [1, 3, 3, 3]


@pytest.mark.parametrize('field', ['weights', 'liti_rate', 'kind'])
def test_models_that_differ_in_more_are_none(field):
  data = evaluation()
  other = {'weights': [0.5, 0.5], 'liti_rate': 0.5, 'kind': 'soup'}[field]
  data['models'][1][field] = other
  pooled = arms.pooled(data)
  seeds = {m['name']: arms.seeds(m) for m in pooled['models']}
  assert seeds['exp_0.1_0'] == 1 and seeds['exp kl_coef 0.1'] == 2


def test_without_seeds_nothing_changes():
  for data in (evaluation(seeds=1), synthetic.evaluation()):
    assert arms.pooled(data) is data and arms.of(data) == []
    assert fronts.wins_html(data, 'salt') == ''


def test_the_front_draws_arms_and_their_seeds():
  data = evaluation()
  together = arms.pooled(data)
  looks, each = ink.looks(together['models']), ink.looks(data['models'])
  for arm in arms.of(together):
    assert {each[name] for name in arm['seeds']} == {looks[arm['name']]}
  assert grid.paths(together) == [['exp kl_coef 0.1', 'exp kl_coef 0.5']]
  drawn = front_svg(data)
  for text in ('kl_coef 0.1', 'kl_coef 0.5', 'exp', 'identity'):
    assert f'>{text}<' in drawn
  assert 'exp_0.1_0' not in drawn
  assert len(points.points(together)) == 4
  assert fronts.wins_html(data, 'salt').count('<svg') == 3  # no worst of 4


def test_findings_rest_on_arms():
  gain, front, leaders = findings.evaluated(evaluation())
  assert gain.startswith(
    'Alignment raises the reward: exp kl_coef 0.1, the best arm of 3 seeds by '
    'reward, scores 0.710'
  )
  assert front.startswith('2 of 3 arms are on the Pareto front')
  assert front.endswith('by a model that is behind in neither: identity.')
  assert (
    'reward exp kl_coef 0.1 (0.710 [0.683, 0.737], measurably above exp '
    'kl_coef 0.5, 0.600' in leaders
  )
  assert 'best of 4 exp kl_coef 0.1' in leaders and 'worst' not in leaders
  _, _, wide = findings.evaluated(evaluation(half=0.2))
  assert 'not measurably above exp kl_coef 0.5' in wide


def test_the_page_shows_arms_first_and_every_seed(tmp_path):
  synthetic.write_evaluation(tmp_path, evaluation())
  report([tmp_path], tmp_path / 'report.html')
  page = (tmp_path / 'report.html').read_text()
  assert page.index('All arms') < page.index('Every seed')
  assert 'Win rates against KL' in page and 'small pale ones' in page
  assert page.count('3 seeds') >= 3 and 'exp_0.1_2' in page
  table = models_html(arms.pooled(evaluation()))
  assert '<b>0.710</b>' in table and 'identity' in table


def of_rounds(half=0.01):
  """Two rounds' fronts and LERP under three seeds, as WARP's graph has them."""
  models = [synthetic.model('init', 'init', 0.4, 0.0)]
  for seed in (0.0, 0.01, 0.02):
    for name, more in (('run', {}), ('LERP', {'kind': 'lerp'})):
      made = synthetic.model(f'{name} ({seed})', 'run', 0.5 + seed, 2.0)
      models.append(made | {'series': name} | more)
    for i in (1, 2):
      for rate in (0.3, 0.5, None):
        far, kind = rate or 1.0, 'liti' if rate else 'slerp'
        reward = 0.4 + 0.1 * i * far**0.5 + seed
        name = f'round {i}, {far:g} ({seed})'
        made = synthetic.model(name, kind, reward, 4 * far, rate, half=half)
        models.append(made | {'series': f'round {i}'})
  return {'format': 1, 'models': models, 'reference': 'init'}


def test_fronts_in_weight_space_are_averaged_over_seeds():
  pooled = arms.pooled(of_rounds())
  assert [(m['name'], arms.seeds(m)) for m in pooled['models']] == [
    ('init', 1),
    ('run', 3),
    ('LERP', 3),
    ('round 1 rate 0.3', 3),
    ('round 1 rate 0.5', 3),
    ('round 1', 3),
    ('round 2 rate 0.3', 3),
    ('round 2 rate 0.5', 3),
    ('round 2', 3),
  ]
  first, second = points.sweeps(pooled).values()
  assert [p.rate for p in first] == [p.rate for p in second] == [0, 0.3, 0.5, 1]
  assert second[-1].y[0] == pytest.approx(0.61)
  looks = ink.looks(pooled['models'])
  assert looks['LERP'].fill == ink.LOOKS['lerp'].fill
  assert looks['run'].fill == ink.LOOKS['run'].fill
  gain, slerp, liti = findings.evaluated(of_rounds())
  assert 'the mean of its 3 runs 0.510' in slerp and 'the best of' not in slerp
  assert 'SLERP beats everything' in slerp and 'LERP 0.510' in slerp
  assert liti.startswith('The LITI front of round 2 lies above the straight')
  drawn = front_svg(of_rounds())
  assert '>round 2<' in drawn and '(0.01)' not in drawn
