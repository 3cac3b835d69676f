import numpy as np
import pytest

from alignjax.report import curves
from alignjax.report.read import Run, Series


def run(name, **values):
  series = {k: Series(list(range(1, len(v) + 1)), v) for k, v in values.items()}
  return Run(name, name.rstrip('_0123456789'), series, {})


def test_smooth_is_a_mean_that_leaves_lines_and_gaps_alone():
  x = np.linspace(0, 5, 200)
  got = curves.smooth(x)
  np.testing.assert_allclose(got[10:-10], x[10:-10], atol=1e-9)
  rng = np.random.default_rng(0)
  noise = rng.normal(size=1000)
  assert curves.smooth(noise).std() < 0.2
  noise[500] = np.nan
  assert np.isnan(curves.smooth(noise)).sum() == 1
  assert curves.smooth([3.0]) == [3.0]
  # The end is a mean too, of half a window.
  assert curves.smooth(noise)[-1] == pytest.approx(noise[-51:].mean())


def test_thinning_keeps_extremes():
  values = [0.0] * 10_000
  values[1234], values[4321] = 5.0, -3.0
  steps, kept = curves.thinned(Series(list(range(10_000)), values))
  assert len(steps) <= curves.MAX_POINTS and (np.diff(steps) > 0).all()
  assert kept.max() == 5 and kept.min() == -3


def test_runs_of_a_group_share_charts_and_what_exists_is_drawn():
  page = curves.curves_html(
    [
      run('sft', loss=[3.0, 2.0, 1.0], odd=[1.0, 2.0, 1.0], still=[0.0] * 3),
      run('align_1', reward=[0.1, 0.2], logprob_gap=[1e-6, float('nan')]),
      run('align_2', reward=[0.1, 0.3]),
    ]
  )
  assert page.count('class="job"') == 2 and page.count('<svg') == 4
  assert page.count('<details>') == 1 and 'One more curve' in page
  assert 'Constant: still = 0.' in page
  assert 'align_1' in page and 'align_2' in page
  assert 'entropy' not in page
  assert curves.curves_html([]) == ''


def test_names_are_escaped():
  page = curves.curves_html([run('<b>', **{'<i>"': [1.0, 2.0]})])
  assert '<b>' not in page.replace('<b style', '') and '<i>"' not in page


@pytest.mark.parametrize(
  'value, text',
  [
    (0.25, '0.25'),
    (20000.0, '20k'),
    (4e-6, '4e-6'),
    (-0.5, '−0.5'),
    (2.5e7, '2.5e7'),
    (0.0, '0'),
  ],
)
def test_ticks(value, text):
  assert curves.tick(value) == text
