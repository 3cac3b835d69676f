"""Attention on TPU: JAX's splash kernel, given this project's masks.

For whole rows that attend to themselves: causal or local by column, segments,
soft cap, grouped heads. No caches, no image blocks: `obstacles` says so before
anything is traced. It computes what one device holds; splitting a batch or
heads over a mesh is the caller's.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_kernel as splash,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_mask as masks,
)
from jaxtyping import Array, Float

from alignjax.kernels.attention_plain import Tokens

LANES = 128
# Blocks of 1024 with a soft cap do not fit the vector memory of a v5p.
_BLOCKS = (512, 384, 256, LANES)
# Segment of the padding, so that it sees itself and no row is empty.
_PADDING = -1


def obstacles(
  q: Float[Array, 'B T H h'],
  k: Float[Array, 'B S K h'],
  queries: Tokens,
  aligned: bool,
) -> list[str]:
  """Why splash cannot be used, one clause each; empty where it can."""
  columns, dim = q.shape[1], q.shape[3]
  found = []
  if not aligned or columns != k.shape[1]:
    found.append('keys are not the columns of the queries')
  if columns % LANES:
    found.append(f'{columns} columns are no multiple of {LANES}')
  if dim % 64:
    found.append(f'head_dim {dim} is no multiple of 64')
  if queries.block is not None:
    found.append('image tokens look ahead')
  return found


def attention(
  q: Float[Array, 'B T H h'],
  k: Float[Array, 'B T K h'],
  v: Float[Array, 'B T K h'],
  queries: Tokens,
  keys: Tokens,
  *,
  window: int | None = None,
  softcap: float | None = None,
  interpret: bool = False,
) -> Float[Array, 'B T H h']:
  """Attention of whole rows as `attention_plain` means it.

  Columns of a document are in order, without gaps, so that columns can stand
  for positions, and `keys` say what `queries` say. Rows of padding see only
  padding. `interpret` runs the kernel off TPU, slowly.
  """
  del keys
  kernel = _kernel(q.shape[1], q.shape[2], window, softcap, interpret)
  segment = queries.segment
  if segment is None:
    segment = jnp.zeros_like(queries.position)
  segment = jnp.where(queries.position < 0, _PADDING, segment)
  ids = splash.SegmentIds(q=segment, kv=segment)
  q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
  out = jax.vmap(kernel)(q, k, v, ids)
  return jnp.swapaxes(out, 1, 2).astype(v.dtype)


@functools.lru_cache(maxsize=64)
def _kernel(columns, heads, window, softcap, interpret):
  """The kernel of a shape; layers of one kind share it."""
  shape = (columns, columns)
  if window is None or window >= columns:
    mask = masks.CausalMask(shape)
  else:
    # Splash counts the keys before the query's own.
    mask = masks.LocalMask(shape, (window - 1, 0), offset=0)
  size = next(size for size in _BLOCKS if columns % size == 0)
  sizes = splash.BlockSizes(
    block_q=size,
    block_kv=size,
    block_q_dkv=size,
    block_kv_dkv=size,
    block_q_dq=size,
    block_kv_dq=size,
  )
  # Its tables are made of constants: no tracer of the program that happens to
  # come first may stay in the cache.
  with jax.ensure_compile_time_eval():
    kernel = splash.make_splash_mha_single_device(
      masks.MultiHeadMask([mask] * heads),
      block_sizes=sizes,
      attn_logits_soft_cap=softcap,
      # What its backward pass needs of the forward pass, for a remat policy.
      residual_checkpoint_name='kernel',
      interpret=interpret,
    )
  return jax.tree.map(jax.device_get, kernel)
