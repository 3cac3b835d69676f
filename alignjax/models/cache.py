"""Key-value caches: all slots for global layers, a ring for local ones.

A layer's cache is {'k': [B, K, h, S], 'v': [B, K, S, h], 'position': int32
[B, S]}, position -1 where a slot is empty or holds padding. All rows write the
same slot, column c of the sequence into slot c mod S, so a local layer needs
min(W, length) slots however long the sequence becomes. The order of axes is
that of the two matrix products of a decode step, which copies nothing then.
Recurrent layers keep a state of fixed size instead (`models/recurrent.py`).
"""

from typing import Any

import jax
import jax.numpy as jnp

from alignjax.core import placement

LayerCache = dict[str, Any]

# Where the slots are.
_SLOTS = {'k': 3, 'v': 2, 'position': 1}


def empty(
  batch: int, slots: int, kv_heads: int, head_dim: int, dtype
) -> LayerCache:
  """A cache that holds nothing."""
  rows, heads = placement.ROWS, placement.HEADS
  k = jnp.zeros((batch, kv_heads, head_dim, slots), dtype)
  v = jnp.zeros((batch, kv_heads, slots, head_dim), dtype)
  position = jnp.full((batch, slots), -1, jnp.int32)
  return {
    'k': placement.constrain(k, rows, heads),
    'v': placement.constrain(v, rows, heads),
    'position': placement.constrain(position, rows),
  }


def write(
  cache: LayerCache, column, k, v, position, *, ring: bool
) -> LayerCache:
  """Puts T new columns, the first of them number `column`, into their slots.

  A chunk ([B, T, K, h], position [B, T]) may be padded on either side. A cache
  that is no `ring` has a slot for every column. One token is a slice update,
  which a decode loop does in place; it must be a real one in every row that
  goes on.
  """
  new = _by_slot(k, v, position)
  slots, length = cache['position'].shape[1], position.shape[1]
  if length == 1 or not ring:
    return {
      name: jax.lax.dynamic_update_slice_in_dim(
        cache[name], x.astype(cache[name].dtype), column % slots, _SLOTS[name]
      )
      for name, x in new.items()
    }
  # Old slots in the order of their columns, then the new columns. Padding goes
  # to the front, row by row, or a short row's padding would push its own keys
  # out of the ring.
  order = (column + jnp.arange(slots)) % slots
  whole = _joined(
    {name: jnp.take(cache[name], order, axis=_SLOTS[name]) for name in new}, new
  )
  front = jnp.argsort(whole['position'] >= 0, axis=1, stable=True)
  slot = jnp.argsort((column + length + jnp.arange(slots)) % slots)
  kept = front[:, -slots:][:, slot]
  return {
    name: jax.vmap(
      lambda x, index, name=name: jnp.take(x, index, axis=_SLOTS[name] - 1)
    )(x, kept)
    for name, x in whole.items()
  }


def read(cache: LayerCache, k, v, position):
  """Old slots followed by the new columns: what a chunk attends over.

  A chunk longer than one must read before it writes, or its early queries lose
  the keys that its late ones overwrite. Returns k, v [B, S + T, K, h] and
  positions [B, S + T].
  """
  whole = _joined(cache, _by_slot(k, v, position))
  k = jnp.transpose(whole['k'], (0, 3, 1, 2))
  return k, jnp.swapaxes(whole['v'], 1, 2), whole['position']


def pad_block(block, length: int):
  """`block` of the new columns behind 0 for every old slot."""
  if block is None:
    return None
  return jnp.pad(block, ((0, 0), (length - block.shape[1], 0)))


def _by_slot(k, v, position) -> LayerCache:
  """New columns with their axes in the cache's order."""
  return {
    'k': jnp.transpose(k, (0, 2, 3, 1)),
    'v': jnp.swapaxes(v, 1, 2),
    'position': position,
  }


def _joined(old: LayerCache, new: LayerCache) -> LayerCache:
  return {
    name: jnp.concatenate([old[name], x.astype(old[name].dtype)], _SLOTS[name])
    for name, x in new.items()
  }
