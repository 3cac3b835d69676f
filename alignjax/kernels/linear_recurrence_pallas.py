"""The linear recurrence on TPU: one pass over time, in either direction.

A tile is one row's block of columns times some channels; the carry stays in
vector memory from block to block, so `x` and `a` are read and the states
written once. No derivatives: the caller's custom VJP is a second pass. It
computes what one device holds: splitting rows or channels over a mesh is the
caller's, by `shard_map`.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

LANES = 128
# Columns of a tile at most, and how many of them are loaded at once: whole
# registers of bfloat16.
COLUMNS, ROWS = 256, 16
# Channels of a tile at most, in lanes' worth.
TILE_LANES = 8


def sweep(
  x: Float[Array, 'B T E'],
  a: Float[Array, 'B T E'],
  carry: Float[Array, 'B E'],
  *,
  reverse: bool = False,
  interpret: bool = False,
) -> tuple[Float[Array, 'B T E'], Float[Array, 'B E']]:
  """-> (out, carry), float32, as `linear_recurrence` sweeps.

  Forwards out_t = carry = a_t carry + x_t; in reverse, from the last column,
  out_t = carry + x_t and carry = a_t out_t. `interpret` runs off TPU, slowly.
  """
  _, length, width = x.shape
  blocks = -(-length // COLUMNS)
  columns = _up(-(-length // blocks), ROWS)
  # Padding leaves the carry alone in both directions.
  room = ((0, 0), (0, blocks * columns - length), (0, -width % LANES))
  x = jnp.pad(x, room)
  a = jnp.pad(a, room, constant_values=1)
  carry = jnp.pad(carry, (room[0], room[2]))[:, None]
  out, carry = _call(x, a, carry, columns, reverse, interpret)
  return out[:, :length, :width], carry[:, 0, :width]


def _call(x, a, carry, columns, reverse, interpret):
  rows, length, width = x.shape
  channels = _channels(width)
  last = length // columns - 1

  def tile(row, channel, time):
    return row, last - time if reverse else time, channel

  def edge(row, channel, time):
    return row, 0, channel

  tiles = pl.BlockSpec((1, columns, channels), tile)
  edges = pl.BlockSpec((1, 1, channels), edge)
  return pl.pallas_call(
    functools.partial(_kernel, reverse=reverse),
    grid=(rows, width // channels, last + 1),
    in_specs=[tiles, tiles, edges],
    out_specs=[tiles, edges],
    out_shape=[
      jax.ShapeDtypeStruct(x.shape, jnp.float32),
      jax.ShapeDtypeStruct(carry.shape, jnp.float32),
    ],
    scratch_shapes=[pltpu.VMEM((1, channels), jnp.float32)],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'parallel', 'arbitrary')
    ),
    cost_estimate=pl.CostEstimate(
      flops=2 * x.size,
      transcendentals=0,
      bytes_accessed=x.nbytes + a.nbytes + 4 * x.size,
    ),
    interpret=interpret,
    name='linear_recurrence' + '_reverse' * reverse,
  )(x, a, carry)


def _kernel(x_ref, a_ref, first_ref, out_ref, last_ref, carry_ref, *, reverse):
  """One tile; time is the innermost, sequential axis of the grid."""

  @pl.when(pl.program_id(2) == 0)
  def _():
    carry_ref[:] = first_ref[0]

  groups = x_ref.shape[1] // ROWS

  def group(i, carry):
    i = groups - 1 - i if reverse else i
    rows = pl.ds(pl.multiple_of(i * ROWS, ROWS), ROWS)
    x = x_ref[0, rows, :].astype(jnp.float32)
    a = a_ref[0, rows, :].astype(jnp.float32)
    out = [carry] * ROWS
    for t in reversed(range(ROWS)) if reverse else range(ROWS):
      x_t, a_t = x[t : t + 1], a[t : t + 1]
      out[t] = (carry if reverse else a_t * carry) + x_t
      carry = a_t * out[t] if reverse else out[t]
    out_ref[0, rows, :] = jnp.concatenate(out, axis=0)
    return carry

  carry = jax.lax.fori_loop(0, groups, group, carry_ref[:])
  carry_ref[:] = carry
  last_ref[0] = carry


def _channels(width):
  """The most channels, at most a tile's, that divide `width`."""
  lanes = width // LANES
  wide = max(n for n in range(1, TILE_LANES + 1) if lanes % n == 0)
  return wide * LANES


def _up(size, multiple):
  return -(-size // multiple) * multiple
