"""DeepMind's parameter trees, as a table: our leaf, their tensor, both shapes.

Shapes are spelt in letters: V rows of the embedding, D width, H query heads,
K key/value heads, h head width, F feed-forward width, E recurrence width, G
gate blocks of width b, C taps of the convolution, 1 a dimension of size one.
'D Hh' is a tensor whose second dimension merges heads and head width. No files
here, and no arrays but the one that is being turned.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from alignjax.models.config import Config


class Piece(NamedTuple):
  """Where a canonical leaf lives in a DeepMind tree.

  Attributes:
    tensor: name in the nested layout, parts joined by '/'.
    index: number inside a tensor that holds several leaves, or None.
    theirs: letters of their shape, without the axis that `index` counts.
    ours: letters of the canonical shape.
    sizes: letter -> size.
    parts: how many leaves the tensor holds.
  """

  tensor: str
  index: int | None
  theirs: str
  ours: str
  sizes: Mapping[str, int]
  parts: int = 1

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of the whole tensor in the nested layout."""
    part = tuple(self._size(word) for word in self.theirs.split())
    return part if self.index is None else (self.parts, *part)

  @property
  def leaf_shape(self) -> tuple[int, ...]:
    """Canonical shape."""
    return tuple(self._size(word) for word in self.ours.split())

  def read(self, part: np.ndarray) -> np.ndarray:
    """Their part -> the canonical leaf, C-contiguous."""
    letters = self._letters()
    array = part.reshape([self.sizes[x] for x in letters])
    axes = [letters.index(x) for x in self.ours.split()]
    return np.ascontiguousarray(array.transpose(axes))

  def write(self, leaf: np.ndarray) -> np.ndarray:
    """The canonical leaf -> their part, C-contiguous."""
    ours = self.ours.split()
    array = leaf.transpose([ours.index(x) for x in self._letters()])
    shape = [self._size(word) for word in self.theirs.split()]
    return np.ascontiguousarray(array).reshape(shape)

  def _letters(self) -> str:
    return self.theirs.replace(' ', '').replace('1', '')

  def _size(self, word: str) -> int:
    return math.prod(1 if x == '1' else self.sizes[x] for x in word)


# Canonical name inside a layer, their name inside it, their shape, ours where
# it differs. 'name[i/n]': part i of n along a leading axis.
_ATTENTION = (
  ('pre_attn_norm', 'pre_attention_norm/scale', 'D'),
  ('attn/q', 'attn/q_einsum/w', 'H D h', 'D H h'),
  ('attn/k', 'attn/kv_einsum/w[0/2]', 'K D h', 'D K h'),
  ('attn/v', 'attn/kv_einsum/w[1/2]', 'K D h', 'D K h'),
  ('attn/o', 'attn/attn_vec_einsum/w', 'H h D'),
  ('pre_ffw_norm', 'pre_ffw_norm/scale', 'D'),
  ('ffw/down', 'mlp/linear', 'F D'),
)
_FUSED = {  # as many key/value heads as query heads: one tensor
  'attn/q': ('attn/q', 'attn/qkv_einsum/w[0/3]', 'H D h', 'D H h'),
  'attn/k': ('attn/k', 'attn/qkv_einsum/w[1/3]', 'K D h', 'D K h'),
  'attn/v': ('attn/v', 'attn/qkv_einsum/w[2/3]', 'K D h', 'D K h'),
}
_QK_NORM = (
  ('attn/q_norm', 'attn/_query_norm/scale', 'h'),
  ('attn/k_norm', 'attn/_key_norm/scale', 'h'),
)
_POST_NORM = (
  ('post_attn_norm', 'post_attention_norm/scale', 'D'),
  ('post_ffw_norm', 'post_ffw_norm/scale', 'D'),
)
_GRIFFIN = (
  ('pre_ffw_norm', 'channel_pre_norm/scale', 'D'),
  ('ffw/gate', 'mlp_block/ffw_up/w[0/2]', 'D F'),
  ('ffw/up', 'mlp_block/ffw_up/w[1/2]', 'D F'),
  ('ffw/gate_bias', 'mlp_block/ffw_up/b[0/2]', '1 1 F', 'F'),
  ('ffw/up_bias', 'mlp_block/ffw_up/b[1/2]', '1 1 F', 'F'),
  ('ffw/down', 'mlp_block/ffw_down/kernel', 'F D'),
  ('ffw/down_bias', 'mlp_block/ffw_down/bias', 'D'),
)
_GRIFFIN_ATTENTION = (
  ('pre_attn_norm', 'temporal_pre_norm/scale', 'D'),
  ('attn/q', 'attention_block/proj_q/kernel', 'D Hh', 'D H h'),
  ('attn/k', 'attention_block/proj_k/kernel', 'D Kh', 'D K h'),
  ('attn/v', 'attention_block/proj_v/kernel', 'D Kh', 'D K h'),
  ('attn/o', 'attention_block/proj_final/kernel', 'Hh D', 'H h D'),
  ('attn/o_bias', 'attention_block/proj_final/bias', 'D'),
)
_GRIFFIN_RECURRENT = (
  ('pre_recurrent_norm', 'temporal_pre_norm/scale', 'D'),
  ('recurrent/x', 'recurrent_block/linear_x/kernel', 'D E'),
  ('recurrent/x_bias', 'recurrent_block/linear_x/bias', 'E'),
  ('recurrent/y', 'recurrent_block/linear_y/kernel', 'D E'),
  ('recurrent/y_bias', 'recurrent_block/linear_y/bias', 'E'),
  ('recurrent/out', 'recurrent_block/linear_out/kernel', 'E D'),
  ('recurrent/out_bias', 'recurrent_block/linear_out/bias', 'D'),
  ('recurrent/conv', 'recurrent_block/conv_1d/w', 'C E'),
  ('recurrent/conv_bias', 'recurrent_block/conv_1d/b', 'E'),
  ('recurrent/a_param', 'recurrent_block/rg_lru/a_param', 'E'),
  *(
    row
    for gate in ('input_gate', 'a_gate')
    for row in (
      (f'recurrent/{gate}', f'recurrent_block/rg_lru/{gate}/w', 'G b B'),
      (f'recurrent/{gate}_bias', f'recurrent_block/rg_lru/{gate}/b', 'G b'),
    )
  ),
)


def transposed(config: Config) -> bool:
  """Whether a Gemma release stores gate and up as (2, F, D), not (2, D, F).

  Gemma 1 and Gemma 2 2B do not (spec: hyperparameters of the released sizes).
  """
  small = (config.width, config.layers) == (2304, 26)
  return config.post_norm and not (small and not config.qk_norm)


def pieces(
  config: Config, *, gating_transposed: bool, fused: bool
) -> dict[str, Piece]:
  """Canonical leaf -> its piece, for every leaf of a decoder.

  Args:
    config: of the decoder.
    gating_transposed: Gemma's gate and up are (2, F, D).
    fused: Gemma's q, k and v are one tensor; needs H == K.
  """
  sizes = {
    'V': config.vocab_size,
    'D': config.width,
    'H': config.heads,
    'K': config.kv_heads,
    'h': config.head_dim,
    'F': config.hidden,
    'E': config.lru_width,
    'C': config.conv_width,
    'G': config.heads,
    'b': config.lru_width // config.heads,
    'B': config.lru_width // config.heads,
  }
  out = {
    'embedding': Piece('embedder/input_embedding', None, 'V D', 'V D', sizes),
    'final_norm': Piece('final_norm/scale', None, 'D', 'D', sizes),
  }
  griffin = 'recurrent' in config.pattern
  for i in range(config.layers):
    for leaf, tensor, theirs, *ours in _rows(
      config, i, gating_transposed, fused
    ):
      tensor, _, part = tensor.partition('[')
      index, _, parts = part.rstrip(']').partition('/')
      out[f'layer_{i}/{leaf}'] = Piece(
        f'blocks.{i}/{tensor}' if griffin else f'layer_{i}/{tensor}',
        int(index) if part else None,
        theirs,
        ours[0] if ours else theirs,
        sizes,
        int(parts or 1),
      )
  return dict(sorted(out.items()))


def _rows(config: Config, layer: int, gating_transposed: bool, fused: bool):
  """Rows of the tables that hold for one layer."""
  kind = config.kind(layer)
  if kind == 'recurrent':
    return (*_GRIFFIN_RECURRENT, *_GRIFFIN)
  if 'recurrent' in config.pattern:
    return (*_GRIFFIN_ATTENTION, *_GRIFFIN)
  gating = 'F D' if gating_transposed else 'D F'
  rows = [_FUSED.get(row[0], row) if fused else row for row in _ATTENTION]
  rows += [
    ('ffw/gate', 'mlp/gating_einsum[0/2]', gating, 'D F'),
    ('ffw/up', 'mlp/gating_einsum[1/2]', gating, 'D F'),
  ]
  rows += _QK_NORM if config.qk_norm else ()
  return rows + list(_POST_NORM if config.post_norm else ())
