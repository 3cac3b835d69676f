"""Attention with one meaning: causal by position, inside a segment and window.

`attention` is the meaning in plain XLA; a faster implementation must return
the same numbers. It knows arrays only: projections, rotary embedding and
caches are the model's.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Finite on purpose: a row without any visible key must not become NaN.
MASKED = -2.3819763e38


def visible(
  q_position: Int[Array, 'B T'],
  k_position: Int[Array, 'B S'],
  q_segment: Int[Array, 'B T'] | None = None,
  k_segment: Int[Array, 'B S'] | None = None,
  window: int | None = None,
):
  """Which keys a query sees, bool [B, T, S].

  A key at position -1 is an empty slot or padding. `window` counts the query
  itself: W keys in all, measured in positions.
  """
  q, k = q_position[:, :, None], k_position[:, None, :]
  seen = (k >= 0) & (k <= q)
  if window is not None:
    seen &= k > q - window
  if q_segment is not None and k_segment is not None:
    seen &= q_segment[:, :, None] == k_segment[:, None, :]
  return seen


def attention(
  q: Float[Array, 'B T H h'],
  k: Float[Array, 'B S K h'],
  v: Float[Array, 'B S K h'],
  *,
  q_position: Int[Array, 'B T'],
  k_position: Int[Array, 'B S'],
  q_segment: Int[Array, 'B T'] | None = None,
  k_segment: Int[Array, 'B S'] | None = None,
  window: int | None = None,
  softcap: float | None = None,
) -> Float[Array, 'B T H h']:
  """Grouped-query attention; `q` is already scaled.

  Query head i reads key head i // (H / K). The cap comes before the mask and
  the softmax is float32 (Gemma 2, arXiv 2408.00118, section 2).
  """
  batch, length, heads, dim = q.shape
  kv_heads = k.shape[2]
  q = q.reshape(batch, length, kv_heads, heads // kv_heads, dim)
  logits = jnp.einsum(
    'btkgh,bskh->bkgts', q, k, preferred_element_type=jnp.float32
  )
  if softcap is not None:
    logits = softcap * jnp.tanh(logits / softcap)
  seen = visible(q_position, k_position, q_segment, k_segment, window)
  logits = jnp.where(seen[:, None, None], logits, MASKED)
  probs = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
  out = jnp.einsum('bkgts,bskh->btkgh', probs, v)
  return out.reshape(batch, length, heads, dim)
