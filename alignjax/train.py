"""The only training loop. It knows recipes, and no method.

Around the jitted step (`alignjax.step`): batches, stages, metrics, checkpoints,
signals. A run is resumed by starting it again, and continues
bit for bit: everything random is a function of (seed, step), and checkpoints
exist only between steps.
"""

import signal
import sys
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import Mesh

from alignjax.core.types import (
  Batch,
  Recipe,
  Source,
  TrainState,
)
from alignjax.step import make_step
from alignjax.system import (
  checkpoint,
  corruption,
  hosts,
  ledger,
  prefetch,
  resume,
)
from alignjax.system import mesh as meshes
from alignjax.system import metrics as numbers
from alignjax.system.progress import progress
from alignjax.system.rows import to_mesh


class Schedule(NamedTuple):
  """How long a run goes on, and how often it does what.

  Attributes:
    steps: staged batches in all.
    seed: of parameters, prompts' order and every draw.
    microbatches: parts a batch is split into to save memory.
    log_every, save_every: in steps; the last step always does both.
    keep: checkpoints kept.
    max_bad_steps: skipped (non-finite) updates in a row that end the run.
    verify_every: in steps; gradients are computed twice and compared; 0: never.
  """

  steps: int
  seed: int = 0
  microbatches: int = 1
  log_every: int = 1
  save_every: int = 100
  keep: int = 2
  max_bad_steps: int = 5
  verify_every: int = 0


def stage_batch(
  recipe: Recipe, state: TrainState, batch: Batch, seed: int
) -> Batch:
  """The batch after the recipe's stages, with the keys of this step."""
  if not recipe.stages:
    return batch
  key = jax.random.fold_in(jax.random.key(seed), state.step)
  bundle = {**state.params, **state.frozen}
  for i, stage in enumerate(recipe.stages):
    batch = ledger.timed(stage)(bundle, batch, jax.random.fold_in(key, i))
  return batch


def train(
  recipe: Recipe,
  tx: optax.GradientTransformation,
  source: Source,
  state: TrainState,
  schedule: Schedule,
  *,
  workdir: Path,
  label: str = 'train',
  mesh: Mesh | None = None,
  started: float | None = None,
) -> tuple[TrainState, bool]:
  """Runs `schedule`, continuing what `workdir` holds.

  `started` (of time.monotonic) is when the ledger's start-up began.

  Returns:
    (state, finished). Not finished: SIGINT or SIGTERM arrived; the state of
    the last whole step is saved.

  Raises:
    UserError: no checkpoint is whole; too many non-finite updates in a row;
      gradients that do not repeat.
  """
  with ledger.keep(started) as book, meshes.current(mesh):
    return _train(
      recipe, tx, source, state, schedule, book, workdir, label, mesh
    )


def _train(recipe, tx, source, state, schedule, book, workdir, label, mesh):
  fixed = [role for role, follow in recipe.follow.items() if follow is None]
  checkpoints = checkpoint.manager(workdir / 'checkpoints', schedule.keep)
  state = resume.resume(checkpoints, state, fixed, source, workdir)
  begin = int(state.step)
  step = compiled(recipe, tx, schedule, state)
  verify = corruption.check(
    recipe, seed=schedule.seed, microbatches=schedule.microbatches
  )
  place = None if mesh is None else meshes.rows(mesh)
  batches = prefetch.ahead(
    source, begin, schedule.steps, lambda batch: to_mesh(batch, place)
  )

  with (
    _signals() as stop,
    progress(label, schedule.steps, begin) as advance,
    closing(batches),
    resume.finishing(checkpoints),
  ):
    log = numbers.recorder(
      workdir,
      advance,
      book=book,
      last=schedule.steps,
      log_every=schedule.log_every,
      max_bad_steps=schedule.max_bad_steps,
    )
    next(log)
    stops = hosts.agreement()
    book.turn('other')
    for k in range(begin, schedule.steps):
      with book.phase('data'):
        batch, source_state = next(batches)
      batch = stage_batch(recipe, state, batch, schedule.seed)
      if schedule.verify_every and (k + 1) % schedule.verify_every == 0:
        verify(state, batch)
      with book.phase('step'):
        state, metrics = step(state, batch)
        book.watch('step', metrics)
      source.tell(batch)
      log.send((k + 1, metrics, _tokens(batch)))
      stopping = stops(k + 1, bool(stop))
      last = k + 1 == schedule.steps or stopping
      if last or (k + 1) % schedule.save_every == 0:
        log.send(None)
        with book.phase('checkpoint'):
          resume.save(checkpoints, state, fixed, source_state())
      if stopping:
        break
    log.close()
  with book.phase('checkpoint'):
    resume.finish(checkpoints)
  done = int(state.step)
  if done > begin:
    timing = workdir / 'timing.jsonl'
    rows = numbers.read(timing)
    numbers.append(timing, ledger.closing(rows, done, book.take()))
  return state, done == schedule.steps


def compiled(recipe, tx, schedule, state):
  """The jitted step: state donated, and left where it was."""
  step = make_step(
    recipe, tx, seed=schedule.seed, microbatches=schedule.microbatches
  )
  shardings = jax.tree.map(lambda x: x.sharding, state)
  return jax.jit(step, out_shardings=(shardings, None), donate_argnums=0)


def _tokens(batch: Batch) -> Any:
  """Tokens a step handles: sampled ones, or all of a plain sequence."""
  return batch['mask'].sum() if 'mask' in batch else batch['tokens'].size


@contextmanager
def _signals():
  """A list that fills when SIGINT or SIGTERM arrives; the step is finished."""
  seen: list[int] = []

  def note(number, frame):
    del frame
    if not seen:
      print('stopping after this step', file=sys.stderr, flush=True)
    seen.append(number)

  old = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
  try:
    yield seen
  finally:
    for number, handler in old.items():
      signal.signal(number, handler)
