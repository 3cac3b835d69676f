"""Checkpoints of a TrainState: atomic, asynchronous, verified by checksum.

Orbax's CheckpointManager does the files. What is ours: which leaves are
written (roles that never move are not), a format version, and a checksum per
leaf, so that a damaged checkpoint is noticed before it is trained on.
"""

import shutil
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from alignjax.core import tree
from alignjax.core.types import TrainState, UserError

FORMAT = 1


def manager(directory: Path, keep: int) -> ocp.CheckpointManager:
  """The checkpoints below `directory`; the `keep` newest stay."""
  options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
  return ocp.CheckpointManager(directory.absolute(), options=options)


def save(
  checkpoints: ocp.CheckpointManager,
  state: TrainState,
  *,
  fixed: Iterable[str] = (),
  source: dict[str, Any],
) -> None:
  """Starts writing `state` without the roles in `fixed`; returns early.

  Raises OSError when the disk has no room for it, and what an earlier
  asynchronous write met.
  """
  # A copy: the step donates these buffers while the write still reads them.
  leaves = {
    name: np.array(leaf, copy=True)
    for name, leaf in tree.named(_moving(state, fixed)).items()
  }
  _check_space(checkpoints.directory, sum(x.nbytes for x in leaves.values()))
  meta = {
    'format': FORMAT,
    'source': source,
    'checksums': {name: _checksum(leaf) for name, leaf in leaves.items()},
  }
  checkpoints.save(
    int(state.step),
    args=ocp.args.Composite(
      state=ocp.args.StandardSave(tree.nested(leaves)),
      meta=ocp.args.JsonSave(meta),
    ),
    force=True,
  )


def _check_space(directory, size: int) -> None:
  """OSError before anything is written, rather than half way."""
  free = shutil.disk_usage(directory).free
  if free < size:
    raise OSError(f'{size:,} bytes are needed and {free:,} are free')


def restore(
  checkpoints: ocp.CheckpointManager,
  like: TrainState,
  *,
  fixed: Iterable[str] = (),
  fallback: bool = False,
) -> tuple[TrainState, dict[str, Any]] | None:
  """(state, source state) of the newest checkpoint, None if there is none.

  Leaves keep the shardings of `like`, whose fixed roles are carried over.

  Raises:
    UserError: the newest checkpoint is damaged or of another model. With
      `fallback` a damaged one is deleted and the one before is tried.
  """
  for step in sorted(checkpoints.all_steps(), reverse=True):
    try:
      return _restore_step(checkpoints, step, like, fixed)
    except _Damaged as damage:
      where = f'checkpoint {step} in {checkpoints.directory}'
      if not fallback:
        raise UserError(
          f'{where} is damaged ({damage}); run again with --fallback to '
          'continue from the one before it'
        ) from None
      print(f'{where} is damaged ({damage}); trying the one before it')
      checkpoints.delete(step)
  return None


class _Damaged(Exception):
  pass


def _restore_step(checkpoints, step, like, fixed):
  moving = _moving(like, fixed)
  expected = tree.named(moving)
  abstract = tree.nested(
    {
      name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
      for name, x in expected.items()
    }
  )
  try:
    meta = checkpoints.restore(
      step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())
    )['meta']
  except Exception as error:  # whatever a library meets in a broken file
    raise _Damaged(_first_line(error)) from error
  if meta.get('format') != FORMAT:
    raise UserError(
      f'checkpoint {step} in {checkpoints.directory} has format '
      f'{meta.get("format")}, expected {FORMAT}'
    )
  if set(meta['checksums']) != set(expected):
    odd = sorted(set(meta['checksums']) ^ set(expected))
    raise UserError(
      f'checkpoint {step} in {checkpoints.directory} is of another model: '
      f'leaf {odd[0]} and {len(odd) - 1} others do not match'
    )
  try:
    restored = checkpoints.restore(
      step,
      args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract)),
    )['state']
  except Exception as error:  # as above
    raise _Damaged(_first_line(error)) from error
  leaves = tree.named(restored)
  for name, leaf in leaves.items():
    if _checksum(np.asarray(leaf)) != meta['checksums'][name]:
      raise _Damaged(f'the checksum of {name} does not match')
  moving = tree.map_named(lambda name, _: leaves[name], moving)
  kept = {role: like.frozen[role] for role in fixed}
  frozen = {**moving.frozen, **kept}
  state = moving.replace(frozen={role: frozen[role] for role in like.frozen})
  return state, meta['source']


def _moving(state: TrainState, fixed: Iterable[str]) -> TrainState:
  fixed = set(fixed)
  return state.replace(
    frozen={k: v for k, v in state.frozen.items() if k not in fixed}
  )


def _checksum(leaf: np.ndarray) -> str:
  return f'{zlib.crc32(np.ascontiguousarray(leaf).tobytes()):08x}'


def _first_line(error: Exception) -> str:
  return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
