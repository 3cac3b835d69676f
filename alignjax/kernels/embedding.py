"""Rows of an embedding table that may be split over its vocabulary.

The plain meaning is `table[ids]`. On a mesh every chip looks up the ids of its
whole group in its own part of the table, and the sum over parts is scattered
back to the rows: activations travel, the table does not.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from alignjax.core import placement


def lookup(
  table: Float[Array, 'V D'], ids: Int[Array, 'B T']
) -> Float[Array, 'B T D']:
  """table[ids], for ids in 0..V-1."""
  mesh = placement.mesh()
  if mesh is None:
    return table[ids]
  sizes = mesh.shape
  (vocabulary,) = placement.present(
    (placement.VOCABULARY,), table.shape[:1], sizes
  )
  rows, columns = placement.dividing(
    (placement.ROWS, placement.COLUMNS), ids.shape, sizes
  )
  if vocabulary is None or table.shape[0] % placement.ways(vocabulary, sizes):
    return placement.constrain(table[ids], rows, columns)
  parts = placement.names(vocabulary)
  return jax.shard_map(
    functools.partial(
      _part,
      parts=parts,
      shared=[a for a in placement.names(rows) if a in parts],
    ),
    in_specs=(PartitionSpec(vocabulary), PartitionSpec(rows, columns)),
    out_specs=PartitionSpec(rows, columns),
    check_vma=False,
  )(table, ids)


def _part(table, ids, *, parts, shared):
  """What one chip does; `shared` axes split both the table and the rows."""
  for axis in reversed(shared):
    ids = jax.lax.all_gather(ids, axis, axis=0, tiled=True)
  first = jax.lax.axis_index(parts) * table.shape[0]
  local = ids - first
  mine = (local >= 0) & (local < table.shape[0])
  # One part alone is not zero, so that the sum is exact in any dtype.
  out = jnp.where(mine[..., None], table[jnp.where(mine, local, 0)], 0)
  if rest := [axis for axis in parts if axis not in shared]:
    out = jax.lax.psum(out, rest)
  for axis in shared:
    out = jax.lax.psum_scatter(out, axis, scatter_dimension=0, tiled=True)
  return out
