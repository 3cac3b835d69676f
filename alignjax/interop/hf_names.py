"""What Hugging Face calls a canonical leaf, and how it lays it out.

One regex table per family; the first match wins. A linear map there is
[out, in] with the heads joined; here it is [in..., out...]. Reshapes and
transposes only: no number changes. Gemma 1 names one norm as the others name
another: its post_attention_layernorm is the norm before the feed-forward.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from alignjax.core import naming

Shape = tuple[int, ...]

# Before every name of a text decoder: text models, Gemma 3 with vision as
# published, and the same as transformers holds it in memory.
PREFIXES = ('model.', 'language_model.model.', 'model.language_model.')
HEADS = ('lm_head.weight', 'language_model.lm_head.weight')
# Gemma 3's image side, which is not the decoder's; its names stay as they are.
VISION = r'(model\.)?(vision_tower|multi_modal_projector)\..+'


class Form(NamedTuple):
  """How a leaf is laid out in a Hugging Face file.

  Attributes:
    shape: canonical shape -> shape in the file.
    load: tensor of the file, canonical shape -> leaf (perhaps a view).
    store: leaf -> tensor of the file (perhaps a view).
  """

  shape: Callable[[Shape], Shape]
  load: Callable[[np.ndarray, Shape], np.ndarray]
  store: Callable[[np.ndarray], np.ndarray]


def _linear(inputs: int) -> Form:
  """[in..., out...] <-> [out, in]; the first `inputs` axes are inputs."""

  def joined(shape: Shape) -> Shape:
    return math.prod(shape[:inputs]), math.prod(shape[inputs:])

  return Form(
    shape=lambda shape: joined(shape)[::-1],
    load=lambda x, shape: x.T.reshape(shape),
    store=lambda x: x.reshape(joined(x.shape)).T,
  )


SAME = Form(lambda shape: shape, lambda x, shape: x, lambda x: x)
LINEAR = _linear(1)
FROM_HEADS = _linear(2)
# [taps, E] <-> [E, 1, taps]; the last tap is the current token in both.
CONV = Form(
  shape=lambda shape: (shape[1], 1, shape[0]),
  load=lambda x, shape: x[:, 0, :].T,
  store=lambda x: x.T[:, None, :],
)

Rows = tuple[tuple[str, tuple[str, Form]], ...]

_LAYER = 'layers.{layer}.'
_GEMMA_1: Rows = (
  ('embedding', ('embed_tokens.weight', SAME)),
  ('final_norm', ('norm.weight', SAME)),
  (r'.*/pre_attn_norm', (_LAYER + 'input_layernorm.weight', SAME)),
  (r'.*/pre_ffw_norm', (_LAYER + 'post_attention_layernorm.weight', SAME)),
  (r'.*/attn/[qkv]', (_LAYER + 'self_attn.{last}_proj.weight', LINEAR)),
  (r'.*/attn/o', (_LAYER + 'self_attn.o_proj.weight', FROM_HEADS)),
  (r'.*/ffw/(gate|up|down)', (_LAYER + 'mlp.{last}_proj.weight', LINEAR)),
)
_GEMMA_2: Rows = (
  (r'.*/post_attn_norm', (_LAYER + 'post_attention_layernorm.weight', SAME)),
  (r'.*/pre_ffw_norm', (_LAYER + 'pre_feedforward_layernorm.weight', SAME)),
  (r'.*/post_ffw_norm', (_LAYER + 'post_feedforward_layernorm.weight', SAME)),
  (r'.*/attn/[qk]_norm', (_LAYER + 'self_attn.{last}.weight', SAME)),
  *_GEMMA_1,
)
_BLOCK = _LAYER + 'temporal_block.'
_LRU = _BLOCK + 'rg_lru.'
_RECURRENT: Rows = (
  ('embedding', ('embed_tokens.weight', SAME)),
  ('final_norm', ('final_norm.weight', SAME)),
  (
    r'.*/pre_(attn|recurrent)_norm',
    (_LAYER + 'temporal_pre_norm.weight', SAME),
  ),
  (r'.*/pre_ffw_norm', (_LAYER + 'channel_pre_norm.weight', SAME)),
  (r'.*/attn/[qkv]', (_BLOCK + '{last}_proj.weight', LINEAR)),
  (r'.*/attn/o', (_BLOCK + 'o_proj.weight', FROM_HEADS)),
  (r'.*/attn/o_bias', (_BLOCK + 'o_proj.bias', SAME)),
  (r'.*/recurrent/(x|y|out)', (_BLOCK + 'linear_{last}.weight', LINEAR)),
  (r'.*/recurrent/(x|y|out)_bias', (_BLOCK + 'linear_{stem}.bias', SAME)),
  (r'.*/recurrent/conv', (_BLOCK + 'conv_1d.weight', CONV)),
  (r'.*/recurrent/conv_bias', (_BLOCK + 'conv_1d.bias', SAME)),
  (r'.*/recurrent/a_param', (_LRU + 'recurrent_param', SAME)),
  (r'.*/recurrent/a_gate', (_LRU + 'recurrent_gate_weight', SAME)),
  (r'.*/recurrent/a_gate_bias', (_LRU + 'recurrent_gate_bias', SAME)),
  (r'.*/recurrent/input_gate', (_LRU + 'input_gate_weight', SAME)),
  (r'.*/recurrent/input_gate_bias', (_LRU + 'input_gate_bias', SAME)),
  (
    r'.*/ffw/(gate|up|down)',
    (_LAYER + 'mlp_block.{last}_proj.weight', LINEAR),
  ),
  (
    r'.*/ffw/(gate|up|down)_bias',
    (_LAYER + 'mlp_block.{stem}_proj.bias', SAME),
  ),
)
# By model_type of config.json.
TABLES: dict[str, Rows] = {
  'gemma': _GEMMA_1,
  'gemma2': _GEMMA_2,
  'gemma3_text': _GEMMA_2,
  'gemma3': _GEMMA_2,
  'recurrent_gemma': _RECURRENT,
}


def tensor(model_type: str, leaf: str) -> tuple[str, Form]:
  """Name of a leaf's tensor, without prefix, and its form.

  Raises UserError for a leaf that the family does not have.
  """
  table, what = TABLES[model_type], f'Hugging Face names of {model_type}'
  template, form = naming.lookup(table, leaf, what)
  layer, _, rest = leaf.removeprefix('layer_').partition('/')
  last = rest.rpartition('/')[2]
  stem = last.removesuffix('_bias')
  return template.format(layer=layer, last=last, stem=stem), form
