import json
import math

import pytest

from alignjax.core.errors import UserError
from alignjax.report import read
from tests.report import synthetic


def lines(path, *rows):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text('\n'.join(rows))
  return path


def test_finds_jobs_evaluations_and_documents(tmp_path):
  work = synthetic.workdir(tmp_path)
  for hidden in ('.jobs', 'align_1/checkpoints/3', 'align_1/model'):
    lines(work / hidden / 'metrics.jsonl', '{"step": 1, "loss": 1}', '')
  found = read.found([work])
  assert [r.name for r in found.runs] == ['pretrain', 'align_1', 'align_2']
  assert [r.group for r in found.runs] == ['pretrain', 'align', 'align']
  assert found.runs[1].steps == 250
  assert list(found.evaluations) == ['evaluate']
  assert 'align_2 · config.json' in found.documents
  # A run's own directory, and several directories at once.
  assert read.found([work / 'pretrain']).runs[0].name == 'pretrain'
  both = read.found([work / 'align_1', work])
  assert [r.name for r in both.runs] == [
    'quickstart/pretrain',
    'align_1',
    'quickstart/align_1',
    'quickstart/align_2',
  ]


def test_a_line_being_written_is_ignored(tmp_path):
  path = lines(tmp_path / 'm.jsonl', '{"step": 1, "a": 2}', '{"step": 2, "a')
  assert read.rows(path) == [{'step': 1, 'a': 2}]
  path.write_text('{"step": 1, "a": 2}\n7')
  assert read.rows(path) == [{'step': 1, 'a': 2}]


@pytest.mark.parametrize(
  'row, said',
  [
    ('{"step": 2, "a', 'not valid JSON'),
    ('[1]', 'integer "step"'),
    ('{"loss": 1}', 'integer "step"'),
  ],
)
def test_a_malformed_line_is_named(tmp_path, row, said):
  path = lines(tmp_path / 'm.jsonl', '{"step": 1}', row, '{"step": 3}', '')
  with pytest.raises(UserError, match=f'm.jsonl, line 2: .*{said}'):
    read.rows(path)


def test_later_rows_win_and_gaps_are_kept(tmp_path):
  rows = [
    {'step': 1, 'a': 1.0, 'text': 'x', 'flag': True},
    {'step': 2, 'a': 9.0},
    {'step': 2, 'a': 2.0},
    {'step': 3, 'a': 'nan'},
  ]
  lines(tmp_path / 'metrics.jsonl', *map(json.dumps, rows), '')
  (run,) = read.found([tmp_path]).runs
  assert list(run.metrics) == ['a'] and run.metrics['a'].steps == [1, 2, 3]
  assert run.metrics['a'].values[:2] == [1, 2]
  assert math.isnan(run.metrics['a'].values[2])


def test_nothing_to_report(tmp_path):
  with pytest.raises(UserError, match='does not exist'):
    read.found([tmp_path / 'nowhere'])
  lines(tmp_path / 'metrics.jsonl', '')
  with pytest.raises(UserError, match='nothing to report'):
    read.found([tmp_path])
  with pytest.raises(UserError, match='none given'):
    read.found([])


def broken(data, **changes):
  return json.dumps({**data, **changes}, indent=1)


@pytest.mark.parametrize(
  'change, said',
  [
    ({'format': 2}, 'found format 2'),
    ({'models': []}, '"models" must be'),
    ({'models': [{'kind': 'init'}]}, r'models\[0\] has no "name"'),
    ({'models': [{'name': 'x', 'reward': 3}]}, '"reward" of model \'x\''),
    ({'best_of_n': [{'n': 2}]}, r'best_of_n\[0\]'),
  ],
)
def test_a_malformed_evaluation_names_the_field(tmp_path, change, said):
  path = tmp_path / 'evaluation.json'
  path.write_text(broken(synthetic.evaluation(), **change))
  with pytest.raises(UserError, match=f'evaluation.json: .*{said}'):
    read.evaluation(path)


def test_files_that_are_not_json_or_not_text(tmp_path):
  path = tmp_path / 'evaluation.json'
  path.write_text('{\n "format": 1,\n oops}')
  with pytest.raises(UserError, match='evaluation.json, line 3: not valid'):
    read.found([tmp_path])
  path.write_bytes(b'{"format": \xff}')
  with pytest.raises(UserError, match='expected UTF-8'):
    read.found([tmp_path])
