"""Attention in blocks of queries and keys: O(T) memory on any platform.

The softmax is accumulated block by block (arXiv 2112.05682) and the backward
pass recomputes the weights from the saved logsumexp (FlashAttention-2, arXiv
2307.08691, section 3.1), so nothing of size T x S ever exists. Blocks of keys
that a block of queries cannot see are skipped, by column, where the caller
promises `aligned`. Reverse-mode derivatives only.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from alignjax.kernels.attention_plain import MASKED, Tokens, visible

# Running maximum before the first key: above MASKED, so that a masked logit
# weighs exactly zero even in a row that sees nothing.
_LOWEST = -1e30


class _Static(NamedTuple):
  """What a program is compiled for."""

  window: int | None
  softcap: float | None
  aligned: bool
  query_block: int
  key_block: int


def attention(
  q: Float[Array, 'B T H h'],
  k: Float[Array, 'B S K h'],
  v: Float[Array, 'B S K h'],
  queries: Tokens,
  keys: Tokens,
  *,
  window: int | None = None,
  softcap: float | None = None,
  aligned: bool = False,
  query_block: int = 256,
  key_block: int = 256,
) -> Float[Array, 'B T H h']:
  """Attention as `attention_plain` means it, in blocks.

  `query_block` and `key_block` are the most queries and keys in a block;
  `aligned` is the promise of `kernels.attention`. A query that sees no key
  gives zero.
  """
  static = _Static(
    window,
    softcap,
    aligned,
    _size(q.shape[1], query_block),
    _size(k.shape[1], key_block),
  )
  q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
  return jnp.swapaxes(_attention(static, q, k, v, queries, keys), 1, 2)


def _forward(static, q, k, v, queries, keys):
  """-> (out [B, H, T, h], logsumexp float32 [B, H, T])."""
  q_length = q.shape[2]
  ranges = _ranges(static, queries, keys)
  q = _query_blocks(q, k.shape[1], static.query_block)
  k, v = (_pieces(x, 2, static.key_block) for x in (k, v))
  queries = _token_blocks(queries, static.query_block)
  keys = _token_blocks(keys, static.key_block)

  def one(_, block):
    q, queries, first, end = block

    def add(j, carry):
      top, total, out = carry
      logits, _ = _logits(static, q, k[j], queries, _at(keys, j))
      new = jnp.maximum(top, jnp.max(logits, axis=-1))
      weights = jnp.exp(logits - new[..., None])
      old = jnp.exp(top - new)
      total = total * old + jnp.sum(weights, axis=-1)
      weights = weights.astype(v.dtype)
      seen = _dot('bkgts,bksh->bkgth', weights, v[j])
      return new, total, out * old[..., None] + seen

    rows = q.shape[:-1]
    begin = (
      jnp.full(rows, _LOWEST, jnp.float32),
      jnp.zeros(rows, jnp.float32),
      jnp.zeros(q.shape, jnp.float32),
    )
    top, total, out = jax.lax.fori_loop(first, end, add, begin)
    total = jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
    out = (out / total[..., None]).astype(v.dtype)
    return None, (out, top + jnp.log(total))

  _, outs = jax.lax.scan(one, None, (q, queries, *ranges))
  out, logsumexp = (_whole(x, 4, q_length) for x in outs)
  return out, logsumexp


def _backward(static, residuals, d_out):
  """-> gradients of q, k and v, accumulated in float32."""
  q, k, v, queries, keys, out, logsumexp = residuals
  kv_heads, q_length, k_length = k.shape[1], q.shape[2], k.shape[2]
  types = (q.dtype, k.dtype, v.dtype)
  ranges = _ranges(static, queries, keys)
  # Row sums of weights * d_weights, known without the weights.
  shared = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), -1)
  q, d_out, shared, logsumexp = (
    _query_blocks(x, kv_heads, static.query_block)
    for x in (q, d_out, shared, logsumexp)
  )
  k, v = (_pieces(x, 2, static.key_block) for x in (k, v))
  queries = _token_blocks(queries, static.query_block)
  keys = _token_blocks(keys, static.key_block)

  def one(carry, block):
    q, d_out, shared, logsumexp, queries, first, end = block

    def add(j, carry):
      d_q, d_k, d_v = carry
      logits, slope = _logits(static, q, k[j], queries, _at(keys, j))
      weights = jnp.exp(logits - logsumexp[..., None])
      d_weights = _dot('bkgth,bksh->bkgts', d_out, v[j])
      d_logits = weights * (d_weights - shared[..., None]) * slope
      d_logits = d_logits.astype(q.dtype)
      weights = weights.astype(v.dtype)
      d_v = d_v.at[j].add(_dot('bkgts,bkgth->bksh', weights, d_out))
      d_k = d_k.at[j].add(_dot('bkgts,bkgth->bksh', d_logits, q))
      d_q += _dot('bkgts,bksh->bkgth', d_logits, k[j])
      return d_q, d_k, d_v

    begin = (jnp.zeros(q.shape, jnp.float32), *carry)
    d_q, *carry = jax.lax.fori_loop(first, end, add, begin)
    return tuple(carry), d_q

  begin = tuple(jnp.zeros(x.shape, jnp.float32) for x in (k, v))
  blocks = (q, d_out, shared, logsumexp, queries, *ranges)
  (d_k, d_v), d_q = jax.lax.scan(one, begin, blocks)
  grads = (
    _whole(d_q, 4, q_length),
    _whole(d_k, 3, k_length),
    _whole(d_v, 3, k_length),
  )
  return tuple(grad.astype(dtype) for grad, dtype in zip(grads, types))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static, q, k, v, queries, keys):
  return _forward(static, q, k, v, queries, keys)[0]


def _attention_fwd(static, q, k, v, queries, keys):
  out, logsumexp = _forward(static, q, k, v, queries, keys)
  return out, (q, k, v, queries, keys, out, logsumexp)


def _attention_bwd(static, residuals, d_out):
  # Integers have no gradient.
  return *_backward(static, residuals, d_out), None, None


_attention.defvjp(_attention_fwd, _attention_bwd)


def key_range(
  columns: int,
  window: int | None,
  query_block: int,
  key_block: int,
  last: Int[Array, ' Q'] | None = None,
):
  """Blocks of keys that each block of queries reads: (first, end), [Q] each.

  Keys are the queries' own columns. `last` is the last column that a block of
  queries may see; without it, its own last column.
  """
  begin = np.arange(0, columns, query_block)
  first = np.zeros_like(begin)
  if window is not None:
    first = np.maximum(begin - window + 1, 0) // key_block
  own = np.minimum(begin + query_block, columns) - 1
  return first, (own if last is None else last) // key_block + 1


def last_of_run(block: Int[Array, 'B T']) -> Int[Array, 'B T']:
  """Column where each column's image block ends; outside one, itself."""
  column = jnp.arange(block.shape[1])
  following = jnp.pad(block[:, 1:], ((0, 0), (0, 1)))
  ends = (block == 0) | (block != following)
  column = jnp.where(ends, column, block.shape[1])
  return jax.lax.cummin(column, axis=1, reverse=True)


def _ranges(static, queries, keys):
  size, last = static.query_block, None
  if static.aligned and queries.block is not None:
    # An image looks ahead, to its last token.
    last = _pieces(last_of_run(queries.block), 1, size).max((1, 2))
  if static.aligned:
    columns = queries.position.shape[1]
    ranges = key_range(columns, static.window, size, static.key_block, last)
  else:
    count = -(-queries.position.shape[1] // size)
    end = -(-keys.position.shape[1] // static.key_block)
    ranges = np.zeros(count), np.full(count, end)
  return tuple(jnp.asarray(x, jnp.int32) for x in ranges)


def _logits(static, q, k, queries, keys):
  """Masked float32 logits [B, K, G, t, s] and their slope under the cap."""
  logits, slope = _dot('bkgth,bksh->bkgts', q, k), 1.0
  if static.softcap is not None:
    bent = jnp.tanh(logits / static.softcap)
    logits, slope = static.softcap * bent, 1 - bent * bent
  seen = visible(queries, keys, static.window)[:, None, None]
  return jnp.where(seen, logits, MASKED), slope


def _dot(dims, x, y):
  return jnp.einsum(dims, x, y, preferred_element_type=jnp.float32)


def _size(length, most):
  """Size of equal blocks, at most `most`."""
  return -(-length // -(-length // most))


def _pieces(x, axis, size, fill=0):
  """Cuts an axis: [..., T, ...] -> [blocks, ..., size, ...], padded."""
  count = -(-x.shape[axis] // size)
  padding = [(0, 0)] * x.ndim
  padding[axis] = (0, count * size - x.shape[axis])
  x = jnp.pad(x, padding, constant_values=fill)
  x = x.reshape(*x.shape[:axis], count, size, *x.shape[axis + 1 :])
  return jnp.moveaxis(x, axis, 0)


def _query_blocks(x, kv_heads, size):
  """[B, H, T, ...] -> [blocks, B, K, G, size, ...]."""
  x = _pieces(x, 2, size)
  return x.reshape(*x.shape[:2], kv_heads, -1, *x.shape[3:])


def _token_blocks(tokens, size):
  position = _pieces(tokens.position, 1, size, fill=-1)
  rest = (None if x is None else _pieces(x, 1, size) for x in tokens[1:])
  return Tokens(position, *rest)


def _at(tokens, j):
  return jax.tree.map(lambda x: x[j], tokens)


def _whole(x, axis, length):
  """Undoes the cutting: [blocks, B, heads..., size, ...] -> [B, H, T, ...].

  `axis` is that of `size`.
  """
  x = jnp.moveaxis(x, 0, axis - 1)
  columns = x.shape[axis - 1] * x.shape[axis]
  x = x.reshape(x.shape[0], -1, columns, *x.shape[axis + 1 :])
  return x[:, :, :length]
