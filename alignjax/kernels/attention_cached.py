"""Attention of one new token per row over a cache: the inner loop of decoding.

The cache is read where it lies, keys [B, K, h, S] and values [B, K, S, h], so
that both products are plain matrix products. Any other order is copied, whole,
for every token.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from alignjax.kernels import attention_plain as plain
from alignjax.kernels.dense import softcap as cap


def attention(
  q: Float[Array, 'B 1 H h'],
  k: Float[Array, 'B K h S'],
  v: Float[Array, 'B K S h'],
  *,
  q_position: Int[Array, 'B 1'],
  k_position: Int[Array, 'B S'],
  window: int | None = None,
  softcap: float | None = None,
) -> Float[Array, 'B 1 H h']:
  """`kernels.attention.attention` for T = 1 over slots in any order."""
  batch, kv_heads, dim, _ = k.shape
  grouped = q.reshape(batch, kv_heads, -1, dim)
  logits = jnp.einsum(
    'bkgh,bkhs->bkgs', grouped, k, preferred_element_type=jnp.float32
  )
  if softcap is not None:
    logits = cap(logits, softcap)
  seen = plain.visible(
    plain.Tokens(q_position), plain.Tokens(k_position), window
  )
  logits = jnp.where(seen[:, None], logits, plain.MASKED)
  probs = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
  return jnp.einsum('bkgs,bksh->bkgh', probs, v).reshape(q.shape)
