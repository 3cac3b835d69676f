"""Checkpoints of a TrainState: sharded, asynchronous, atomic, verified.

Orbax does the files: every process writes the shards that it holds, into a
folder that gets its name when all is there. What is ours: which leaves are
written (roles that never move are not), a format version, and a fingerprint
per leaf, computed on the devices before the write and again after a restore, on
whatever mesh that was. It gathers nothing and keeps no copy of its own: the
step donates the buffers that are being written, but on a CPU Orbax holds views
of them, which the runtime respects (that one step then fills new buffers), and
elsewhere the transfer to the host, which `save` waits for, is the copy.
"""

import json
import shutil
import sys
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from alignjax.core import naming, tree
from alignjax.core.errors import UserError
from alignjax.core.types import TrainState
from alignjax.system import fingerprint, hosts

FORMAT = 2
_SHOWN = 3  # leaves named in an error


def manager(directory: Path, keep: int) -> ocp.CheckpointManager:
  """The checkpoints below `directory`; the `keep` newest stay."""
  options = ocp.CheckpointManagerOptions(
    max_to_keep=keep, create=True, cleanup_tmp_directories=True
  )
  return ocp.CheckpointManager(directory.absolute(), options=options)


def reader(directory: Path) -> ocp.CheckpointManager:
  """The checkpoints below `directory`, of a run that may be going on."""
  if not directory.is_dir():
    raise UserError(f'no checkpoints at {directory}')
  options = ocp.CheckpointManagerOptions(read_only=True)
  return ocp.CheckpointManager(directory.absolute(), options=options)


def save(
  checkpoints: ocp.CheckpointManager,
  state: TrainState,
  *,
  fixed: Iterable[str] = (),
  source: dict[str, Any],
) -> None:
  """Starts writing `state` without the roles in `fixed`; returns early.

  To be called by all processes. Raises OSError when the disk has no room for
  it, and what an earlier asynchronous write met.
  """
  leaves = tree.named(_moving(state, fixed))
  _check_space(checkpoints.directory, sum(x.nbytes for x in leaves.values()))
  prints = fingerprint.of(leaves)
  facts = {
    'source': source,
    'leaves': {name: [_kind(x), prints[name]] for name, x in leaves.items()},
  }
  meta = {'format': FORMAT, 'facts': facts, 'checksum': _checksum(facts)}
  checkpoints.save(
    int(state.step),
    args=ocp.args.Composite(
      state=ocp.args.StandardSave(naming.nested(leaves)),
      meta=ocp.args.JsonSave(meta),
    ),
    force=True,
  )


def _check_space(directory: epath.Path, size: int) -> None:
  """OSError before anything is written, rather than half way."""
  if '://' in str(directory):
    return
  free = shutil.disk_usage(directory).free
  full = free < size
  if jax.process_count() > 1:  # all stop if one has no room
    full = bool(np.any(multihost_utils.process_allgather(np.bool_(full))))
  if full:
    raise OSError(f'{size:,} bytes are needed and {free:,} are free')


def restore(
  checkpoints: ocp.CheckpointManager,
  like: TrainState,
  *,
  fixed: Iterable[str] = (),
) -> tuple[TrainState, dict[str, Any]] | None:
  """(state, source state) of the newest whole checkpoint, None without any.

  Leaves get the shardings of `like`, however they were laid out when saved;
  its fixed roles are carried over. Damaged checkpoints are named on stderr,
  and removed once one before them is found whole.

  Raises:
    UserError: every checkpoint is damaged, or the newest one is of another
      model.
  """
  damaged: dict[int, str] = {}
  for step in sorted(checkpoints.all_steps(), reverse=True):
    try:
      found = restore_step(checkpoints, step, like, fixed=fixed)
    except Damaged as damage:
      damaged[step] = str(damage)
      continue
    for other, why in damaged.items():
      if jax.process_index() == 0:
        print(
          f'checkpoint {other} in {checkpoints.directory} is damaged ({why}); '
          f'the run continues from checkpoint {step}',
          file=sys.stderr,
          flush=True,
        )
      checkpoints.delete(other)
    return found
  if damaged:
    which = '; '.join(f'{step}: {why}' for step, why in damaged.items())
    raise UserError(
      f'every checkpoint in {checkpoints.directory} is damaged ({which}); '
      'remove that folder to begin again'
    )
  return None


class Damaged(Exception):
  """A checkpoint that cannot be read, or is not what was saved."""


def restore_step(
  checkpoints: ocp.CheckpointManager,
  step: int,
  like: TrainState,
  *,
  fixed: Iterable[str] = (),
) -> tuple[TrainState, dict[str, Any]]:
  """(state, source state) of one checkpoint; see `restore`.

  Raises:
    Damaged: in every process, if one of them finds it so.
    UserError: it is of another model or another format.
  """
  where = f'checkpoint {step} in {checkpoints.directory}'
  folder = checkpoints.directory / str(step)
  expected = tree.named(_moving(like, fixed))
  try:
    facts = _facts(folder, where)
    damage = None
  except Damaged as error:
    facts, damage = {}, error
  _agree(damage)
  _check_model(facts['leaves'], expected, where)
  leaves = {}
  try:
    leaves = _read(folder, expected)
  except Exception as error:  # whatever a library meets in a broken file
    if hosts.lost(error):
      raise
    damage = Damaged(_first_line(error))
  _agree(damage)
  for name, found in fingerprint.of(leaves).items():
    if found != facts['leaves'][name][1]:
      raise Damaged(f'the fingerprint of {name} does not match')
  moving = tree.map_named(lambda name, _: leaves[name], _moving(like, fixed))
  kept = {role: like.frozen[role] for role in fixed}
  frozen = {**moving.frozen, **kept}
  state = moving.replace(frozen={role: frozen[role] for role in like.frozen})
  return state, facts['source']


def _facts(folder: epath.Path, where: str) -> dict[str, Any]:
  """What was recorded beside the leaves."""
  try:
    meta = json.loads((folder / 'meta' / 'metadata').read_text())
    found = meta['format']
    whole = found != FORMAT or meta['checksum'] == _checksum(meta['facts'])
  except Exception as error:  # missing, cut short, or not what we write
    raise Damaged(f'its metadata: {_first_line(error)}') from error
  if not whole:
    raise Damaged('the checksum of its metadata does not match')
  if found != FORMAT:
    raise UserError(f'{where} has format {found}, expected {FORMAT}')
  return meta['facts']


def _read(folder: epath.Path, expected: Mapping[str, Any]) -> dict[str, Any]:
  """Leaves by name, placed as `expected`; each process reads its shards.

  The handler itself: the manager's barrier would keep the others waiting for a
  process that has met a broken file.
  """
  abstract = naming.nested(
    {
      name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
      for name, x in expected.items()
    }
  )
  restored = ocp.StandardCheckpointHandler().restore(
    folder / 'state', args=ocp.args.StandardRestore(abstract)
  )
  return jax.block_until_ready(tree.named(restored))


def _agree(damage: Damaged | None) -> None:
  """Raises in every process what any of them has met."""
  some = damage is not None
  if jax.process_count() > 1:
    some = bool(np.any(multihost_utils.process_allgather(np.bool_(some))))
  if some:
    raise damage or Damaged('another process cannot read it')


def _check_model(recorded, expected, where: str) -> None:
  """UserError naming leaves and shapes unless they are the same."""
  here = {name: _kind(x) for name, x in expected.items()}
  there = {name: kind for name, (kind, _) in recorded.items()}
  names = [n for n in {**here, **there} if here.get(n) != there.get(n)]
  if not names:
    return
  said = [
    f'{n} is {there.get(n, "absent")}, expected {here.get(n, "no such leaf")}'
    for n in names[:_SHOWN]
  ]
  more = f'; and {len(names) - _SHOWN} more' if len(names) > _SHOWN else ''
  raise UserError(f'{where} is of another model: {"; ".join(said)}{more}')


def _kind(x: Any) -> str:
  """'float32[8,16]'."""
  return f'{np.dtype(x.dtype).name}[{",".join(map(str, x.shape))}]'


def _moving(state: TrainState, fixed: Iterable[str]) -> TrainState:
  fixed = set(fixed)
  return state.replace(
    frozen={k: v for k, v in state.frozen.items() if k not in fixed}
  )


def _checksum(facts: Any) -> str:
  return f'{zlib.crc32(json.dumps(facts, sort_keys=True).encode()):08x}'


def _first_line(error: Exception) -> str:
  return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
