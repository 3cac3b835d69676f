import math

import pytest

from alignjax.report import findings
from alignjax.report.intervals import combined
from tests.report import synthetic


def evaluation(**rewards):
  """The synthetic one with other rewards, by name; LITI ends follow."""
  data = synthetic.evaluation()
  for m in data['models']:
    if m['name'] in rewards:
      m['reward'] = synthetic.bar(rewards[m['name']], 0.02)
  return data


def test_combined_against_the_normal_formula():
  a, b = (0.7, 0.67, 0.73), (0.5, 0.46, 0.54)
  assert combined([(1, a), (-1, b)]) == pytest.approx((0.2, 0.15, 0.25))
  mean, low, high = combined([(0.5, a), (0.5, b)])
  assert (mean, low, high) == pytest.approx((0.6, 0.575, 0.625))
  # Uneven intervals: the near side of one meets the far side of the other.
  _, low, high = combined([(1, (1, 0.7, 1)), (-1, (0, 0, 0.4))])
  assert (low, high) == pytest.approx((1 - math.hypot(0.3, 0.4), 1.0))


def test_the_gain_names_the_best_run_its_kl_and_its_wins():
  line = findings.evaluated(synthetic.evaluation())[0]
  assert line.startswith('Alignment raises the reward: align_2')
  assert '0.704 [0.682, 0.726] against 0.450 [0.428, 0.472]' in line
  assert '+0.254 [+0.223, +0.285]' in line
  assert 'KL of 8.80 [8.36, 9.24]' in line and '78% [75%, 81%]' in line
  assert 'best of 16 completions of the init scores 0.690' in line


@pytest.mark.parametrize(
  'reward, said', [(0.46, 'makes no measurable'), (0.3, 'lowers the reward')]
)
def test_no_gain_is_not_called_one(reward, said):
  line = findings.evaluated(evaluation(align_1=reward, align_2=reward))[0]
  assert said in line and 'raises' not in line


@pytest.mark.parametrize(
  'slerp, head',
  [
    (0.8, 'SLERP beats everything'),
    (0.73, 'SLERP wins in part'),
    (0.71, 'SLERP does not win measurably'),
    (0.6, 'SLERP does not win: it is measurably below'),
  ],
)
def test_slerp_against_runs_and_lerp(slerp, head):
  line = findings.evaluated(evaluation(slerp=slerp, align_1=0.68))[1]
  assert line.startswith(head), line
  assert 'the mean of its 2 runs' in line and 'LERP' in line
  assert ('no measurable difference' in line) == (slerp in (0.73, 0.71))


def test_liti_above_below_and_on_the_line():
  def swept(bend):
    data = synthetic.evaluation()
    for m in data['models']:
      if m['kind'] == 'liti':
        share = m['kl']['mean'] / 8.1
        reward = 0.45 + 0.265 * share + bend * 4 * share * (1 - share)
        m['reward'] = synthetic.bar(reward, 0.01)
    return findings.evaluated(data)[2]

  assert 'lies above the straight line' in swept(0.1)
  assert 'lies below the straight line' in swept(-0.1)
  assert swept(0.0).startswith('No measurable difference')
  assert 'The best rate by reward is 1: 0.715' in swept(0.0)


def test_runs_at_equal_kl():
  def line(kl_1, kl_2, reward):
    data = synthetic.evaluation()
    for m, kl in zip(data['models'][1:3], (kl_1, kl_2)):
      m['kl'] = synthetic.bar(kl, 0.1)
      m['reward'] = synthetic.bar(reward, 0.02)
    return findings.evaluated(data)[2]

  assert 'no comparison at equal KL' in line(9.3, 8.8, 0.7)
  assert 'front is above align_1 and align_2' in line(3.0, 5.0, 0.5)
  assert 'front is below align_1 (align_2 lies beyond it)' in line(3, 12, 0.8)
  # 8.15 is past the end, 8.1, but not measurably.
  assert 'not measurably different from align_1' in line(8.15, 12, 0.715)


def test_what_was_not_evaluated_is_said():
  data = synthetic.evaluation()
  data['models'] = data['models'][1:2]
  data['best_of_n'] = []
  gain, slerp, liti = findings.evaluated(data)
  assert 'no init to compare with' in gain
  assert 'No SLERP' in slerp and 'No LITI sweep' in liti
