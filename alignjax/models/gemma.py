"""Gemma-shaped configurations.

A generation is a set of habits (pattern, caps, norms); its sizes are arguments
here and presets in `models/preset.py`. RecurrentGemma has a file of its own.
"""

from alignjax.core.errors import UserError
from alignjax.models.config import Config

# What the models of a generation share; sizes come on top. Gemma 1: arXiv
# 2403.08295, Gemma 2: 2408.00118, Gemma 3: 2503.19786.
FAMILIES = {
  'gemma1': dict(pattern=('global',)),
  'gemma2': dict(
    pattern=('local', 'global'),
    window=4096,
    attn_softcap=50.0,
    final_softcap=30.0,
    post_norm=True,
  ),
  'gemma3': dict(
    pattern=('local',) * 5 + ('global',),
    window=1024,
    rope_base=1_000_000.0,
    qk_norm=True,
    post_norm=True,
  ),
}


def gemma(
  *,
  family: str = 'gemma2',
  vocab_size: int = 256_000,
  width: int = 2304,
  hidden: int = 9216,
  layers: int = 26,
  heads: int = 8,
  kv_heads: int = 4,
  head_dim: int = 256,
  window: int = 4096,
  query_scale: float = 0.0,
  rope_scale: float = 1.0,
  init_std: float = 0.01,
  dtype: str = 'float32',
  remat: str = 'none',
  unroll: int = 1,
  attention: str = 'auto',
) -> Config:
  """A decoder of a Gemma generation; the defaults are Gemma 2 2B.

  `query_scale` 0 is head_dim ** -0.5; the 27B models use (width / heads)
  instead of head_dim. `rope_scale` stretches the positions of global layers.
  """
  if family not in FAMILIES:
    raise UserError(
      f'model.family: found {family!r}, expected one of {sorted(FAMILIES)}'
    )
  return Config(
    **FAMILIES[family]
    | dict(
      vocab_size=vocab_size,
      width=width,
      hidden=hidden,
      layers=layers,
      heads=heads,
      kv_heads=kv_heads,
      head_dim=head_dim,
      window=window,
      query_scale=query_scale,
      rope_scale=rope_scale,
      init_std=init_std,
      dtype=dtype,
      remat=remat,
      unroll=unroll,
      attention=attention,
    )
  )
