"""Every command of the README, on the reduced quickstart, and what it leaves.

`pip install` and `pytest` themselves are what CI does around this file.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / 'README.md').read_text('utf-8')
ENVIRONMENT = os.environ | {
  'XLA_FLAGS': '',
  'PATH': f'{Path(sys.executable).parent}:{os.environ["PATH"]}',
  'PYTHONPATH': str(ROOT),
}


def blocks(language):
  return re.findall(rf'```{language}\n(.*?)```', README, re.S)


def commands():
  lines = [line for block in blocks('bash') for line in block.splitlines()]
  parts = [part.strip() for line in lines for part in line.split('&&')]
  return [part for part in parts if part and not part.startswith('#')]


def test_the_commands_are_those_that_run_here_or_in_ci():
  known = ('pip install', 'pytest', 'alignjax ')
  assert all(command.startswith(known) for command in commands())
  ci = (ROOT / '.ci' / 'run').read_text()
  assert "pip install --quiet -e '.[test]'" in ci and '\npytest\n' in ci
  assert '\npytest -m slow\n' in ci


def shell(command, where):
  """Runs a command of the README in a folder where runs/ may be written."""
  command = command.replace(
    '--config=configs/quickstart.py ', '--config=configs/quickstart.py:tiny '
  ).replace('--config=configs/', f'--config={ROOT}/configs/')
  return subprocess.run(
    shlex.split(command),
    cwd=where,
    env=ENVIRONMENT,
    stdin=subprocess.DEVNULL,
    capture_output=True,
    text=True,
  )


@pytest.fixture(scope='module')
def quickstart(tmp_path_factory):
  """The first command; tests/chaos kills another like it."""
  where = tmp_path_factory.mktemp('readme')
  command = next(c for c in commands() if c.startswith('alignjax run'))
  done = shell(command, where)
  assert done.returncode == 0, done.stderr
  assert '[1/10] tokenizer: done in' in done.stdout
  assert 'report.html' in done.stdout
  return where


@pytest.mark.slow
def test_every_command_runs(quickstart):
  ran = 0
  for command in commands():
    if command.startswith('alignjax ') and ' run ' not in command:
      done = shell(command, quickstart)
      assert done.returncode == 0, (command, done.stderr)
      ran += 1
  assert ran >= 5


@pytest.mark.slow
def test_every_python_example_runs(quickstart):
  for block in blocks('python'):
    subprocess.run(
      [sys.executable, '-c', block], cwd=quickstart, env=ENVIRONMENT, check=True
    )
  assert (quickstart / 'runs/merged/model.json').exists()


@pytest.mark.slow
def test_the_evaluation_covers_every_model(quickstart):
  file = quickstart / 'runs/quickstart/evaluate/evaluation.json'
  evaluation = json.loads(file.read_text())
  kinds = [model['kind'] for model in evaluation['models']]
  assert kinds.count('run') == kinds.count('anchor') == 2
  assert {'init', 'slerp', 'lerp'} <= set(kinds) and kinds.count('liti') >= 6
  init = evaluation['models'][0]
  assert abs(init['kl']['mean']) < 1e-4
  assert 0.3 < init['win_rate']['mean'] < 0.7
  for model in evaluation['models']:
    assert model['logprob_gap'] < 1e-4
    assert model['reward']['low'] <= model['reward']['mean']
    assert set(model['indicators']) >= {'empty', 'comment_only', 'repetition'}
  # The end of the LITI line is SLERP itself, sampled with the same keys.
  slerp = next(m for m in evaluation['models'] if m['kind'] == 'slerp')
  last = next(m for m in evaluation['models'] if m['liti_rate'] == 1.0)
  assert last['reward'] == slerp['reward']


@pytest.mark.slow
def test_a_finished_graph_is_not_run_again(quickstart):
  command = next(c for c in commands() if c.startswith('alignjax run'))
  begun = time.monotonic()
  again = shell(command, quickstart)
  assert again.returncode == 0
  assert again.stdout.count('done before') == 10
  assert time.monotonic() - begun < 20
  changed = shell(f'{command} --config.pretrain.optimizer.lr=0.5', quickstart)
  assert changed.returncode == 2
  assert 'optimizer.lr: 0.003 -> 0.5' in changed.stderr
  assert '--rerun' in changed.stderr and 'Traceback' not in changed.stderr


@pytest.mark.slow
def test_bad_words_are_one_sentence(quickstart):
  for words, message in (
    ('run --config=configs/nowhere.py --workdir=x', 'nowhere.py'),
    (
      'run --config=configs/quickstart.py --workdir=x --config.sorce.path=y',
      "did you mean 'source.path'",
    ),
    (
      'run --config=configs/quickstart.py --workdir=x --config.runs=many',
      'whole number',
    ),
    ('sample nowhere --prompt x', 'no model at'),
    ('trian', "did you mean 'train'"),
  ):
    done = shell(f'alignjax {words}', quickstart)
    assert done.returncode == 2, (words, done.stderr)
    assert message in done.stderr and len(done.stderr.splitlines()) == 1
  assert not (quickstart / 'x').exists()
