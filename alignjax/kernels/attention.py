"""Attention with one meaning and several implementations.

`attention_plain` is the meaning; `attention_chunked` and `attention_splash`
return the same numbers with less memory. All know arrays only: projections,
rotary embedding and caches are the model's.
"""

from functools import partial

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from alignjax.core import placement
from alignjax.core.errors import UserError
from alignjax.kernels import attention_chunked as chunked
from alignjax.kernels import attention_plain as plain
from alignjax.kernels import attention_splash as splash
from alignjax.kernels.attention_plain import Tokens

IMPLEMENTATIONS = ('auto', 'plain', 'chunked', 'splash')
# Logits per head up to which one product is as good as chunks, on a CPU.
_FEW = 64 * 64
# There, the logits of a block should stay in a core's cache.
_CPU_BLOCKS = dict(query_block=64, key_block=64)


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
  q_block: Int[Array, 'B T'] | None = None,
  k_block: Int[Array, 'B S'] | None = None,
  aligned: bool = False,
  implementation: str = 'auto',
) -> Float[Array, 'B T H h']:
  """Grouped-query attention; softmax in float32, output in v's dtype.

  Rows that see no key (padding) are finite and otherwise undefined.

  Args:
    q: already scaled. Query head i reads key head i // (H / K).
    k, v: keys and values, in any order.
    q_position, k_position: in the document; -1 = padding or an empty slot.
    q_segment, k_segment: documents of a packed row.
    window: keys seen, the query's own included; None = all.
    softcap: logits become softcap * tanh(logits / softcap) before the mask.
    q_block, k_block: equal non-zero = mutually visible (image tokens).
    aligned: promise that keys are the queries' own columns, that a row without
      segments is one document, and that documents and blocks are contiguous
      and in order. Lets keys be skipped by column.
    implementation: 'auto' goes by shape and by the platform that the program
      is lowered for, which need not be the one it is traced on.

  Raises:
    UserError: no such implementation, or the one named does not apply.
  """
  both = dict(window=window, softcap=softcap)
  choices = {
    'plain': partial(plain.attention, **both),
    'chunked': partial(chunked.attention, aligned=aligned, **both),
    'splash': partial(splash.attention, **both),
  }
  queries = Tokens(q_position, q_segment, q_block)
  keys = Tokens(k_position, k_segment, k_block)
  # Split columns are not the columns of the keys any more.
  aligned = aligned and not placement.split(placement.COLUMNS)
  problems = splash.obstacles(q, k, queries, aligned)
  _check(implementation, problems)
  if implementation == 'auto':
    few = q.shape[1] == 1 or q.shape[1] * k.shape[1] <= _FEW
    chosen = choices['plain'] if few else _by_platform(choices, not problems)
  else:
    chosen = choices[implementation]
  return _placed(chosen, q, k, v, queries, keys)


def _placed(chosen, q, k, v, queries, keys):
  """On a mesh every chip computes its own rows and heads; a kernel is opaque
  to the partitioner. Columns of queries may be split, those of keys are not.
  """
  mesh = placement.mesh()
  if mesh is None:
    return chosen(q, k, v, queries, keys)
  rows, columns, heads = placement.dividing(
    (placement.ROWS, placement.COLUMNS, placement.HEADS), q.shape, mesh.shape
  )
  (key_heads,) = placement.dividing(
    (placement.HEADS,), k.shape[2:3], mesh.shape
  )
  if k.shape[2] > 1 and key_heads is None:
    heads = None
  over_keys = PartitionSpec(rows, None, key_heads)
  return jax.shard_map(
    chosen,
    in_specs=(
      PartitionSpec(rows, columns, heads),
      over_keys,
      over_keys,
      PartitionSpec(rows, columns),
      PartitionSpec(rows),
    ),
    out_specs=PartitionSpec(rows, columns, heads),
    check_vma=False,
  )(q, k, v, queries, keys)


def _by_platform(choices, splash_applies):
  """What the platform of the lowering decides; no branch reaches a compiler."""
  # GPU goes by the default: cuDNN's kernel has neither cap nor segments.
  platforms = {'cpu': partial(choices['chunked'], **_CPU_BLOCKS)}
  if splash_applies:
    platforms['tpu'] = choices['splash']
  return lambda *args: jax.lax.platform_dependent(
    *args, **platforms, default=choices['chunked']
  )


def _check(implementation, problems):
  if implementation not in IMPLEMENTATIONS:
    raise UserError(
      f'model.attention: found {implementation!r}, expected one of '
      f'{list(IMPLEMENTATIONS)}'
    )
  if implementation == 'splash' and problems:
    raise UserError(
      f"model.attention: found 'splash', which does not apply here: "
      f'{"; ".join(problems)}'
    )
