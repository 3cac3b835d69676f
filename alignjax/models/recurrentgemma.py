"""RecurrentGemma-shaped configurations.

Griffin (arXiv 2402.19427) as released in arXiv 2404.07839: two recurrent
layers, then one of local attention. Sizes are arguments here and presets in
`models/preset.py`.
"""

from alignjax.models.config import Config


def recurrentgemma(
  *,
  vocab_size: int = 256_000,
  width: int = 2560,
  hidden: int = 7680,
  layers: int = 26,
  heads: int = 10,
  lru_width: int = 0,
  window: int = 2048,
  window_self: bool = False,
  dtype: str = 'float32',
  remat: str = 'none',
  unroll: int = 1,
  attention: str = 'auto',
  recurrence: str = 'auto',
) -> Config:
  """A RecurrentGemma decoder; the defaults are the 2B model.

  `hidden` is the width of one branch of the feed-forward. `lru_width` 0 is
  `width`. `window_self` True is the window of Hugging Face's code, one key
  shorter than that of the released model's. Weights are drawn by fan-in.
  """
  return Config(
    vocab_size=vocab_size,
    width=width,
    hidden=hidden,
    layers=layers,
    heads=heads,
    kv_heads=1,
    head_dim=width // heads,
    pattern=('recurrent', 'recurrent', 'local'),
    window=window,
    window_self=window_self,
    final_softcap=30.0,
    rope_fraction=0.5,
    bias=True,
    lru_width=lru_width,
    round_embed_scale=True,
    init='griffin',
    dtype=dtype,
    remat=remat,
    unroll=unroll,
    attention=attention,
    recurrence=recurrence,
  )
