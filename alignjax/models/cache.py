"""Key-value caches: all slots for global layers, a ring for local ones.

A layer's cache is {'k', 'v': [B, K, S, h], 'position': int32 [B, S]}, position
-1 where a slot is empty or holds padding. All rows write the same slot, column
c of the sequence into slot c mod S, so a local layer needs min(W, length) slots
however long the sequence becomes. Heads come before slots because that is how a
decode step reads them. Recurrent layers keep a state of fixed size instead
(`models/recurrent.py`).
"""

from typing import Any

import jax
import jax.numpy as jnp

LayerCache = dict[str, Any]


def empty(
  batch: int, slots: int, kv_heads: int, head_dim: int, dtype
) -> LayerCache:
  """A cache that holds nothing."""
  shape = (batch, kv_heads, slots, head_dim)
  return {
    'k': jnp.zeros(shape, dtype),
    'v': jnp.zeros(shape, dtype),
    'position': jnp.full((batch, slots), -1, jnp.int32),
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
        cache[name], x.astype(cache[name].dtype), column % slots, _axis(x)
      )
      for name, x in new.items()
    }
  # Old slots in the order of their columns, then the new columns. Padding goes
  # to the front, row by row, or a short row's padding would push its own keys
  # out of the ring.
  order = (column + jnp.arange(slots)) % slots
  old = {name: _take(cache[name], order[None]) for name in new}
  whole = {name: _join(old[name], x) for name, x in new.items()}
  front = jnp.argsort(whole['position'] >= 0, axis=1, stable=True)
  slot = jnp.argsort((column + length + jnp.arange(slots)) % slots)
  kept = front[:, -slots:][:, slot]
  return {
    name: _take(x, kept).astype(cache[name].dtype) for name, x in whole.items()
  }


def read(cache: LayerCache, k, v, position):
  """Old slots followed by the new columns: what a chunk attends over.

  A chunk longer than one must read before it writes, or its early queries lose
  the keys that its late ones overwrite. Returns k, v [B, S + T, K, h] and
  positions [B, S + T].
  """
  new = _by_slot(k, v, position)
  whole = {name: _join(cache[name], x) for name, x in new.items()}
  keys, values = (jnp.swapaxes(whole[name], 1, 2) for name in 'kv')
  return keys, values, whole['position']


def pad_block(block, length: int):
  """`block` of the new columns behind 0 for every old slot."""
  if block is None:
    return None
  return jnp.pad(block, ((0, 0), (length - block.shape[1], 0)))


def _by_slot(k, v, position):
  return {
    'k': jnp.swapaxes(k, 1, 2),
    'v': jnp.swapaxes(v, 1, 2),
    'position': position,
  }


def _axis(x) -> int:
  """Where the slots are: [B, S] or [B, K, S, h]."""
  return 1 if x.ndim == 2 else 2


def _join(old, new):
  return jnp.concatenate([old, new.astype(old.dtype)], axis=_axis(old))


def _take(x, index):
  """Slots `index` [B or 1, S] of every row."""
  if x.ndim == 4:
    index = index[:, None, :, None]
  return jnp.take_along_axis(x, index, axis=_axis(x))
