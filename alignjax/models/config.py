"""What a decoder is, in numbers: one frozen dataclass for every family.

Presets fill it, `model.json` stores it, modules read it. No arrays here.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from alignjax.core.errors import UserError

KINDS = ('local', 'global', 'recurrent')
# Field -> what it may hold.
_CHOICES = {
  'dtype': ('float32', 'bfloat16'),
  'remat': ('none', 'products', 'outputs', 'full'),
  'init': ('normal', 'griffin'),
  'attention': ('auto', 'plain', 'chunked', 'splash'),
  'recurrence': ('auto', 'associative', 'linear', 'pallas'),
}
# Fields that say how a model is computed or begun, not which function it is.
FREE = (
  'dtype',
  'remat',
  'unroll',
  'attention',
  'recurrence',
  'init',
  'init_std',
)


@dataclasses.dataclass(frozen=True)
class Config:
  """Shape and numbers of a decoder.

  Attributes:
    vocab_size: rows of the embedding, V.
    width: D.
    hidden: feed-forward width per branch.
    layers, heads, kv_heads, head_dim: as usual; heads % kv_heads == 0.
    pattern: kinds of layer, cycled; a last partial cycle is the remainder.
    window: W of the local layers.
    window_self: whether W counts the query's own key. False sees W earlier
      keys and itself, as DeepMind's RecurrentGemma does.
    query_scale: factor on queries; 0 = head_dim ** -0.5.
    attn_softcap, final_softcap: caps on logits; None = no cap.
    rope_base, rope_scale: of global layers; local ones use rope_base_local.
    rope_fraction: leading share of head_dim that rotates.
    qk_norm: RMSNorm on queries and keys. post_norm: after each sublayer.
    bias: on every linear map but queries, keys and values.
    lru_width: E of the recurrent layers; 0 = width.
    conv_width: taps of their convolution.
    round_embed_scale: sqrt(D) is rounded to bfloat16 whatever the dtype.
    init: 'normal' draws every matrix at init_std, 'griffin' by fan-in.
    dtype: compute dtype of activations and of the weights while computing.
    remat: what the backward pass recomputes, from nothing to all but the
      inputs of layers (`decoder.REMAT`).
    unroll: pattern groups per iteration of the training scan; more compiles
      longer and lets the compiler fuse across layers.
    attention, recurrence: implementation; 'auto' goes by platform and shape.
  """

  vocab_size: int
  width: int
  hidden: int
  layers: int
  heads: int
  kv_heads: int
  head_dim: int
  pattern: tuple[str, ...] = ('global',)
  window: int = 4096
  window_self: bool = True
  query_scale: float = 0.0
  attn_softcap: float | None = None
  final_softcap: float | None = None
  rope_base: float = 10_000.0
  rope_base_local: float = 10_000.0
  rope_scale: float = 1.0
  rope_fraction: float = 1.0
  qk_norm: bool = False
  post_norm: bool = False
  bias: bool = False
  lru_width: int = 0
  conv_width: int = 4
  round_embed_scale: bool = False
  init: str = 'normal'
  init_std: float = 0.01
  dtype: str = 'float32'
  remat: str = 'none'
  unroll: int = 1
  attention: str = 'auto'
  recurrence: str = 'auto'

  def __post_init__(self):
    object.__setattr__(self, 'pattern', tuple(self.pattern))
    if not self.query_scale:
      object.__setattr__(self, 'query_scale', self.head_dim**-0.5)
    if not self.lru_width:
      object.__setattr__(self, 'lru_width', self.width)
    _check(self)

  @property
  def span(self) -> int:
    """Keys that a local layer sees, the query's own included."""
    return self.window + (not self.window_self)

  def kind(self, layer: int) -> str:
    """Kind of layer number `layer`."""
    return self.pattern[layer % len(self.pattern)]

  def count(self, kind: str) -> int:
    """Number of layers of a kind."""
    return sum(self.kind(i) == kind for i in range(self.layers))


def _check(config: Config) -> None:
  for field, choices in _CHOICES.items():
    found = getattr(config, field)
    if found not in choices:
      raise UserError(
        f'model.{field}: found {found!r}, expected one of {list(choices)}'
      )
  sizes = 'vocab_size width hidden layers heads kv_heads head_dim window'
  for field in (*sizes.split(), 'conv_width', 'lru_width', 'unroll'):
    if getattr(config, field) < 1:
      raise UserError(
        f'model.{field}: found {getattr(config, field)}, expected at least 1'
      )
  if unknown := set(config.pattern) - set(KINDS):
    raise UserError(
      f'model.pattern: {sorted(unknown)} are no kinds of layer; expected'
      f' {list(KINDS)}'
    )
  for what, by in (('heads', 'kv_heads'), ('lru_width', 'heads')):
    if what == 'lru_width' and 'recurrent' not in config.pattern:
      continue
    if getattr(config, what) % getattr(config, by):
      raise UserError(
        f'model: {what} = {getattr(config, what)} is not a multiple of '
        f'{by} = {getattr(config, by)}'
      )


def from_json(values: Mapping[str, Any]) -> Config:
  """A Config from a dict of its fields."""
  known = {field.name for field in dataclasses.fields(Config)}
  if extra := sorted(set(values) - known):
    raise UserError(f'model: no such fields: {extra}; known: {sorted(known)}')
  try:
    return Config(**values)
  except TypeError as error:
    raise UserError(f'model: {error}') from None


def to_json(config: Config) -> dict[str, Any]:
  """Plain JSON of a Config; `from_json` reads it back."""
  return dataclasses.asdict(config) | {'pattern': list(config.pattern)}
