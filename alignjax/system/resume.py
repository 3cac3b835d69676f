"""What a run leaves and finds in its workdir: saved, resumed, cut back.

Between the loop and the files: a checkpoint and the logs that belong to it are
one thing here. What a checkpoint is, and what a row says, is known elsewhere.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from alignjax.core.errors import UserError
from alignjax.core.types import Source, TrainState
from alignjax.system import checkpoint, hosts, ledger, metrics


def resume(
  checkpoints: ocp.CheckpointManager,
  state: TrainState,
  fixed: Iterable[str],
  source: Source,
  workdir: Path,
) -> TrainState:
  """What the workdir holds, or `state`; logs are cut back to it.

  Raises UserError: see `checkpoint.restore`.
  """
  restored = checkpoint.restore(checkpoints, state, fixed=fixed)
  if restored is not None:
    state, source_state = restored
    source.restore(source_state)
  metrics.cut(workdir / 'metrics.jsonl', int(state.step))
  metrics.cut(workdir / 'timing.jsonl', int(state.step), ledger.lost)
  return state


def save(
  checkpoints: ocp.CheckpointManager,
  state: TrainState,
  fixed: Iterable[str],
  source_state: dict[str, Any],
) -> None:
  """Starts a checkpoint. Raises UserError for this or the one before it.

  A host that is lost meanwhile is no matter of disks: its error goes through.
  """
  try:
    checkpoint.save(checkpoints, state, fixed=fixed, source=source_state)
  except Exception as error:  # of this write or an earlier asynchronous one
    if hosts.lost(error):
      raise
    raise _not_saved(checkpoints, error) from error


def finish(checkpoints: ocp.CheckpointManager) -> None:
  """Waits for the last checkpoint. Raises UserError if it failed."""
  try:
    checkpoints.wait_until_finished()
  except Exception as error:  # of an asynchronous write
    if hosts.lost(error):
      raise
    raise _not_saved(checkpoints, error) from error
  checkpoints.close()


@contextmanager
def finishing(checkpoints: ocp.CheckpointManager) -> Iterator[None]:
  """An error inside the block does not cut short the write that goes on."""
  try:
    yield
  except Exception as error:
    # A write that another process has left would never end.
    if not hosts.lost(error):
      with suppress(Exception):  # the first error is the one to tell
        checkpoints.wait_until_finished()
    raise


def _not_saved(checkpoints, error: Exception) -> UserError:
  lines = str(error).strip().splitlines() or [type(error).__name__]
  return UserError(
    f'could not write a checkpoint to {checkpoints.directory} ({lines[0]}); '
    f'the ones before it are whole: {sorted(checkpoints.all_steps())}'
  )
