"""A past step once more, to see whether it gives the same numbers.

From the nearest kept checkpoint before it, through the same stages and the same
compiled step as the loop. It writes nothing, and judges nothing: a difference
means other hardware, other software, or an error of either.
"""

import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import Mesh

from alignjax import train
from alignjax.core.errors import UserError
from alignjax.core.types import Recipe, Source, TrainState
from alignjax.system import checkpoint, metrics
from alignjax.system import mesh as meshes
from alignjax.system.rows import to_mesh


class Replayed(NamedTuple):
  """What came out.

  Attributes:
    origin: step of the checkpoint it began at.
    row: the step's metrics now, as metrics.jsonl would have them.
    logged: the row that is there; None if that step was not logged.
  """

  origin: int
  row: dict[str, Any]
  logged: dict[str, Any] | None

  @property
  def differences(self) -> list[str]:
    """'nll 1.25 -> 1.5' for each number that is not the logged one."""
    old = self.logged or {}
    names = sorted({*old, *self.row})
    return [
      f'{name} {old.get(name, "absent")} -> {self.row.get(name, "absent")}'
      for name in names
      if old.get(name) != self.row.get(name)
    ]


def replay(
  recipe: Recipe,
  tx: optax.GradientTransformation,
  source: Source,
  state: TrainState,
  schedule: train.Schedule,
  *,
  workdir: Path,
  step: int,
  mesh: Mesh | None = None,
) -> Replayed:
  """Makes step `step` (1 is the first) of the run in `workdir` again.

  Raises UserError if that step was never made, or no checkpoint before it is
  kept and whole.
  """
  rows = metrics.read(workdir / 'metrics.jsonl')
  last = max((row['step'] for row in rows), default=0)
  if not 1 <= step <= last:
    raise UserError(
      f'--replay: found {step}, expected a step from 1 to {last}, the last in '
      f'{workdir / "metrics.jsonl"}'
    )
  state, source_state = _before(recipe, state, workdir, step)
  source.restore(source_state)
  origin = int(state.step)
  place = None if mesh is None else meshes.rows(mesh)
  batches = source.batches(origin)
  found = {}
  with meshes.current(mesh):
    update = train.compiled(recipe, tx, schedule, state)
    for _ in range(origin, step):
      batch = to_mesh(next(batches), place)
      batch = train.stage_batch(recipe, state, batch, schedule.seed)
      state, found = update(state, batch)
      source.tell(batch)
  row = {name: metric.number for name, metric in jax.device_get(found).items()}
  logged = [old for old in rows if old['step'] == step]
  return Replayed(
    origin,
    metrics.plain({'step': step, **row}),
    logged[0] if logged else None,
  )


def _before(recipe, state, workdir: Path, step: int):
  """The newest whole checkpoint from which `step` can be made."""
  fixed = [role for role, follow in recipe.follow.items() if follow is None]
  checkpoints = checkpoint.reader(workdir / 'checkpoints')
  kept = sorted(checkpoints.all_steps())
  for candidate in reversed([origin for origin in kept if origin < step]):
    try:
      return checkpoint.restore_step(checkpoints, candidate, state, fixed=fixed)
    except checkpoint.Damaged as damage:
      print(
        f'checkpoint {candidate} in {checkpoints.directory} is damaged '
        f'({damage})',
        file=sys.stderr,
      )
  raise UserError(
    f'--replay: no checkpoint before step {step} remains in '
    f'{checkpoints.directory}; kept are {kept}'
  )
