"""What the loop adds to its jitted step, and what a checkpoint costs.

  python tests/bench/loop.py --pairs 3 --rows 2 --length 64

The 54.5 M-parameter Gemma 2 shape of `peers.py`, SFT, on one core. In one
process the same jitted step runs alone, in `train.train`, and in `train.train`
with one checkpoint on the way; they take turns. What is compared is CPU-seconds
per step (of all threads, so that work behind the step is counted, too), which
other work on the machine disturbs least; wall-clock ratios stand beside it. The
first steps of each turn, with tracing and compilation, and the last checkpoint
are left out.

With --tiny the model is so small that the difference is the loop alone, in
milliseconds per step, whatever the step: below the noise of the large shape.

Targets: the loop adds under 2%; a checkpoint every 100 steps costs under 5%.

  python tests/bench/loop.py --overlap --cores 2

Rollout and a slow host reward, first one after the other, then on four chunks:
the wall time should come close to the larger of the two.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import sides

WARM = 3  # steps of a turn that are not counted


def tokens_source(rows: int, length: int, marks: list):
  """Constant batches; `marks` gets the clock whenever one is drawn."""
  import numpy as np

  from alignjax.data.sources import Rows

  class Marked(Rows):
    def batch(self, k):
      marks.append(sides.clock())
      return super().batch(k)

  # Enough rows for several epochs not to come: grain's order of a handful is
  # much dearer than that of a real source.
  size = 4096
  fields = {
    'tokens': np.array(sides.ids(size, length), np.int32),
    'loss_mask': np.ones((size, length), bool),
    'segment': np.ones((size, length), np.int32),
    'position': np.tile(np.arange(length, dtype=np.int32), (size, 1)),
  }
  return Marked(fields, [{}] * size, rows, 0)


def per_step(marks) -> list[float]:
  """(CPU, wall) seconds per step between the marks."""
  return [
    (b - a) / (len(marks) - 1) for a, b in zip(marks[0], marks[-1], strict=True)
  ]


def turns(args) -> None:
  """Prints ratios of the three ways to run the same step."""
  import jax

  from alignjax import train
  from alignjax.recipes.sft import sft
  from alignjax.step import init_state
  from alignjax.system.optimizer import optimizer

  recipe = sft(sides.ours_model())
  tx = optimizer(1000, lr=1e-4, weight_decay=0.01)
  count = WARM + args.steps
  schedule = train.Schedule(steps=count + 1, save_every=10**9)
  state = init_state(recipe, tx, 0)
  step = train.compiled(recipe, tx, schedule, state)
  batch = jax.device_put(tokens_source(args.rows, args.length, []).batch(0))

  def bare():
    state, marks = init_state(recipe, tx, 0), []
    for k in range(count + 1):
      if k >= WARM:
        jax.block_until_ready(state)
        marks.append(sides.clock())
      state, _ = step(state, batch)
    jax.block_until_ready(state)
    return marks

  def looped(save_every):
    marks, state = [], init_state(recipe, tx, 0)
    with tempfile.TemporaryDirectory() as folder:
      train.train(
        recipe,
        tx,
        tokens_source(args.rows, args.length, marks),
        state,
        schedule._replace(save_every=save_every),
        workdir=Path(folder),
      )
    return marks[WARM:]

  ways = {
    'bare': bare,
    'loop': lambda: looped(10**9),
    'saving': lambda: looped(WARM + 2),
  }
  seen = {name: [] for name in ways}
  for pair in range(args.pairs):
    for name, way in ways.items():
      seen[name].append(per_step(way()))
      cpu, wall = seen[name][-1]
      print(f'{pair} {name:7} CPU {cpu:.3f} s, wall {wall:.3f} s', flush=True)
  for i, clock in enumerate(('CPU', 'wall')):
    bare_s, loop_s = (
      statistics.median(x[i] for x in seen[name]) for name in ('bare', 'loop')
    )
    pairs = list(zip(seen['bare'], seen['loop'], strict=True))
    added = statistics.median(b[i] / a[i] - 1 for a, b in pairs)
    more = statistics.median(b[i] - a[i] for a, b in pairs)
    save = args.steps * statistics.median(
      b[i] - a[i] for a, b in zip(seen['loop'], seen['saving'], strict=True)
    )
    print(
      f'{clock}: a step takes {bare_s:.3f} s; the loop adds {added:+.2%} '
      f'({1000 * more:+.2f} ms); a '
      f'checkpoint costs {save:.2f} s, {save / (100 * loop_s):.2%} of 100 steps'
    )


def overlapped(args) -> None:
  """Prints the wall time of rollout and score, in a row and overlapped."""
  import jax
  import jax.numpy as jnp
  import numpy as np

  from alignjax.stages.overlap import overlap
  from alignjax.stages.rollout import rollout
  from alignjax.stages.score import score

  model = sides.ours_model()
  bundle = {'policy': jax.jit(model.init)(jax.random.key(0))}
  batch = {
    'id': jnp.arange(args.prompts, dtype=jnp.int32),
    'prompt': jnp.asarray(sides.ids(args.prompts, 32), jnp.int32),
  }
  draw = rollout(
    [(model.policy('policy'), 1)], max_new_tokens=args.new, stop=(), pad=0
  )

  def reward(seconds):
    def slow(bundle, batch, key):
      del bundle, key
      rows = np.asarray(batch['response'])
      until = time.thread_time() + seconds * len(rows) / args.prompts
      while args.busy and time.thread_time() < until:
        pass
      if not args.busy:
        time.sleep(seconds * len(rows) / args.prompts)
      return np.zeros((*rows.shape[:2], 1), np.float32)

    return slow

  def wall(chunks, seconds):
    stage = overlap(draw, score(reward(seconds)), chunks=chunks)
    jax.block_until_ready(stage(bundle, batch, jax.random.key(0)))
    times = []
    for _ in range(args.pairs):
      begun = time.perf_counter()
      jax.block_until_ready(stage(bundle, batch, jax.random.key(1)))
      times.append(time.perf_counter() - begun)
    return statistics.median(times)

  decode = {chunks: wall(chunks, 0.0) for chunks in (1, args.chunks)}
  print(f'decode alone: {decode} s by chunks')
  for share in (0.5, 1.0):
    seconds = share * decode[1]
    row, both = wall(1, seconds), wall(args.chunks, seconds)
    print(
      f'reward of {seconds:.2f} s: in a row {row:.2f} s, overlapped '
      f'{both:.2f} s; sum {decode[1] + seconds:.2f} s, larger '
      f'{max(decode[args.chunks], seconds):.2f} s'
    )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  for name, default in (
    ('pairs', 3),
    ('steps', 8),
    ('rows', 2),
    ('length', 64),
    ('cores', 1),
    ('prompts', 16),
    ('new', 48),
    ('chunks', 4),
  ):
    parser.add_argument(f'--{name}', type=int, default=default)
  parser.add_argument('--overlap', action='store_true')
  parser.add_argument('--tiny', action='store_true')
  parser.add_argument(
    '--busy', action='store_true', help='the reward computes, not waits'
  )
  args = parser.parse_args()
  if args.tiny:
    sides.SHAPE |= dict(width=16, hidden=16, layers=2, head_dim=8)
  os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores])
  os.environ['JAX_PLATFORMS'] = 'cpu'
  with tempfile.TemporaryDirectory() as cache:
    os.environ['JAX_COMPILATION_CACHE_DIR'] = cache
    os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'
    overlapped(args) if args.overlap else turns(args)


if __name__ == '__main__':
  main()
