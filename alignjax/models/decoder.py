"""The decoder: a list of mixers between an embedding and its transpose.

Training scans over whole pattern groups, so compile time is that of one group;
a remainder is unrolled. Decoding unrolls every layer over its own cache.
Parameters are plain dicts in the stacked layout of `core.tree`; `canonical`
and `stacked` convert. Everything is a pure function of (config, params).
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from alignjax.core import tree
from alignjax.core.types import Params
from alignjax.models import cache as caches
from alignjax.models.attention import Attention
from alignjax.models.config import Config
from alignjax.models.layers import FeedForward, rms_norm

REMAT = {
  'none': None,
  'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  'full': jax.checkpoint_policies.nothing_saveable,
}


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
