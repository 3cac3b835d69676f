"""Meshes, and path tables that say where every leaf lives on one.

A table maps leaf names (regex, first match wins, an unmatched leaf is an
error) to mesh axes per dimension: one, several, or None. Axes that the mesh
does not have count as None, so one table serves a laptop and a pod.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from alignjax.core import naming, placement, tree
from alignjax.core.errors import UserError

AXES = ('data', 'fsdp', 'tensor', 'seq', 'expert')
Table = Sequence[tuple[str, placement.Spec]]
REPLICATED: Table = (('.*', ()),)


def make(axes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
  """A mesh over `devices` (all by default); one axis may be -1: what is left.

  Slices of a multi-slice system, whose network is slow, lie along the first
  axis, which must be a multiple of their number.
  """
  if unknown := [name for name in axes if name not in AXES]:
    raise UserError(f'mesh: no axis {unknown[0]!r}; known axes: {list(AXES)}')
  devices = list(jax.devices() if devices is None else devices)
  sizes = dict(axes) or {'data': -1}
  known = math.prod(size for size in sizes.values() if size != -1)
  free = [name for name, size in sizes.items() if size == -1]
  fits = known > 0 and len(devices) % known == 0
  if len(free) > 1 or not fits or (not free and known != len(devices)):
    raise UserError(
      f'mesh: {dict(axes)} does not fill the {len(devices)} devices present'
    )
  for name in free:
    sizes[name] = len(devices) // known
  # Auto: the compiler propagates shardings from the few that we pin.
  types = (AxisType.Auto,) * len(sizes)
  return Mesh(_arranged(sizes, devices), tuple(sizes), axis_types=types)


def current(mesh: Mesh | None) -> Any:
  """A context in which `core.placement` sees `mesh`."""
  return nullcontext() if mesh is None else jax.set_mesh(mesh)


def _arranged(sizes: Mapping[str, int], devices: list[Any]) -> np.ndarray:
  """Devices along the axes, near ones where most is sent."""
  shape = tuple(sizes.values())
  slices = len({getattr(d, 'slice_index', 0) or 0 for d in devices})
  if devices[0].platform != 'tpu':
    return np.array(devices).reshape(shape)
  if slices == 1:
    return mesh_utils.create_device_mesh(
      shape, devices, allow_split_physical_axes=True
    )
  name, first = next(iter(sizes.items()))
  if first % slices:
    raise UserError(
      f'mesh axis {name} of size {first} is no multiple of the {slices} slices'
    )
  return mesh_utils.create_hybrid_device_mesh(
    (first // slices, *shape[1:]),
    (slices, *[1] * (len(shape) - 1)),
    devices,
    allow_split_physical_axes=True,
  )


def shardings(pytree: Any, table: Table, mesh: Mesh) -> Any:
  """NamedSharding for every leaf of a pytree of arrays or shapes.

  The table speaks of canonical names; leaves of stacked groups carry one more
  axis in front, which stays whole. What 'fsdp' splits, 'data' splits further
  where it divides: nothing is stored twice. Scalars are replicated.

  Raises:
    UserError: no rule for a leaf, a rule of another rank, an axis used twice,
      or one that does not divide a dimension.
  """
  canonical = tree.canonical_names(pytree)

  def leaf(name, x):
    if not x.shape:
      return NamedSharding(mesh, PartitionSpec())
    spec = naming.lookup(table, canonical[name][0], 'sharding table')
    if spec and len(spec) == len(x.shape) - 1:
      spec = (None, *spec)
    if spec and len(spec) != len(x.shape):
      raise UserError(
        f'sharding table: {name} has shape {x.shape} but its rule {spec}'
      )
    spec = placement.present(spec, x.shape, mesh.shape)
    used = [axis for entry in spec for axis in placement.names(entry)]
    if len(set(used)) < len(used):
      raise UserError(f'sharding table: {name} uses an axis twice in {spec}')
    for size, entry in zip(x.shape, spec):
      if size % (count := placement.ways(entry, mesh.shape)):
        raise UserError(
          f'mesh axis {"+".join(placement.names(entry))} of size {count} does '
          f'not divide {name} of shape {x.shape}'
        )
    return NamedSharding(mesh, PartitionSpec(*_spread(spec, x.shape, mesh)))

  return tree.map_named(leaf, pytree)


def _spread(spec: placement.Spec, shape, mesh: Mesh) -> placement.Spec:
  """`spec` with 'data' behind 'fsdp', if the mesh has both and it divides."""
  out = []
  for entry, size in zip(spec, shape):
    axes = placement.names(entry)
    if 'fsdp' in axes and mesh.shape.get('data', 1) > 1:
      wide = (*axes, 'data')
      axes = axes if size % placement.ways(wide, mesh.shape) else wide
    out.append(axes or None)
  return tuple(out)


def put(pytree: Any, places: Any) -> Any:
  """Arrays that every host holds, each device with its own part only.

  What lies where it should already stays there.
  """

  def leaf(x, place):
    if isinstance(x, jax.Array) and x.sharding == place:
      return x
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, place, x.__getitem__)

  return jax.tree.map(leaf, pytree, places)


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
