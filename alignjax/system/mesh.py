"""Meshes, and path tables that say where every leaf lives on one.

A table maps leaf names (regex, first match wins, an unmatched leaf is an
error) to one mesh axis or None per dimension. Axes that the mesh does not have
count as None, so one table serves a laptop and a pod.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from alignjax.core import tree
from alignjax.core.types import UserError

AXES = ('data', 'fsdp', 'tensor', 'seq', 'expert')
Table = Sequence[tuple[str, tuple[str | None, ...]]]
REPLICATED: Table = (('.*', ()),)


def make(axes: Mapping[str, int]) -> Mesh:
  """A mesh over all devices; one axis may be -1 and takes what is left."""
  if unknown := [name for name in axes if name not in AXES]:
    raise UserError(f'mesh: no axis {unknown[0]!r}; known axes: {list(AXES)}')
  devices = jax.device_count()
  sizes = dict(axes) or {'data': -1}
  known = math.prod(size for size in sizes.values() if size != -1)
  free = [name for name, size in sizes.items() if size == -1]
  if len(free) > 1 or devices % known or (not free and known != devices):
    raise UserError(
      f'mesh: {dict(axes)} does not fill the {devices} devices present'
    )
  for name in free:
    sizes[name] = devices // known
  # Auto: the compiler propagates shardings from the few that we pin.
  return jax.make_mesh(
    tuple(sizes.values()),
    tuple(sizes),
    axis_types=(AxisType.Auto,) * len(sizes),
  )


def shardings(pytree: Any, table: Table, mesh: Mesh) -> Any:
  """NamedSharding for every leaf of a pytree of arrays or shapes.

  The table speaks of canonical names; leaves of stacked groups carry one more
  axis in front, which stays whole. Scalars are replicated.
  """
  canonical = tree.canonical_names(pytree)

  def leaf(name, x):
    if not x.shape:
      return NamedSharding(mesh, PartitionSpec())
    spec = tree.lookup(table, canonical[name][0], 'sharding table')
    if spec and len(spec) == len(x.shape) - 1:
      spec = (None, *spec)
    if spec and len(spec) != len(x.shape):
      raise UserError(
        f'sharding table: {name} has shape {x.shape} but its rule {spec}'
      )
    spec = tuple(axis if axis in mesh.shape else None for axis in spec)
    for size, axis in zip(x.shape, spec):
      if axis is not None and size % mesh.shape[axis]:
        raise UserError(
          f'mesh axis {axis} of size {mesh.shape[axis]} does not divide '
          f'{name} of shape {x.shape}'
        )
    return NamedSharding(mesh, PartitionSpec(*spec))

  return tree.map_named(leaf, pytree)


def rows(mesh: Mesh) -> NamedSharding:
  """Sharding of batch fields: B over the data-like axes."""
  axes = tuple(a for a in ('data', 'fsdp') if a in mesh.shape)
  return NamedSharding(mesh, PartitionSpec(axes or None))


def check_rows(mesh: Mesh, batch_size: int, microbatches: int) -> None:
  """UserError unless every microbatch fills the data axes evenly."""
  ways = math.prod(mesh.shape[a] for a in ('data', 'fsdp') if a in mesh.shape)
  if batch_size % (ways * microbatches):
    raise UserError(
      f'batch_size = {batch_size} is not a multiple of {microbatches} '
      f'microbatches x {ways} data shards'
    )
