"""The real `alignjax teach` and `train`: a teacher of another architecture,
in the step and from disk, kills, and bad input."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from alignjax.cli import config as configs
from alignjax.cli import console, parts, teach, train
from alignjax.core.errors import UserError
from alignjax.core.lookup import defaults
from alignjax.data import tokenizer as tokenizers
from alignjax.models import decoder
from alignjax.models.config import to_json
from alignjax.models.gemma import gemma
from alignjax.system import model_dir

ROOT = Path(__file__).parents[2]
TEACH = [sys.executable, '-m', 'alignjax.cli.teach']


def shape(**changes):
  numbers = dict(vocab_size=262, width=16, hidden=24, layers=1, heads=2)
  numbers |= dict(kv_heads=1, head_dim=8, window=8, init_std=0.3)
  return gemma(**numbers | changes)


def model(path: Path, tokenizer=None, **changes) -> Path:
  config = shape(**changes)
  params = jax.jit(lambda key: decoder.init(config, key))(jax.random.key(1))
  model_dir.write(
    path,
    config=to_json(config),
    params={'policy': decoder.canonical(params)},
    provenance={},
    tokenizer=tokenizer,
  )
  return path


@pytest.fixture(scope='module')
def where(tmp_path_factory):
  path = tmp_path_factory.mktemp('teach')
  (path / 'text').mkdir()
  for i in range(24):
    lines = [f'def f_{i}_{j}(x):\n  return x + {j}\n\n' for j in range(12)]
    (path / 'text' / f'file_{i:02}.py').write_text(''.join(lines))
  model(path / 'student')
  # Another family, deeper, wider, and with rows that are no tokens.
  model(path / 'teacher', family='gemma3', layers=2, width=24, vocab_size=288)
  tokenizers.train(['def f(x):\n  return x\n'] * 50, path / 'tokenizer.model')
  return path


def settings(where, **changes):
  config = {
    'tokenizer': '',
    'model': {'name': 'start'},
    'start': {'policy': str(where / 'student')},
    'teacher': {'path': str(where / 'teacher'), 'tokenizer': ''},
    'recipe': defaults('recipes', 'distill', targets='counts', k=12),
    'source': defaults(
      'data', 'sources.text', path=str(where / 'text'), length=32, part='all'
    ),
    'optimizer': defaults('system', 'optimizer', warmup_steps=2),
    'mesh': {'data': -1},
    'seed': 3,
    'steps': 4,
    'batch_size': 4,
    'microbatches': 1,
    'log_every': 1,
    'save_every': 2,
    'keep': 2,
    'max_bad_steps': 3,
    'verify_every': 0,
  }
  return configs.plain(config | changes)


def run(verb, folder: Path, config, out: str, *more) -> int:
  file = folder / f'{out}.json'
  file.write_text(json.dumps(config))
  flag = '--out' if verb is teach else '--workdir'
  return verb.main([f'--config={file}', f'{flag}={folder / out}', *more])


def rows_of(workdir: Path):
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  return [json.loads(line) for line in lines]


def test_a_run_from_disk_is_the_run_with_the_teacher(where, tmp_path):
  config = settings(where)
  assert run(train, tmp_path, config, 'online') == console.OK
  assert run(teach, tmp_path, config, 'records', '--shard_rows=16') == 0
  offline = settings(
    where,
    recipe=defaults('recipes', 'distill.recorded'),
    source={
      'name': 'teacher.recorded',
      'rows': config['source'],
      'path': str(tmp_path / 'records'),
    },
  )
  del offline['teacher']
  assert run(train, tmp_path, offline, 'offline') == console.OK
  for a, b in zip(rows_of(tmp_path / 'online'), rows_of(tmp_path / 'offline')):
    assert a.keys() == b.keys() and a['loss/kl'] > 0.05
    assert a['loss/kl'] == pytest.approx(b['loss/kl'], abs=1e-6)
    assert a['nll'] == pytest.approx(b['nll'], abs=1e-5)
  # Only the policy is exported, in its own shape.
  config = json.loads((tmp_path / 'online/model/model.json').read_text())
  assert config['config']['width'] == 16
  assert not (tmp_path / 'online/model_teacher').exists()
  start = json.loads((tmp_path / 'online/start.json').read_text())
  assert set(start) == {'policy', 'teacher'}


def test_gkd_by_command(where, tmp_path):
  config = settings(
    where,
    recipe=defaults('recipes', 'gkd', max_new_tokens=6, on_policy=0.5),
    source=defaults(
      'data',
      'sources.prompts',
      path=str(where / 'text'),
      prompt_tokens=24,
      response_tokens=8,
    ),
    batch_size=8,
  )
  assert run(train, tmp_path, config, 'gkd') == console.OK
  rows = rows_of(tmp_path / 'gkd')
  assert len(rows) == 4
  assert 0 < np.mean([row['drawn'] for row in rows]) < 1
  assert max(row['logprob_gap'] for row in rows) < 1e-4


def test_killed_writing_goes_on(where, tmp_path):
  config = tmp_path / 'config.json'
  config.write_text(json.dumps(settings(where)))
  words = [*TEACH, f'--config={config}', '--shard_rows=4']
  environment = os.environ | {'XLA_FLAGS': '', 'PYTHONPATH': str(ROOT)}
  whole = tmp_path / 'whole'
  subprocess.run([*words, f'--out={whole}'], env=environment, check=True)
  out = tmp_path / 'out'
  process = subprocess.Popen([*words, f'--out={out}'], env=environment)
  until = time.monotonic() + 120
  while not list(out.glob('teacher-*')) and time.monotonic() < until:
    time.sleep(0.01)
  process.send_signal(signal.SIGKILL)
  process.wait()
  done = subprocess.run(
    [*words, f'--out={out}'], env=environment, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  names = sorted(file.name for file in whole.iterdir())
  assert names == sorted(file.name for file in out.iterdir())
  for name in names:
    assert (whole / name).read_bytes() == (out / name).read_bytes(), name


def test_a_teacher_with_another_tokenizer(where, tmp_path):
  other = model(tmp_path / 'other', where / 'tokenizer.model', vocab_size=500)
  config = settings(where, teacher={'path': str(other), 'tokenizer': ''})
  with pytest.raises(UserError, match='has another tokenizer') as error:
    run(train, tmp_path, config, 'run')
  assert '\n' not in str(error.value)
  with pytest.raises(UserError, match='has another tokenizer'):
    run(teach, tmp_path, config, 'out')
  assert not (tmp_path / 'run').exists() and not (tmp_path / 'out').exists()
  # The same words under another file name are the same tokenizer.
  named = tmp_path / 'named.model'
  named.write_bytes((where / 'tokenizer.model').read_bytes())
  tokens = parts.tokenizer(str(named))
  config = configs.from_json(json.dumps(config))
  assert parts.teacher_config(config, tokens).vocab_size == 500
  bare = model(tmp_path / 'bare', vocab_size=500)
  config.teacher.path = str(bare)
  with pytest.raises(UserError, match=r'no file, so bytes\).* teacher.tok'):
    parts.teacher_config(config, tokens)
  config.teacher.tokenizer = str(where / 'tokenizer.model')
  assert parts.teacher_config(config, tokens).vocab_size == 500


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'recipe': {'targets': 'full'}}, 'not written down'),
    ({'recipe': {'targets': 'top_k', 'k': 300}}, 'recipe.k = 300 is more'),
    ({'recipe': {'targets': 'topk'}}, "found 'topk'"),
    ({'teacher': {'path': ''}}, 'teacher.path: expected'),
    ({'teacher': {'path': 'nowhere'}}, 'no model at'),
    ({'recipe': {'name': 'sft'}}, "recipe: 'sft' says no targets"),
  ],
)
def test_bad_input_of_teach(where, tmp_path, changes, message):
  config = settings(where)
  for section, fields in changes.items():
    config[section] = config[section] | fields
    if fields.get('name') == 'sft':
      config[section] = fields
  with pytest.raises(UserError, match=message):
    run(teach, tmp_path, config, 'out')
  assert not (tmp_path / 'out').exists()


def test_bad_input_of_train(where, tmp_path):
  small = model(tmp_path / 'small', vocab_size=200)
  both = {'policy': str(where / 'student'), 'teacher': '@policy'}
  top = defaults('recipes', 'distill', targets='top_k', k=300)
  for changes, message in (
    ({'teacher': {'path': str(small)}}, '200 ids, fewer than the 262'),
    ({'start': both}, 'expected one of them'),
    ({'recipe': top}, 'recipe.k = 300 is more'),
  ):
    with pytest.raises(UserError, match=message):
      run(train, tmp_path, settings(where, **changes), 'run')


def test_the_configs_are_whole():
  for name in ('distill.py', 'gkd.py'):
    file = f'--config={ROOT}/configs/papers/{name}'
    config, _, _ = configs.load([file])
    assert config.teacher.path == ''
  file = f'--config={ROOT}/configs/papers/distill_recorded.py'
  config, _, _ = configs.load([file, '--config.source.rows.length=64'])
  assert config.source.rows.length == 64 and 'teacher' not in config
  with pytest.raises(UserError, match='expected one of'):
    configs.load([f'--config={ROOT}/configs/papers/distill.py:drawn'])
