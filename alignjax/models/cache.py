"""Key-value caches: all slots for global layers, a ring for local ones.

A layer's cache is {'k', 'v': [B, S, K, h], 'position': int32 [B, S]}, position
-1 where a slot is empty or holds padding. All rows write the same slot (rows
are left-padded to one width), column c of the sequence into slot c mod S, so a
local layer needs min(W, length) slots however long the sequence becomes.
"""

from typing import Any

import jax
import jax.numpy as jnp

LayerCache = dict[str, Any]


def empty(
  batch: int, slots: int, kv_heads: int, head_dim: int, dtype
) -> LayerCache:
  """A cache that holds nothing."""
  shape = (batch, slots, kv_heads, head_dim)
  return {
    'k': jnp.zeros(shape, dtype),
    'v': jnp.zeros(shape, dtype),
    'position': jnp.full((batch, slots), -1, jnp.int32),
  }


def write(cache: LayerCache, column, k, v, position) -> LayerCache:
  """Puts T new columns, the first of them number `column`, into their slots.

  Only the last min(T, S) can survive in a ring of S slots. One token is a
  slice update, which a decode loop does in place.
  """
  slots, length = cache['k'].shape[1], k.shape[1]
  new = {'k': k, 'v': v, 'position': position}
  if length == 1:
    return {
      name: jax.lax.dynamic_update_slice_in_dim(
        cache[name], x.astype(cache[name].dtype), column % slots, axis=1
      )
      for name, x in new.items()
    }
  kept = min(length, slots)
  index = (column + length - kept + jnp.arange(kept)) % slots
  return {
    name: cache[name].at[:, index].set(x[:, -kept:].astype(cache[name].dtype))
    for name, x in new.items()
  }


def read(cache: LayerCache, k, v, position):
  """Old slots followed by the new columns: what a chunk attends over.

  A chunk longer than one must read before it writes, or its early queries lose
  the keys that its late ones overwrite.
  """
  return tuple(
    jnp.concatenate([cache[name], x.astype(cache[name].dtype)], axis=1)
    for name, x in (('k', k), ('v', v), ('position', position))
  )
