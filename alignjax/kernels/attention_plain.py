"""What attention means, in plain XLA: every other implementation must agree.

Causal by position, inside a segment and a window, with image blocks whose
tokens see each other. It materialises all T x S logits and skips nothing.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# Finite on purpose: a row without any visible key must not become NaN.
MASKED = -2.3819763e38


class Tokens(NamedTuple):
  """What masks are made of, of queries or of keys; None = not used."""

  position: Int[Array, 'B T']
  segment: Int[Array, 'B T'] | None = None
  block: Int[Array, 'B T'] | None = None


def visible(
  queries: Tokens, keys: Tokens, window: int | None = None
) -> Bool[Array, 'B T S']:
  """Which keys a query sees.

  A key at position -1 is an empty slot or padding: nobody sees it. `window`
  counts the query itself: W keys in all, measured in positions. Equal non-zero
  blocks (one image's tokens) see each other whatever the order, still inside
  the window and the segment (Gemma 3, arXiv 2503.19786, section 2.1).
  """

  def pairs(name):
    one, other = getattr(queries, name), getattr(keys, name)
    if one is not None and other is not None:
      return one[:, :, None], other[:, None, :]
    return None

  q, k = queries.position[:, :, None], keys.position[:, None, :]
  seen = k <= q
  if blocks := pairs('block'):
    seen |= (blocks[0] == blocks[1]) & (blocks[0] != 0)
  seen &= k >= 0
  if window is not None:
    seen &= k > q - window
  if segments := pairs('segment'):
    seen &= segments[0] == segments[1]
  return seen


def attention(
  q: Float[Array, 'B T H h'],
  k: Float[Array, 'B S K h'],
  v: Float[Array, 'B S K h'],
  queries: Tokens,
  keys: Tokens,
  *,
  window: int | None = None,
  softcap: float | None = None,
) -> Float[Array, 'B T H h']:
  """Grouped-query attention; `q` is already scaled.

  Query head i reads key head i // (H / K). The cap comes before the mask and
  the softmax is float32 (Gemma 2, arXiv 2408.00118, section 2). A query that
  sees no key gives the mean of all values.
  """
  batch, length, heads, dim = q.shape
  kv_heads = k.shape[2]
  q = q.reshape(batch, length, kv_heads, heads // kv_heads, dim)
  logits = jnp.einsum(
    'btkgh,bskh->bkgts', q, k, preferred_element_type=jnp.float32
  )
  if softcap is not None:
    logits = softcap * jnp.tanh(logits / softcap)
  seen = visible(queries, keys, window)[:, None, None]
  logits = jnp.where(seen, logits, MASKED)
  probs = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
  out = jnp.einsum('bkgts,bskh->btkgh', probs, v)
  return out.reshape(batch, length, heads, dim)
