"""One run in several real processes, on this machine, by the real command."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from alignjax.cli import config as configs
from alignjax.core.errors import UserError
from alignjax.core.lookup import defaults
from alignjax.system import hosts, model_dir

ROOT = Path(__file__).parents[2]
STEPS = 10
LIMIT_S = 240  # of any one phase, on a busy machine

# What a user could write; it says which rows it was asked about.
REWARD = """
import json, os, time
import jax
import numpy as np

def even(tokenizer, *, pause_s: float = 0.0):
  def reward(bundle, batch, key):
    assert all(type(x) is np.ndarray for x in batch.values())
    time.sleep(pause_s)
    with open(f'{os.environ["CALLS"]}.{jax.process_index()}', 'a') as file:
      file.write(json.dumps(batch['id'].tolist()) + '\\n')
    even = (batch['response'] % 2 == 0) & batch['mask']
    score = even.sum(-1) / batch['mask'].sum(-1)
    return score[..., None].astype(np.float32)
  reward.host = True
  return reward
"""


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp('hosts')
  (path / 'host_reward.py').write_text(REWARD)
  lines = [f'def add_{i}(a, b):\n  return a + {i} * b\n' for i in range(80)]
  (path / 'text.py').write_text('\n'.join(lines))
  for method, mesh in ('sft', {'data': 2, 'fsdp': 2}), ('jbond', {'data': 4}):
    config = settings(path, method, mesh)
    (path / f'{method}.json').write_text(json.dumps(config))
  return path


def settings(folder, method, mesh):
  numbers = {'max_new_tokens': 4} if method == 'jbond' else {}
  source = {'jbond': {'prompt_tokens': 24}, 'sft': {'length': 32}}[method]
  kind = {'jbond': 'sources.prompts', 'sft': 'sources.text'}[method]
  config = {
    'tokenizer': '',
    'model': defaults(
      'models',
      'gemma',
      vocab_size=262,
      width=16,
      hidden=16,
      layers=1,
      heads=2,
      kv_heads=2,
      head_dim=8,
      window=8,
      init_std=0.1,
    ),
    'mesh': mesh,
    'seed': 3,
    'steps': STEPS,
    'batch_size': 8,
    'microbatches': 1,
    'log_every': 1,
    'save_every': 2,
    'keep': 3,
    'max_bad_steps': 3,
    'verify_every': 0,
    'optimizer': defaults('system', 'optimizer', warmup_steps=2),
    'start': {},
    'recipe': defaults('recipes', method, **numbers),
    'reward': {'name': 'host_reward.even', 'pause_s': 0.2},
    'source': defaults(
      'data', kind, path=str(folder / 'text.py'), part='all', **source
    ),
  }
  return configs.plain(config)


def port() -> int:
  with socket.socket() as one:
    one.bind(('127.0.0.1', 0))
    return one.getsockname()[1]


def start(folder, method, workdir, processes, devices, calls='calls'):
  """The same command in several processes; their words go to files."""
  environment = os.environ | {
    'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices} '
    '--xla_cpu_collective_call_terminate_timeout_seconds=600',
    'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',  # most of the time is compiling
    'PYTHONPATH': os.pathsep.join([str(ROOT), str(folder)]),
    'CALLS': str(folder / calls),
  }
  coordinator = f'127.0.0.1:{port()}'
  out = []
  for i in range(processes):
    flags = [
      f'--coordinator={coordinator}',
      f'--processes={processes}',
      f'--process={i}',
      '--heartbeat_s=20',
      '--start_s=120',
    ]
    command = [sys.executable, '-m', 'alignjax.cli.train']
    command += [f'--config={folder / method}.json', f'--workdir={workdir}']
    with open(f'{workdir}.{i}.err', 'w') as err:
      out.append(
        subprocess.Popen(
          command + (flags if processes > 1 else []),
          env=environment,
          stdout=err,
          stderr=err,
        )
      )
  return out


def ended(running) -> list[int]:
  try:
    return [process.wait(timeout=LIMIT_S) for process in running]
  finally:
    for process in running:
      process.kill()


def said(workdir, process: int) -> str:
  return Path(f'{workdir}.{process}.err').read_text()


def logged(workdir) -> list[dict]:
  file = workdir / 'metrics.jsonl'
  lines = file.read_text().splitlines() if file.exists() else []
  return [json.loads(line) for line in lines]


def wait_for_step(workdir, step, running):
  begin = time.monotonic()
  while not (rows := logged(workdir)) or rows[-1]['step'] < step:
    alive = all(process.poll() is None for process in running)
    if not alive or time.monotonic() - begin > LIMIT_S:
      for process in running:
        process.kill()
      pytest.fail(f'no step {step}: {said(workdir, 0)}')
    time.sleep(0.05)


def assert_same(a: Path, b: Path):
  """Metrics and weights, within the tolerance of float32."""
  left, right = logged(a), logged(b)
  assert [row['step'] for row in left] == list(range(1, STEPS + 1))
  for x, y in zip(left, right, strict=True):
    assert x.keys() == y.keys()
    for name in x:
      np.testing.assert_allclose(x[name], y[name], 1e-4, 1e-4, err_msg=name)
  one, two = (model_dir.read(path / 'model') for path in (a, b))
  assert one.roles == two.roles == ('policy',)
  for name in one.checksums['policy']:
    np.testing.assert_allclose(
      model_dir.load_leaf(one, 'policy', name),
      model_dir.load_leaf(two, 'policy', name),
      1e-4,
      1e-6,
    )


@pytest.mark.slow
def test_sft_in_two_processes_equals_one(folder):
  alone, both = folder / 'sft_1', folder / 'sft_2'
  assert ended(start(folder, 'sft', alone, 1, 4)) == [0], said(alone, 0)
  assert ended(start(folder, 'sft', both, 2, 2)) == [0, 0], said(both, 1)
  assert_same(alone, both)


@pytest.mark.slow
def test_jbond_stops_dies_and_goes_on_in_any_number_of_processes(folder):
  alone, many = folder / 'jbond_1', folder / 'jbond_n'
  assert ended(start(folder, 'jbond', alone, 1, 4, 'alone')) == [0]
  # SIGTERM of one: both stop after the same step.
  running = start(folder, 'jbond', many, 2, 2, 'two')
  wait_for_step(many, 2, running)
  running[1].send_signal(signal.SIGTERM)
  assert ended(running) == [75, 75], said(many, 0) + said(many, 1)
  stopped = logged(many)[-1]['step']
  assert f'saved at step {stopped} of' in said(many, 0)
  assert stopped < STEPS
  # One process answered for each row.
  calls = [(folder / f'two.{i}').read_text().splitlines() for i in (0, 1)]
  for first, second in zip(*calls, strict=True):
    ids = json.loads(first) + json.loads(second)
    assert len(json.loads(first)) == 4 and len(ids) == 8
  # kill -9 of one: the others end, and say why.
  running = start(folder, 'jbond', many, 4, 1, 'four')
  wait_for_step(many, stopped + 2, running)
  running[2].kill()
  begin = time.monotonic()
  assert ended(running) == [75, 75, -signal.SIGKILL, 75], said(many, 0)
  assert time.monotonic() - begin < 60
  for i in (0, 1, 3):
    last = said(many, i).strip().splitlines()[-1]
    assert f'process {i} of 4: another process of this run has died' in last
  assert ended(start(folder, 'jbond', many, 2, 2, 'again')) == [0, 0]
  assert_same(alone, many)


@pytest.mark.parametrize('process', [0, 1])
def test_others_that_do_not_come_are_not_awaited_for_ever(folder, process):
  coordinator = f'127.0.0.1:{port()}'
  begin = time.monotonic()
  done = subprocess.run(
    [
      *(sys.executable, '-m', 'alignjax.cli.train'),
      *(f'--config={folder / "sft"}.json', f'--workdir={folder / "alone"}'),
      *(f'--coordinator={coordinator}', '--processes=2'),
      *(f'--process={process}', '--start_s=2'),
    ],
    env=os.environ | {'PYTHONPATH': str(ROOT)},
    capture_output=True,
    text=True,
    timeout=LIMIT_S,
  )
  assert done.returncode == 2, done.stderr
  assert time.monotonic() - begin < 60
  last = done.stderr.strip().splitlines()[-1]
  what = (
    'not all of the 2 processes came' if process == 0 else 'does not answer'
  )
  assert len(done.stderr.strip().splitlines()) == 1
  assert coordinator in last and what in last and 'within 2 s' in last
  assert not (folder / 'alone').exists()


@pytest.mark.parametrize(
  'flags, sentence',
  [
    (dict(coordinator='a:1'), '--coordinator, --processes and --process go'),
    (dict(coordinator='a', processes=2, process=0), 'expected HOST:PORT'),
    (dict(coordinator='a:b', processes=2, process=0), 'expected HOST:PORT'),
    (dict(coordinator='a:1', processes=2, process=2), 'not one of 0 .. 2 - 1'),
    (dict(start_s=0), '--start_s: found 0'),
  ],
)
def test_flags_that_do_not_fit(flags, sentence):
  with pytest.raises(UserError, match=sentence):
    hosts.check(hosts.Hosts(**flags))


def test_a_run_of_one_process_passes_through():
  with pytest.raises(KeyError), hosts.session(hosts.Hosts()):
    raise KeyError
  assert hosts.agreement()(1, True) and not hosts.agreement()(1, False)
