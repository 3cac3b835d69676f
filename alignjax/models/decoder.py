"""The decoder: a list of mixers between an embedding and its transpose.

Training scans over whole pattern groups, so compile time is that of one group;
a remainder is unrolled. Decoding unrolls every layer over its own cache.
Parameters are plain dicts in the stacked layout of `core.tree`; `canonical`
and `stacked` convert. Everything is a pure function of (config, params).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from alignjax.core import tree
from alignjax.core.types import Params, UserError
from alignjax.models import cache as caches
from alignjax.models.attention import Attention
from alignjax.models.layers import FeedForward, rms_norm

REMAT = {
  'none': None,
  'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  'full': jax.checkpoint_policies.nothing_saveable,
}


@dataclasses.dataclass(frozen=True)
class Config:
  """Shape and numbers of a decoder.

  Attributes:
    vocab_size: rows of the embedding, V.
    width: D.
    hidden: feed-forward width per branch.
    layers, heads, kv_heads, head_dim: as usual; heads % kv_heads == 0.
    pattern: kinds of layer, cycled; a last partial cycle is the remainder.
    window: keys a local layer sees, itself included.
    query_scale: factor on queries; 0 = head_dim ** -0.5.
    attn_softcap, final_softcap: caps on logits; None = no cap.
    rope_base, rope_scale: of global layers; local ones use rope_base_local.
    qk_norm: RMSNorm on queries and keys. post_norm: after each sublayer.
    init_std: of every matrix at initialisation.
    dtype: compute dtype of activations and of the weights while computing.
    remat: what the backward pass recomputes: 'none', 'dots', 'full'.
    unroll: pattern groups per iteration of the training scan; more compiles
      longer and lets the compiler fuse across layers.
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
  query_scale: float = 0.0
  attn_softcap: float | None = None
  final_softcap: float | None = None
  rope_base: float = 10_000.0
  rope_base_local: float = 10_000.0
  rope_scale: float = 1.0
  qk_norm: bool = False
  post_norm: bool = False
  init_std: float = 0.01
  dtype: str = 'float32'
  remat: str = 'none'
  unroll: int = 1

  def __post_init__(self):
    object.__setattr__(self, 'pattern', tuple(self.pattern))
    if not self.query_scale:
      object.__setattr__(self, 'query_scale', self.head_dim**-0.5)
    if self.heads % self.kv_heads:
      raise UserError(
        f'model: heads = {self.heads} is not a multiple of '
        f'kv_heads = {self.kv_heads}'
      )
    if unknown := set(self.pattern) - {'local', 'global'}:
      raise UserError(
        f'model.pattern: {sorted(unknown)} are no kinds of layer; '
        "expected 'local' or 'global'"
      )
    if self.remat not in REMAT:
      raise UserError(
        f'model.remat: found {self.remat!r}, expected one of {sorted(REMAT)}'
      )
    if self.dtype not in ('float32', 'bfloat16'):
      raise UserError(
        f"model.dtype: found {self.dtype!r}, expected 'float32' or 'bfloat16'"
      )

  def kind(self, layer: int) -> str:
    return self.pattern[layer % len(self.pattern)]


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


class Block(nn.Module):
  """One layer: mixer and feed-forward around the residual stream."""

  config: Config
  kind: str

  @nn.compact
  def __call__(self, x, position, segment=None, cache=None, column=0):
    c = self.config

    def norm(name, y):
      scale = self.param(name, nn.initializers.zeros, (c.width,))
      return rms_norm(y, scale)

    mixer = Attention(c, self.kind, name='attn')
    y, cache = mixer(norm('pre_attn_norm', x), position, segment, cache, column)
    x = x + (norm('post_attn_norm', y) if c.post_norm else y)
    y = FeedForward(c.hidden, c.init_std, name='ffw')(norm('pre_ffw_norm', x))
    return x + (norm('post_ffw_norm', y) if c.post_norm else y), cache


def init(config: Config, key) -> Params:
  """Random parameters, float32, stacked. Call under jit."""
  keys = jax.random.split(key, config.layers + 1)
  x = jnp.zeros((1, 1, config.width))
  position = jnp.zeros((1, 1), jnp.int32)
  params: dict[str, Any] = {
    'embedding': config.init_std
    * jax.random.normal(keys[-1], (config.vocab_size, config.width)),
    'final_norm': jnp.zeros((config.width,)),
  }
  for i in range(config.layers):
    block = Block(config, config.kind(i))
    params[f'layer_{i}'] = block.init(keys[i], x, position)['params']
  return stacked(config, params)


def cast(config: Config, params: Params) -> Params:
  """Parameters in the compute dtype: once per call, outside any loop."""
  return tree.cast(params, config.dtype)


def stacked(config: Config, params: Params) -> Params:
  """Canonical tree -> what this module computes with."""
  return tree.stack(params, len(config.pattern))


def canonical(params: Params) -> Params:
  """What this module computes with -> canonical tree."""
  return tree.unstack(params)


def features(
  config: Config,
  params: Params,
  tokens: Int[Array, 'B T'],
  position: Int[Array, 'B T'],
  segment: Int[Array, 'B T'] | None = None,
) -> Float[Array, 'B T D']:
  """Whole sequences up to the normalised last hidden state.

  `params` are stacked, in the compute dtype (`cast`).
  """
  x = _embed(config, params, tokens)
  period = len(config.pattern)

  def layer(x, block_params, kind):
    block = Block(config, kind)
    return block.apply({'params': block_params}, x, position, segment)[0]

  def group(x, group_params):
    for p, kind in enumerate(config.pattern):
      x = layer(x, group_params[str(p)], kind)
    return x, None

  if config.remat != 'none':
    policy = REMAT[config.remat]
    group = jax.checkpoint(group, policy=policy, prevent_cse=False)
    layer = jax.checkpoint(layer, policy=policy, static_argnums=2)
  if 'groups' in params:
    x, _ = jax.lax.scan(group, x, params['groups'], unroll=config.unroll)
  for i in range(config.layers // period * period, config.layers):
    x = layer(x, params[f'layer_{i}'], config.kind(i))
  return rms_norm(x, params['final_norm'])


def unembed(
  config: Config, params: Params, x: Float[Array, '... D']
) -> Float[Array, '... V']:
  """Float32 logits of features."""
  logits = jnp.einsum(
    '...d,vd->...v',
    x,
    params['embedding'],
    preferred_element_type=jnp.float32,
  )
  if config.final_softcap is not None:
    logits = config.final_softcap * jnp.tanh(logits / config.final_softcap)
  return logits


def apply(
  config: Config,
  params: Params,
  tokens: Int[Array, 'B T'],
  position: Int[Array, 'B T'] | None = None,
  segment: Int[Array, 'B T'] | None = None,
) -> Float[Array, 'B T V']:
  """Logits of whole sequences: `unembed` of `features`, parameters cast."""
  params = cast(config, params)
  if position is None:
    position = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  x = features(config, params, tokens, position, segment)
  return unembed(config, params, x)


def empty_cache(config: Config, batch: int, length: int) -> dict[str, Any]:
  """A cache for `length` columns: `column` written, `layers` of slots."""

  def layer(i):
    local = config.kind(i) == 'local'
    slots = min(config.window, length) if local else length
    return caches.empty(
      batch, slots, config.kv_heads, config.head_dim, config.dtype
    )

  return {
    'column': jnp.zeros((), jnp.int32),
    'layers': [layer(i) for i in range(config.layers)],
  }


def extend(
  config: Config,
  params: Params,
  tokens: Int[Array, 'B T'],
  position: Int[Array, 'B T'],
  cache: dict[str, Any],
) -> tuple[Float[Array, 'B T D'], dict[str, Any]]:
  """Features of the next T columns (a prompt chunk or one token).

  Equals `features` of the whole sequence at those columns; position -1 marks
  padding. `params` are canonical, in the compute dtype: a decode loop must not
  slice or cast weights for every token.
  """
  x = _embed(config, params, tokens)
  layers = []
  for i in range(config.layers):
    x, layer = Block(config, config.kind(i)).apply(
      {'params': params[f'layer_{i}']},
      x,
      position,
      cache=cache['layers'][i],
      column=cache['column'],
    )
    layers.append(layer)
  cache = {'column': cache['column'] + tokens.shape[1], 'layers': layers}
  return rms_norm(x, params['final_norm']), cache


def _embed(config: Config, params: Params, tokens):
  table = params['embedding']
  # The released weights expect sqrt(D) in the dtype of the table.
  return table[tokens] * jnp.sqrt(jnp.float32(config.width)).astype(table.dtype)
