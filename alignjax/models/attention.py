"""The attention mixer: projections, rotary embedding, cache.

Gemma's in every generation and RecurrentGemma's local attention; they differ
in numbers of the config only.
"""

from typing import Any

import flax.linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from alignjax.kernels import attention_cached
from alignjax.kernels.attention import attention
from alignjax.models import cache as caches
from alignjax.models.layers import normal, project, rms_norm, rope


class Attention(nn.Module):
  """Grouped-query attention, local or global.

  `config` is a decoder `Config`; `kind` is 'local' or 'global'.
  """

  config: Any
  kind: str
  turned: tuple[str, ...] = ()

  @nn.compact
  def __call__(
    self,
    x: Float[Array, 'B T D'],
    position: Int[Array, 'B T'],
    segment: Int[Array, 'B T'] | None = None,
    block: Int[Array, 'B T'] | None = None,
    cache: caches.LayerCache | None = None,
    column: Any = 0,
  ):
    """-> ([B, T, D], cache). Position -1 marks padding."""
    c = self.config
    local = self.kind == 'local'
    q, k, v = self._heads(x, position)

    mask = dict(window=c.span if local else None, softcap=c.attn_softcap)
    if cache is not None and x.shape[1] == 1:
      # The slot that this overwrites lies outside the window already.
      cache = caches.write(cache, column, k, v, position, ring=local)
      out = attention_cached.attention(
        q,
        cache['k'],
        cache['v'],
        q_position=position,
        k_position=cache['position'],
        **mask,
      )
      return self._out(out), cache
    k_position, k_block = position, block
    new = k, v, position
    if cache is not None:
      k, v, k_position = caches.read(cache, *new)
      # Image tokens arrive in one chunk; what the cache holds is past.
      k_block = caches.pad_block(block, k.shape[1])
      cache = caches.write(cache, column, *new, ring=local)
    out = attention(
      q,
      k,
      v,
      q_position=position,
      k_position=k_position,
      q_segment=segment,
      k_segment=segment,
      q_block=block,
      k_block=k_block,
      aligned=cache is None,
      implementation=c.attention,
      **mask,
    )
    return self._out(checkpoint_name(out, 'heads')), cache

  def _out(self, heads):
    c = self.config
    init = normal(c, c.heads * c.head_dim, gain=2 / c.layers)
    out = project(self, 'o', heads, init, (c.width,))
    if c.bias:
      out += self.param('o_bias', nn.initializers.zeros, (c.width,))
    return out

  def _heads(self, x, position):
    """Queries (scaled), keys and values, rotated."""
    c = self.config
    local = self.kind == 'local'
    init = normal(c, c.width)
    q = project(self, 'q', x, init, (c.heads, c.head_dim))
    k = project(self, 'k', x, init, (c.kv_heads, c.head_dim))
    v = project(self, 'v', x, init, (c.kv_heads, c.head_dim))
    if c.qk_norm:
      zeros = nn.initializers.zeros
      q = rms_norm(q, self.param('q_norm', zeros, (c.head_dim,)))
      k = rms_norm(k, self.param('k_norm', zeros, (c.head_dim,)))
    rotation = dict(
      base=c.rope_base_local if local else c.rope_base,
      scale=1.0 if local else c.rope_scale,
      fraction=c.rope_fraction,
    )
    q = rope(q, position, **rotation) * c.query_scale
    k = rope(k, position, **rotation)
    return tuple(
      checkpoint_name(x, name) for name, x in (('q', q), ('k', k), ('v', v))
    )
