"""Which decoder a DeepMind tree holds, told from names and shapes alone.

The trees carry no configuration. Shapes of a released model name it, and its
numbers (window, rope, caps, query scale) come with the name; other shapes get
the numbers of their family. No weights are read.
"""

import dataclasses
import re
from collections.abc import Mapping

from etils import epath

from alignjax.core.errors import UserError
from alignjax.models import preset
from alignjax.models.config import Config
from alignjax.models.gemma import FAMILIES, gemma
from alignjax.models.recurrentgemma import recurrentgemma

Shapes = Mapping[str, tuple[int, ...]]
_LAYER = re.compile(r'(?:layer_|blocks/)(\d+)/(.+)')
# What makes a shape a released model; the vocabulary's padding does not.
_SIZES = (
  *('width', 'hidden', 'layers', 'heads', 'kv_heads', 'head_dim'),
  *('qk_norm', 'post_norm', 'lru_width', 'conv_width'),
)


def infer(path: epath.Path, shapes: Shapes) -> tuple[Config, str]:
  """(config, how it was told) of a nested tree's names and shapes.

  Raises UserError if a tensor that is needed to tell is not there.
  """
  griffin = any(name.startswith('blocks/') for name in shapes)
  found = (_griffin if griffin else _gemma)(path, shapes)
  for name, config in preset.SHAPES.items():
    kinds = [map(c.kind, range(c.layers)) for c in (found, config)]
    same = all(getattr(found, f) == getattr(config, f) for f in _SIZES)
    if same and list(kinds[0]) == list(kinds[1]):
      rows = found.vocab_size
      return dataclasses.replace(config, vocab_size=rows), f'shapes of {name}'
  family = 'recurrentgemma' if griffin else _family(shapes)
  return found, (
    f'shapes of no released model; window, rope and caps are those of {family}'
  )


def _gemma(path: epath.Path, shapes: Shapes) -> Config:
  rows, width = _shape(path, shapes, 'embedder/input_embedding', 2)
  heads, head_dim, _ = _layer(path, shapes, 'attn/attn_vec_einsum/w', 3)
  hidden, _ = _layer(path, shapes, 'mlp/linear', 2)
  kv_heads = heads
  if not any(name.endswith('/attn/qkv_einsum/w') for name in shapes):
    kv_heads = _layer(path, shapes, 'attn/kv_einsum/w', 4)[1]
  family = _family(shapes)
  return gemma(
    family=family,
    vocab_size=rows,
    width=width,
    hidden=hidden,
    layers=_layers(shapes),
    heads=heads,
    kv_heads=kv_heads,
    head_dim=head_dim,
    window=FAMILIES[family].get('window', 4096),
  )


def _family(shapes: Shapes) -> str:
  inner = {match[2] for name in shapes if (match := _LAYER.fullmatch(name))}
  if 'attn/_query_norm/scale' in inner:
    return 'gemma3'
  return 'gemma2' if 'post_attention_norm/scale' in inner else 'gemma1'


def _griffin(path: epath.Path, shapes: Shapes) -> Config:
  rows, width = _shape(path, shapes, 'embedder/input_embedding', 2)
  gate = 'recurrent_block/rg_lru/a_gate/w'
  heads, _, _ = _layer(path, shapes, gate, 3)
  taps, lru_width = _layer(path, shapes, 'recurrent_block/conv_1d/w', 2)
  _, _, hidden = _layer(path, shapes, 'mlp_block/ffw_up/w', 3)
  kinds = ['recurrent'] * _layers(shapes)
  for name in shapes:
    match = _LAYER.fullmatch(name)
    if match and match[2].startswith('attention_block/'):
      kinds[int(match[1])] = 'local'
  head_dim, kv_heads = width // heads, 1
  if 'local' in kinds:
    _, queries = _layer(path, shapes, 'attention_block/proj_q/kernel', 2)
    _, keys = _layer(path, shapes, 'attention_block/proj_k/kernel', 2)
    head_dim = queries // heads
    kv_heads = max(keys // head_dim, 1)
  config = recurrentgemma(
    vocab_size=rows,
    width=width,
    hidden=hidden,
    layers=len(kinds),
    heads=heads,
  )
  return dataclasses.replace(
    config,
    head_dim=head_dim,
    kv_heads=kv_heads,
    query_scale=head_dim**-0.5,
    lru_width=lru_width,
    conv_width=taps,
    pattern=_pattern(kinds),
  )


def _pattern(kinds: list[str]) -> tuple[str, ...]:
  """The shortest list that gives these kinds when cycled."""
  for period in range(1, len(kinds) + 1):
    if all(kind == kinds[i % period] for i, kind in enumerate(kinds)):
      return tuple(kinds[:period])
  return tuple(kinds)


def _layers(shapes: Shapes) -> int:
  numbers = [int(m[1]) for name in shapes if (m := _LAYER.fullmatch(name))]
  return max(numbers, default=-1) + 1


def _layer(path, shapes: Shapes, inner: str, rank: int) -> tuple[int, ...]:
  """Shape of a tensor in the first layer that has it."""
  for name in shapes:
    match = _LAYER.fullmatch(name)
    if match and match[2] == inner:
      return _shape(path, shapes, name, rank)
  raise UserError(
    f'{path}: no layer has a tensor {inner}, so this is neither a Gemma 1, 2, 3'
    ' nor a RecurrentGemma tree'
  )


def _shape(path, shapes: Shapes, name: str, rank: int) -> tuple[int, ...]:
  found = shapes.get(name)
  if found is None or len(found) != rank:
    what = 'is missing' if found is None else f'has the shape {list(found)}'
    raise UserError(f'{path}: {name} {what}, expected {rank} dimensions')
  return found
