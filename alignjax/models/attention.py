"""The attention mixer of Gemma: projections, rotary embedding, cache."""

from typing import Any

import flax.linen as nn
from jaxtyping import Array, Float, Int

from alignjax.kernels.attention import attention
from alignjax.models import cache as caches
from alignjax.models.layers import rms_norm, rope


class Attention(nn.Module):
  """Grouped-query attention, local or global.

  `config` is a decoder `Config`; `kind` is 'local' or 'global'.
  """

  config: Any
  kind: str

  @nn.compact
  def __call__(
    self,
    x: Float[Array, 'B T D'],
    position: Int[Array, 'B T'],
    segment: Int[Array, 'B T'] | None = None,
    cache: caches.LayerCache | None = None,
    column: Any = 0,
  ):
    """-> ([B, T, D], cache). Position -1 marks padding."""
    c = self.config
    local = self.kind == 'local'
    init = nn.initializers.normal(c.init_std)
    heads = (c.width, c.heads, c.head_dim)
    kv_heads = (c.width, c.kv_heads, c.head_dim)
    q = _project(x, self.param('q', init, heads))
    k = _project(x, self.param('k', init, kv_heads))
    v = _project(x, self.param('v', init, kv_heads))
    if c.qk_norm:
      zeros = nn.initializers.zeros
      q = rms_norm(q, self.param('q_norm', zeros, (c.head_dim,)))
      k = rms_norm(k, self.param('k_norm', zeros, (c.head_dim,)))
    base = c.rope_base_local if local else c.rope_base
    scale = 1.0 if local else c.rope_scale
    q = rope(q, position, base=base, scale=scale) * c.query_scale
    k = rope(k, position, base=base, scale=scale)

    keys, values, k_position = k, v, position
    if cache is not None and x.shape[1] > 1:
      keys, values, k_position = caches.read(cache, k, v, position)
    if cache is not None:
      cache = caches.write(cache, column, k, v, position)
    if cache is not None and x.shape[1] == 1:
      # The slot just overwritten lay outside the window already.
      keys, values, k_position = cache['k'], cache['v'], cache['position']
    out = attention(
      q,
      keys,
      values,
      q_position=position,
      k_position=k_position,
      q_segment=segment,
      k_segment=segment,
      window=c.window if local else None,
      softcap=c.attn_softcap,
    )
    o = self.param('o', init, (c.heads, c.head_dim, c.width))
    flat = out.reshape(*out.shape[:2], c.heads * c.head_dim)
    return flat @ o.reshape(-1, c.width), cache


def _project(x, w):
  flat = x @ w.reshape(w.shape[0], -1)
  return flat.reshape(*x.shape[:2], *w.shape[1:])
