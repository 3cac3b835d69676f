import json
import re

import pytest

from alignjax.core.errors import UserError
from alignjax.report import goodput, read
from tests.report import synthetic


def run_with(tmp_path, rows):
  (tmp_path / 'metrics.jsonl').write_text('{"step": 4, "nll": 1.0}\n')
  lines = ''.join(json.dumps(row) + '\n' for row in rows)
  (tmp_path / 'timing.jsonl').write_text(lines)
  return read.found([tmp_path]).runs[0]


def test_every_start_of_a_run_counts(tmp_path):
  run = run_with(
    tmp_path,
    [
      {'step': 2, 'seconds': 9.0, 'spent': {'startup': 1.0, 'step': 5.0}},
      {'step': 2, 'spent': {'lost': 3.0}, 'lost': {'steps': 7}},
      {'step': 4, 'seconds': 6.0, 'spent': {'score': 1.0, 'new': 10.0}},
      {'step': 4, 'spent': {'data': 4.0}, 'total': {'step': 5.0}},
    ],
  )
  assert run.spent == {
    **{'startup': 1.0, 'step': 5.0, 'lost': 3.0, 'score': 1.0},
    **{'new': 10.0, 'data': 4.0},
  }
  assert goodput.share(run) == 6.0 / 24.0
  # The ledger's own rows do not hide what was logged at their step.
  assert run.timing['seconds'].values == [9.0, 6.0]
  html = goodput.goodput_html([run])
  assert '<b>25.0%</b>' in html and '7 steps done again' in html
  widths = [float(w) for w in re.findall(r'width:([\d.]+)%', html)]
  assert sum(widths) == pytest.approx(100, abs=0.01)
  assert re.findall('</i>([^<]+)</th>', html) == [
    *('step', 'score', 'data wait', 'start-up', 'lost work', 'new')
  ]


def test_runs_without_a_ledger_have_no_row(tmp_path):
  run = run_with(tmp_path, [{'step': 4, 'seconds': 6.0}])
  assert goodput.goodput_html([run]) == ''


def test_names_are_escaped(tmp_path):
  run = run_with(tmp_path, [{'step': 4, 'spent': {'<b>': 6.0}}])
  html = goodput.goodput_html([run._replace(name='<i>"x"')])
  assert '&lt;b&gt;' in html and '<i>"x"' not in html


def test_malformed_seconds_are_one_sentence(tmp_path):
  for bad in ('much', {'step': 'nan'}):
    with pytest.raises(UserError, match='timing.jsonl: "spent" of step 4'):
      run_with(tmp_path, [{'step': 4, 'spent': bad}])
  with pytest.raises(UserError, match='"lost" must have'):
    run_with(tmp_path, [{'step': 4, 'lost': 7}])


def test_the_synthetic_run_has_one(tmp_path):
  synthetic.write_run(tmp_path / 'a', 10, 0, synthetic.SFT)
  (run,) = read.found([tmp_path]).runs
  assert goodput.share(run) == pytest.approx(3.8 / 16.0)
