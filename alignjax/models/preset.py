"""The released models by name: their numbers, and nothing but numbers.

`SHAPES` says what each checkpoint of a family is; a config takes one with
`defaults('models', 'preset', shape='gemma2-9b')`. Vocabularies count the rows
of the files as released by DeepMind: Gemma 1 and 2 carry 128 rows beyond their
tokenizer. No weights, and no model that was not released.

Sources: arXiv 2403.08295 (Gemma), 2408.00118 (Gemma 2), 2503.19786 (Gemma 3),
2404.07839 (RecurrentGemma), and the configurations in their repositories.
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

from alignjax.core.errors import UserError
from alignjax.core.lookup import nearest
from alignjax.models.config import Config
from alignjax.models.gemma import gemma
from alignjax.models.recurrentgemma import recurrentgemma


def _gemma(
  family: str,
  layers: int,
  width: int,
  heads: int,
  kv_heads: int,
  hidden: int,
  *,
  head_dim: int = 256,
  **more,
) -> Config:
  sizes = dict(layers=layers, width=width, heads=heads, kv_heads=kv_heads)
  rows = 262_144 if family == 'gemma3' else 256_128
  return gemma(
    family=family,
    vocab_size=rows,
    hidden=hidden,
    head_dim=head_dim,
    **sizes,
    **more,
  )


def _recurrentgemma(layers: int, width: int, heads: int, hidden: int) -> Config:
  return recurrentgemma(
    vocab_size=256_000,
    layers=layers,
    width=width,
    heads=heads,
    hidden=hidden,
  )


# The 27B models scale queries by width / heads, not by the size of a head.
SHAPES: Mapping[str, Config] = MappingProxyType(
  {
    'gemma1-2b': _gemma('gemma1', 18, 2048, 8, 1, 16384),
    'gemma1-7b': _gemma('gemma1', 28, 3072, 16, 16, 24576),
    'gemma2-2b': _gemma('gemma2', 26, 2304, 8, 4, 9216),
    'gemma2-9b': _gemma('gemma2', 42, 3584, 16, 8, 14336),
    'gemma2-27b': _gemma(
      'gemma2', 46, 4608, 32, 16, 36864, head_dim=128, query_scale=144**-0.5
    ),
    'gemma3-270m': _gemma('gemma3', 18, 640, 4, 1, 2048, window=512),
    'gemma3-1b': _gemma('gemma3', 26, 1152, 4, 1, 6912, window=512),
    'gemma3-4b': _gemma(
      'gemma3', 34, 2560, 8, 4, 10240, window=1024, rope_scale=8.0
    ),
    'gemma3-12b': _gemma(
      'gemma3', 48, 3840, 16, 8, 15360, window=1024, rope_scale=8.0
    ),
    'gemma3-27b': _gemma(
      *('gemma3', 62, 5376, 32, 16, 21504),
      head_dim=128,
      query_scale=168**-0.5,
      window=1024,
      rope_scale=8.0,
    ),
    'recurrentgemma-2b': _recurrentgemma(26, 2560, 10, 7680),
    'recurrentgemma-9b': _recurrentgemma(38, 4096, 16, 12288),
  }
)


def preset(
  *,
  shape: str = 'gemma2-2b',
  dtype: str = 'float32',
  remat: str = 'none',
  unroll: int = 1,
  attention: str = 'auto',
  recurrence: str = 'auto',
) -> Config:
  """A released model's decoder; the rest says how it is computed.

  Raises UserError, with the nearest name, for a shape that is not in `SHAPES`.
  """
  if shape not in SHAPES:
    raise UserError(
      f'model.shape: no model is called {shape!r}{nearest(shape, SHAPES)}'
      f' (known: {", ".join(SHAPES)})'
    )
  return dataclasses.replace(
    SHAPES[shape],
    dtype=dtype,
    remat=remat,
    unroll=unroll,
    attention=attention,
    recurrence=recurrence,
  )
