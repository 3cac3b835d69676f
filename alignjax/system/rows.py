"""Rows of a batch, between the host that reads them and the mesh.

Every process draws the same batch k and keeps the rows of its own devices; a
row that several processes hold has one owner, the first of them, and what the
owner says about it holds for all. Nothing here looks into a row.
"""

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from alignjax.system import mesh as meshes


def to_mesh(batch: Mapping[str, Any], place: Sharding | None) -> dict[str, Any]:
  """Global arrays of a whole batch, of which each process sends its rows."""
  if place is None or place.is_fully_addressable:
    return jax.device_put(dict(batch), place)
  return {
    name: jax.make_array_from_callback(x.shape, place, x.__getitem__)
    for name, x in batch.items()
  }


def to_host(
  batch: Mapping[str, Any], names: Iterable[str]
) -> dict[str, np.ndarray]:
  """The rows that this process owns, of the named fields that are there.

  A process that owns none gets one row, for the shapes; see `from_host`.
  """
  out = {}
  for name in names:
    if name not in batch:
      continue
    x = batch[name]
    place = _place(x)
    if place is None or place.is_fully_addressable:
      out[name] = np.asarray(x)
      continue
    x = jax.device_put(x, place)
    shards = {_span(s.index, len(x)): s.data for s in x.addressable_shards}
    parts = [np.asarray(shards[span]) for span in owned(place, len(x))]
    spare = np.asarray(next(iter(shards.values())))[:1]
    out[name] = np.concatenate(parts) if parts else spare
  return out


def from_host(values: np.ndarray, like: Any) -> Any:
  """The field [B, ...] of which each process has `values` of its own rows.

  `like` is another field [B, ...] of the batch; of several processes all must
  call this. Values of a row that is not its own are not used.
  """
  place, size, me = _place(like), len(like), jax.process_index()
  if place is None or place.is_fully_addressable:
    return jax.device_put(values, place)
  mesh = place.mesh
  full = np.zeros((size, *values.shape[1:]), values.dtype)
  spans = owned(place, size)
  if spans:
    full[np.concatenate([np.arange(*span) for span in spans])] = values
  if not _shared(place, size):
    return jax.make_array_from_callback(full.shape, place, full.__getitem__)
  # Somebody else holds a row of mine: all add up what they have, once each.
  each = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
  mine = [s for s, who in _holders(each, mesh.size).items() if me in who]
  lead = min(mine)
  none = np.zeros_like(full)
  stacked = jax.make_array_from_callback(
    (mesh.size, *full.shape),
    each,
    lambda at: (full if _span(at, mesh.size) == lead else none)[None],
  )
  return _summed(place)(stacked)


@functools.lru_cache
def owned(place: NamedSharding, size: int) -> tuple[tuple[int, int], ...]:
  """[begin, end) of the rows that this process is the first to hold."""
  me = jax.process_index()
  holders = _holders(place, size)
  return tuple(sorted(s for s, who in holders.items() if min(who) == me))


@functools.lru_cache
def _shared(place: NamedSharding, size: int) -> bool:
  """Whether some row is held by more than one process."""
  return any(len(who) > 1 for who in _holders(place, size).values())


def _holders(place, size) -> dict[tuple[int, int], set[int]]:
  holders: dict[tuple[int, int], set[int]] = {}
  for device, index in place.devices_indices_map((size,)).items():
    holders.setdefault(_span(index, size), set()).add(device.process_index)
  return holders


@functools.lru_cache
def _summed(place: NamedSharding):
  return jax.jit(lambda x: jnp.sum(x, axis=0), out_shardings=place)


def _span(index, size: int) -> tuple[int, int]:
  begin, end, _ = index[0].indices(size)
  return begin, end


def _place(x: Any) -> Any:
  """Where rows belong on the mesh of `x`; None for what is on no mesh."""
  if not isinstance(x, jax.Array):
    return None
  if isinstance(x.sharding, NamedSharding):
    mesh: Any = x.sharding.mesh
    return meshes.rows(mesh)
  return x.sharding
