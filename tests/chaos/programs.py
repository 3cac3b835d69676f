"""The real commands, killed where it hurts, and what must be the same after.

A kill is aimed by what a run leaves on disk: the process is stopped, a look
says whether it is where it should be, and only then it is killed.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from alignjax.cli import config as configs
from alignjax.core.lookup import defaults
from tests.chaos import parts

ROOT = Path(__file__).parents[2]
LIMIT_S = 600
GRAPH = ('pretrain', 'align_1', 'align_2', 'slerp')
NAMES = ('sft', 'distill', 'jbond', 'warp', 'run')

PIECE = '''
def add_{i}(left, right):
    """Return the sum."""
    total = left + right * {i}
    for step in range({i}):
        total += step
    return total

'''


def write_text(folder: Path) -> Path:
  folder.mkdir(parents=True, exist_ok=True)
  for i in range(40):
    (folder / f'file_{i:02}.py').write_text(PIECE.format(i=i) * 3)
  return folder


def settings(text, method, **changes):
  """A run of seconds as resolved JSON, with parts that leave traces."""
  model = dict(vocab_size=262, width=32, hidden=48, layers=2, heads=4)
  model |= dict(kv_heads=2, head_dim=8, window=16, init_std=0.1)
  config = {
    'tokenizer': '',
    'model': defaults('models', 'gemma', **model),
    'mesh': {'data': -1},
    'seed': 3,
    'steps': 36,
    'batch_size': 4,
    'microbatches': 2,
    'log_every': 1,
    'save_every': 3,
    'keep': 2,
    'max_bad_steps': 3,
    'verify_every': 5,
    'optimizer': defaults('system', 'optimizer', warmup_steps=2),
    'start': {'teacher': ''} if method == 'distill' else {},
  }
  if method in ('sft', 'distill'):
    config['recipe'] = defaults('recipes', method)
    config['source'] = {'name': 'tests.chaos.parts.text', 'path': str(text)}
  else:
    config['recipe'] = defaults('recipes', method, max_new_tokens=8)
    config['reward'] = {'name': 'tests.chaos.parts.reward'}
    config['source'] = {'name': 'tests.chaos.parts.prompts', 'path': str(text)}
  return configs.plain(config | changes)


class Program(NamedTuple):
  """One command, to be started with a workdir and a folder for its traces."""

  name: str
  words: tuple[str, ...]

  def start(self, workdir: Path, trace: Path) -> subprocess.Popen:
    trace.mkdir(exist_ok=True)
    return subprocess.Popen(
      [sys.executable, '-m', *self.words, f'--workdir={workdir}'],
      env=os.environ
      | {'XLA_FLAGS': '', 'PYTHONPATH': str(ROOT), 'CHAOS_TRACE': str(trace)},
      cwd=ROOT,
      stdout=subprocess.DEVNULL,
      stderr=open(trace / 'stderr.txt', 'a'),
    )

  def finish(self, workdir: Path, trace: Path) -> None:
    code = self.start(workdir, trace).wait(LIMIT_S)
    assert code == 0, (trace / 'stderr.txt').read_text()[-3000:]


def program(name: str, where: Path) -> Program:
  """The program of this name; its files are written below `where`."""
  text = write_text(where / 'text')
  if name == 'run':
    words = (f'--config={ROOT}/tests/chaos/graph.py', f'--config.text={text}')
    return Program(name, ('alignjax.cli.run', *words))
  file = where / f'{name}.json'
  file.write_text(json.dumps(settings(text, name)))
  return Program(name, ('alignjax.cli.train', f'--config={file}'))


def moments(name: str) -> list[tuple[str, str]]:
  """(kind, job) of the kills of a program: where they are aimed."""
  if name == 'run':
    return list(zip(('save', 'reward', 'term', 'begin'), GRAPH))
  online = name in ('jbond', 'warp')
  kinds = ['save', 'reward' if online else 'begin', 'term', 'step']
  return [(kind, '') for kind in kinds]


def kill(
  program: Program, workdir: Path, kind: str, job: str, rng: random.Random
) -> bool:
  """One life of a program. False if it came to its end unhurt."""
  trace = workdir.with_suffix('.trace')
  folder = workdir / job
  metrics, rewards = folder / 'metrics.jsonl', trace / 'reward.jsonl'
  lines = count(metrics)
  process = program.start(workdir, trace)
  wait = rng.random()

  def there() -> bool:
    if kind == 'save':
      return any((folder / 'checkpoints').glob('*.orbax-checkpoint-tmp'))
    if kind == 'reward':
      inside = rewards.exists() and rewards.read_text().endswith('"begin"\n')
      return inside and count(metrics) > lines
    if kind == 'begin':  # of the process: imports, restoring, compiling
      return folder.exists() and not time.sleep(2 * wait)
    return count(metrics) > lines and not time.sleep(0.3 * wait)

  deadline = time.monotonic() + LIMIT_S
  while process.poll() is None:
    assert time.monotonic() < deadline, (trace / 'stderr.txt').read_text()
    if there() and (kind not in ('save', 'reward') or _held(process, there)):
      process.send_signal(signal.SIGTERM if kind == 'term' else signal.SIGKILL)
      code = process.wait(LIMIT_S)
      said = (trace / 'stderr.txt').read_text()[-3000:]
      assert code in (-signal.SIGKILL, 75, 0), (code, said)
      return code != 0
    time.sleep(0.001)
  assert process.returncode == 0, (trace / 'stderr.txt').read_text()[-3000:]
  return False


def _held(process: subprocess.Popen, there) -> bool:
  """Whether the process that works, stopped, is still where it was seen."""
  pid = process.pid
  children = Path(f'/proc/{pid}/task/{pid}/children').read_text().split()
  # A runner's child is killed with it.
  pid = int(children[0]) if children else pid
  try:
    os.kill(pid, signal.SIGSTOP)
    time.sleep(0.01)
    if there():
      return True
    os.kill(pid, signal.SIGCONT)
  except ProcessLookupError:
    pass
  return False


def count(file: Path) -> int:
  return len(file.read_bytes().splitlines()) if file.exists() else 0


def same(a: Path, b: Path, jobs=('',)) -> None:
  """Metrics, weights and the order of data of two runs, bit for bit."""
  for job in jobs:
    x, y = a / job, b / job
    if (y / 'metrics.jsonl').exists():
      left, right = ((w / 'metrics.jsonl').read_bytes() for w in (x, y))
      assert left == right and left.count(b'\n') > 5
    models = sorted(p.parent.name for p in y.glob('model*/model.json'))
    assert models
    for model in models:
      sums = [
        json.loads((w / model / 'model.json').read_text())['checksums']
        for w in (x, y)
      ]
      assert sums[0] == sums[1] and sums[0]['policy']
  orders = [parts.order(w.with_suffix('.trace')) for w in (a, b)]
  assert orders[0] == orders[1] and len(orders[0]) > 30


def survive(name: str, where: Path, seed: int, kills: int) -> int:
  """Kills a program `kills` times and compares; returns how often it began.

  AssertionError for any bit that differs from the uninterrupted run.
  """
  what, rng = program(name, where), random.Random(f'{name} {seed}')
  jobs = GRAPH if name == 'run' else ('',)
  whole, killed = where / 'whole', where / 'killed'
  if not whole.with_suffix('.trace').exists():
    what.finish(whole, whole.with_suffix('.trace'))
  done = lives = 0
  while done < kills:
    for kind, job in moments(name)[: kills - done]:
      lives += 1
      done += kill(what, killed, kind, job, rng)
      if (killed / jobs[-1] / 'model').exists():
        break
    # One run has an end: the rest of the kills meet another one.
    if done < kills:
      finish_and_compare(what, killed, whole, jobs)
      shutil.rmtree(killed)
      shutil.rmtree(killed.with_suffix('.trace'))
  finish_and_compare(what, killed, whole, jobs)
  return lives


def finish_and_compare(what, killed, whole, jobs) -> None:
  what.finish(killed, killed.with_suffix('.trace'))
  same(killed, whole, jobs)
