"""The real `alignjax train`: damage, full disks, bad input, replay.

Kills are in tests/chaos.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from alignjax.cli import config as configs
from alignjax.cli import console
from alignjax.cli import train as verb
from alignjax.core.errors import UserError

ROOT = Path(__file__).parents[2]

PIECE = '''
def add_{i}(left, right):
    """Return the sum."""
    total = left + right * {i}
    for step in range({i}):
        total += step
    return total

'''


@pytest.fixture(scope='module')
def text(tmp_path_factory):
  path = tmp_path_factory.mktemp('text')
  for i in range(40):
    (path / f'file_{i:02}.py').write_text(PIECE.format(i=i) * 3)
  return path


def settings(text, method, **changes):
  """A run of a minute's worth of steps at most, as resolved JSON."""
  from alignjax.core.lookup import defaults

  config = {
    'tokenizer': '',
    'model': defaults(
      'models',
      'gemma',
      vocab_size=262,
      width=32,
      hidden=48,
      layers=2,
      heads=4,
      kv_heads=2,
      head_dim=8,
      window=16,
      init_std=0.1,
    ),
    'mesh': {'data': -1},
    'seed': 3,
    'steps': 12,
    'batch_size': 4,
    'microbatches': 1,
    'log_every': 1,
    'save_every': 2,
    'keep': 3,
    'max_bad_steps': 3,
    'verify_every': 0,
    'optimizer': defaults('system', 'optimizer', warmup_steps=2),
    'start': {},
  }
  if method == 'sft':
    config['recipe'] = defaults('recipes', 'sft')
    config['source'] = defaults(
      'data', 'sources.text', path=str(text), length=64
    )
  else:
    numbers = {'max_new_tokens': 8}
    if method == 'bond':
      numbers |= {'n': 2, 'quantile_count': 4, 'anchor_period': 3}
    config['recipe'] = defaults('recipes', method, **numbers)
    config['reward'] = defaults('rewards', 'verify.python_code')
    config['source'] = defaults(
      'data', 'sources.prompts', path=str(text), prompt_tokens=48
    )
  return configs.plain(config | changes)


def write(path: Path, config) -> Path:
  path.write_text(json.dumps(config))
  return path


def command(file, workdir, *more):
  return [
    sys.executable,
    '-m',
    'alignjax.cli.train',
    f'--config={file}',
    f'--workdir={workdir}',
    *more,
  ]


ENVIRONMENT = os.environ | {'XLA_FLAGS': ''}


def go(file, workdir, *more, **options):
  return subprocess.run(
    command(file, workdir, *more),
    env=ENVIRONMENT,
    capture_output=True,
    text=True,
    **options,
  )


def same_results(a: Path, b: Path):
  assert (a / 'metrics.jsonl').read_bytes() == (
    b / 'metrics.jsonl'
  ).read_bytes()
  for model in sorted(p.name for p in b.glob('model*')):
    sums = [
      json.loads((w / model / 'model.json').read_text())['checksums']
      for w in (a, b)
    ]
    assert sums[0] == sums[1]


def _lines(workdir: Path) -> int:
  file = workdir / 'metrics.jsonl'
  return len(file.read_bytes().splitlines()) if file.exists() else 0


@pytest.fixture(scope='module')
def finished(text, tmp_path_factory):
  root = tmp_path_factory.mktemp('finished')
  file = write(root / 'c.json', settings(text, 'sft'))
  assert go(file, root / 'w').returncode == 0
  return file, root / 'w'


def test_a_finished_run_is_not_run_again(finished):
  file, workdir = finished
  before = (workdir / 'metrics.jsonl').stat().st_mtime_ns
  again = go(file, workdir)
  assert again.returncode == 0
  assert (workdir / 'metrics.jsonl').stat().st_mtime_ns >= before
  assert _lines(workdir) == 12


def test_the_workdir_of_another_run_is_refused(finished, text, tmp_path):
  _, workdir = finished
  file = write(tmp_path / 'other.json', settings(text, 'sft', seed=4))
  with pytest.raises(UserError, match='another run: seed: 3 -> 4'):
    verb.main([f'--config={file}', f'--workdir={workdir}'])


def damage(step: Path):
  """Flips bytes in the largest file of a checkpoint."""
  files = [f for f in step.rglob('*') if f.is_file() and 'meta' not in str(f)]
  file = max(files, key=lambda f: f.stat().st_size)
  data = bytearray(file.read_bytes())
  for i in range(len(data) // 3, len(data) // 3 + 64):
    data[i] ^= 0xFF
  file.write_bytes(data)


@pytest.mark.parametrize('how', ['damaged', 'truncated'])
def test_a_bad_checkpoint_is_named_and_the_one_before_used(
  how, finished, tmp_path
):
  file, done = finished
  workdir = tmp_path / 'w'
  shutil.copytree(done, workdir)
  steps = sorted(
    (workdir / 'checkpoints').glob('[0-9]*'), key=lambda p: int(p.name)
  )
  assert [p.name for p in steps] == ['8', '10', '12']
  if how == 'damaged':
    damage(steps[-1])
  else:
    for part in (steps[-1] / 'state').rglob('*'):
      if part.is_file():
        part.write_bytes(part.read_bytes()[: part.stat().st_size // 2])
  again = go(file, workdir)
  assert again.returncode == 0, again.stderr
  said = [line for line in again.stderr.splitlines() if 'damaged' in line]
  assert len(said) == 1 and 'Traceback' not in again.stderr
  assert said[0].startswith(
    f'checkpoint 12 in {workdir}/checkpoints is damaged'
  )
  assert said[0].endswith('; the run continues from checkpoint 10')
  same_results(workdir, done)


def test_no_whole_checkpoint_is_an_error(finished, tmp_path):
  file, done = finished
  workdir = tmp_path / 'w'
  shutil.copytree(done, workdir)
  for step in (workdir / 'checkpoints').glob('[0-9]*'):
    damage(step)
  before = (workdir / 'metrics.jsonl').read_bytes()
  with pytest.raises(UserError, match='every checkpoint in .* is damaged'):
    verb.main([f'--config={file}', f'--workdir={workdir}'])
  assert (workdir / 'metrics.jsonl').read_bytes() == before


def test_replay(finished, tmp_path):
  file, done = finished
  words = [f'--config={file}', f'--workdir={done}']
  # In processes of their own: here are more devices than the run had.
  again = go(file, done, '--replay', '11')
  assert again.returncode == console.OK, again.stderr
  same = 'step 11, from checkpoint 10: the same metrics, bit for bit\n'
  assert again.stdout == same
  with pytest.raises(
    UserError, match=r'before step 5 remains .* are \[8, 10, '
  ):
    verb.main([*words, '--replay=5'])
  with pytest.raises(UserError, match=f'no run at {tmp_path}'):
    verb.main([words[0], f'--workdir={tmp_path}', '--replay=5'])
  workdir = tmp_path / 'w'
  shutil.copytree(done, workdir)
  text = (workdir / 'metrics.jsonl').read_text()
  rows = [json.loads(line) for line in text.splitlines()]
  rows[-1]['nll'] += 1
  lines = ''.join(json.dumps(row) + '\n' for row in rows)
  (workdir / 'metrics.jsonl').write_text(lines)
  again = go(file, workdir, '--replay=12')
  assert again.returncode == 1, again.stderr
  start = 'step 12, from checkpoint 10: different: nll '
  assert again.stdout.startswith(start)


def test_a_write_that_fails_leaves_the_checkpoints_before_it(text, tmp_path):
  """No file may grow beyond 16 KiB: the second checkpoint does not fit."""
  file = write(tmp_path / 'c.json', settings(text, 'sft', save_every=6))
  workdir = tmp_path / 'w'
  assert go(file, workdir).returncode == 0
  whole = tmp_path / 'whole'
  shutil.copytree(workdir, whole)
  shutil.rmtree(workdir / 'checkpoints' / '12')
  limits = (1 << 14, 1 << 14)
  limited = go(
    file,
    workdir,
    preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits),
  )
  assert limited.returncode == 2, limited.stderr
  assert 'could not write a checkpoint' in limited.stderr
  assert 'the ones before it are whole: [6]' in limited.stderr
  assert go(file, workdir).returncode == 0
  same_results(workdir, whole)


@pytest.mark.parametrize(
  'change, message',
  [
    ({'source': {'path': '/nowhere'}}, '/nowhere: no such file'),
    ({'model': {'vocab_size': 100}}, 'smaller than the tokenizer'),
    ({'model': {'kv_heads': 3}}, 'not a multiple'),
    ({'recipe': {'max_tokens': 3}}, 'max_tokens.*did you mean'),
    ({'recipe': {'baseline': 'mean'}}, "baseline: found 'mean'"),
    ({'batch_size': 6, 'microbatches': 4}, 'batch_size = 6 is not a multiple'),
    ({'mesh': {'rows': -1}}, "no axis 'rows'"),
    ({'mesh': {'data': 64}}, 'does not fill'),
    ({'start': {'policy': '/nowhere'}}, 'no model at /nowhere'),
    ({'optimizer': {'schedule': 'step'}}, "schedule: found 'step'"),
    ({'tokenizer': '/nowhere.model'}, '/nowhere.model'),
    ({'source': {'prompt_tokens': 1}}, 'no text is long enough for a prompt'),
  ],
)
def test_bad_input_is_one_sentence_before_any_compute(
  change, message, text, tmp_path
):
  config = settings(text, 'jbond')
  for field, value in change.items():
    if isinstance(value, dict) and field != 'mesh':
      config[field] = config[field] | value
    else:
      config[field] = value
  file = write(tmp_path / 'c.json', config)
  workdir = tmp_path / 'w'
  with pytest.raises(UserError, match=message) as error:
    verb.main([f'--config={file}', f'--workdir={workdir}'])
  assert '\n' not in str(error.value)
  assert not workdir.exists()


def test_a_fixed_role_from_nowhere_would_be_noise(text, tmp_path):
  from alignjax.core.lookup import defaults

  config = settings(text, 'jbond')
  config['recipe'] = configs.plain(defaults('recipes', 'bond'))
  file, workdir = write(tmp_path / 'c.json', config), tmp_path / 'w'
  with pytest.raises(UserError, match='start.anchor: .* never trains this'):
    verb.main([f'--config={file}', f'--workdir={workdir}'])
  assert not workdir.exists()


def test_chat_sft_from_its_config(finished, tmp_path, monkeypatch):
  monkeypatch.chdir(ROOT)
  rows = [
    [
      {'role': 'user', 'content': f'What is {i} + 1?'},
      {'role': 'model', 'content': f'{i + 1}'},
    ]
    for i in range(40)
  ]
  path = tmp_path / 'chat.jsonl'
  path.write_text(''.join(json.dumps({'messages': r}) + '\n' for r in rows))
  workdir = tmp_path / 'w'
  done = verb.main(
    [
      '--config=configs/chat_sft.py',
      f'--workdir={workdir}',
      f'--config.source.path={path}',
      '--config.source.length=64',
      f'--config.start.policy={finished[1] / "model"}',
      '--config.steps=15',
      '--config.optimizer.lr=0.02',
    ]
  )
  assert done == console.OK
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  losses = [json.loads(line)['nll'] for line in lines]
  assert losses[-1] < losses[0] - 1
  assert (workdir / 'model' / 'model.json').exists()


def test_chat_data_has_its_loss_on_model_turns_only(tmp_path):
  rows = [
    [
      {'role': 'user', 'content': f'What is {i} + 1?'},
      {'role': 'model', 'content': f'{i + 1}'},
    ]
    for i in range(8)
  ]
  path = tmp_path / 'chat.jsonl'
  path.write_text(''.join(json.dumps({'messages': r}) + '\n' for r in rows))
  from alignjax.data import sources
  from alignjax.data.tokenizer import ByteTokenizer

  tokenizer = ByteTokenizer()
  source = sources.chat(tokenizer, 2, 0, path=str(path), length=64)
  fields = source.batch(0)
  learnt = tokenizer.decode(fields['tokens'][fields['loss_mask']].tolist())
  assert set(learnt) <= set('0123456789\n ')
  ends = fields['tokens'] == tokenizer.end_of_turn
  assert (fields['loss_mask'] & ends).sum() * 2 == ends.sum()
  path.write_text(json.dumps({'text': 'x'}) + '\n')
  with pytest.raises(UserError, match="row 1: no field 'messages'"):
    sources.chat(tokenizer, 2, 0, path=str(path))
  path.write_text(json.dumps({'messages': rows[0][:1] * 2}) + '\n')
  with pytest.raises(UserError, match='row 1'):
    sources.chat(tokenizer, 2, 0, path=str(path))
  assert np.array_equal(source.batch(3)['id'], source.batch(3)['id'])
