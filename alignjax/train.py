"""The only training loop. It knows recipes, and no method.

Around the jitted step (`alignjax.step`): batches, stages, metrics, checkpoints,
signals. A run is resumed by starting it again, and continues
bit for bit: everything random is a function of (seed, step), and checkpoints
exist only between steps.
"""

import signal
import sys
from contextlib import contextmanager
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
  UserError,
)
from alignjax.step import make_step
from alignjax.system import checkpoint
from alignjax.system import mesh as meshes
from alignjax.system import metrics as numbers


class Schedule(NamedTuple):
  """How long a run goes on, and how often it does what.

  Attributes:
    steps: staged batches in all.
    seed: of parameters, prompts' order and every draw.
    microbatches: parts a batch is split into to save memory.
    log_every, save_every: in steps; the last step always does both.
    keep: checkpoints kept.
    max_bad_steps: skipped (non-finite) updates in a row that end the run.
  """

  steps: int
  seed: int = 0
  microbatches: int = 1
  log_every: int = 1
  save_every: int = 100
  keep: int = 2
  max_bad_steps: int = 5


def stage_batch(
  recipe: Recipe, state: TrainState, batch: Batch, seed: int
) -> Batch:
  """The batch after the recipe's stages, with the keys of this step."""
  key = jax.random.fold_in(jax.random.key(seed), state.step)
  bundle = {**state.params, **state.frozen}
  for i, stage in enumerate(recipe.stages):
    batch = stage(bundle, batch, jax.random.fold_in(key, i))
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
  fallback: bool = False,
) -> tuple[TrainState, bool]:
  """Runs `schedule`, continuing what `workdir` holds.

  Returns:
    (state, finished). Not finished: SIGINT or SIGTERM arrived; the state of
    the last whole step is saved.

  Raises:
    UserError: damaged checkpoint; too many non-finite updates in a row.
  """
  fixed = [role for role, follow in recipe.follow.items() if follow is None]
  checkpoints = checkpoint.manager(workdir / 'checkpoints', schedule.keep)
  state = _resume(checkpoints, state, fixed, source, workdir, fallback)
  begin = int(state.step)
  step = _compiled(recipe, tx, schedule, state)
  place = None if mesh is None else meshes.rows(mesh)
  batches = source.batches(begin)

  with (
    _signals() as stop,
    numbers.progress(label, schedule.steps, begin) as advance,
  ):
    log = numbers.recorder(
      workdir,
      advance,
      last=schedule.steps,
      log_every=schedule.log_every,
      max_bad_steps=schedule.max_bad_steps,
    )
    next(log)
    for k in range(begin, schedule.steps):
      batch = jax.device_put(next(batches), place)
      batch = stage_batch(recipe, state, batch, schedule.seed)
      state, metrics = step(state, batch)
      source.tell(batch)
      log.send((k + 1, metrics, _tokens(batch)))
      last = k + 1 == schedule.steps or bool(stop)
      if last or (k + 1) % schedule.save_every == 0:
        log.send(None)
        _save(checkpoints, state, fixed, source)
      if stop:
        break
    log.close()
  _finish(checkpoints)
  return state, int(state.step) == schedule.steps


def _compiled(recipe, tx, schedule, state):
  """The jitted step: state donated, and left where it was."""
  step = make_step(
    recipe, tx, seed=schedule.seed, microbatches=schedule.microbatches
  )
  shardings = jax.tree.map(lambda x: x.sharding, state)
  return jax.jit(step, out_shardings=(shardings, None), donate_argnums=0)


def _resume(checkpoints, state, fixed, source, workdir, fallback):
  """What the workdir holds, or `state`; logs are cut back to it."""
  restored = checkpoint.restore(
    checkpoints, state, fixed=fixed, fallback=fallback
  )
  if restored is not None:
    state, source_state = restored
    source.restore(source_state)
  for name in ('metrics.jsonl', 'timing.jsonl'):
    numbers.cut(workdir / name, int(state.step))
  return state


def _save(checkpoints, state, fixed, source) -> None:
  try:
    checkpoint.save(checkpoints, state, fixed=fixed, source=source.state())
  except Exception as error:  # of this write or an earlier asynchronous one
    raise _not_saved(checkpoints, error) from error


def _finish(checkpoints) -> None:
  try:
    checkpoints.wait_until_finished()
  except Exception as error:  # of an asynchronous write
    raise _not_saved(checkpoints, error) from error
  checkpoints.close()


def _not_saved(checkpoints, error) -> UserError:
  lines = str(error).strip().splitlines() or [type(error).__name__]
  return UserError(
    f'could not write a checkpoint to {checkpoints.directory} ({lines[0]}); '
    f'the ones before it are whole: {sorted(checkpoints.all_steps())}'
  )


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
