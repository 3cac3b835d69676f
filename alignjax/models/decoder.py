"""The decoder: a list of mixers between an embedding and its transpose.

Training scans over whole pattern groups, so compile time is that of one group;
a remainder is unrolled. Decoding unrolls every layer over its own cache.
Parameters are plain dicts in the stacked layout of `core.tree`; `canonical`
and `stacked` convert. Everything is a pure function of (config, params).
"""

import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from alignjax.core import naming, placement, tree
from alignjax.core.types import Params
from alignjax.kernels.dense import linear_turned, softcap
from alignjax.kernels.embedding import lookup
from alignjax.models import cache as caches
from alignjax.models import recurrent, sharding
from alignjax.models.attention import Attention
from alignjax.models.config import Config
from alignjax.models.layers import FeedForward, rms_norm, unit

_keep = jax.checkpoint_policies.save_only_these_names
# What a layer keeps for its backward pass, from least to most memory: nothing
# but its input; what its feed-forward returns, which saves the widest of its
# products; every product; everything.
REMAT = {
  'full': jax.checkpoint_policies.nothing_saveable,
  'outputs': _keep('ffw'),
  'products': _keep(
    *('q', 'k', 'v', 'kernel', 'heads', 'mixer', 'gate', 'up', 'ffw')
  ),
  'none': None,
}


# Canonical leaf -> how many leading dimensions of a linear map are inputs.
INPUTS = (
  (r'.*/(attn/[qkv]|ffw/(gate|up|down)|recurrent/(x|y|out))', 1),
  (r'.*/attn/o', 2),
  (r'.*', 0),
)
# Linear maps that `turned` holds outputs first, for several rows and for one.
TURNED = ('q', 'k', 'v', 'o', 'gate', 'up', 'down', 'x', 'y', 'out')
TURNED_SINGLE = ('o', 'down')


class Block(nn.Module):
  """One layer: mixer and feed-forward around the residual stream."""

  config: Config
  kind: str
  turned: tuple[str, ...] = ()

  @nn.compact
  def __call__(
    self, x, position, segment=None, block=None, cache=None, column=0
  ):
    c = self.config

    def norm(name, y):
      scale = self.param(name, nn.initializers.zeros, (c.width,))
      return rms_norm(y, scale)

    if self.kind == 'recurrent':
      y = norm('pre_recurrent_norm', x)
      # Documents start at position 0: it needs no segments.
      mixer = recurrent.Recurrent(c, self.turned, name='recurrent')
      y, cache = mixer(y, position, cache)
    else:
      y = norm('pre_attn_norm', x)
      mixer = Attention(c, self.kind, self.turned, name='attn')
      y, cache = mixer(y, position, segment, block, cache, column)
    y = checkpoint_name(y, 'mixer')
    x = x + (norm('post_attn_norm', y) if c.post_norm else y)
    y = FeedForward(c, self.turned, name='ffw')(norm('pre_ffw_norm', x))
    y = checkpoint_name(y, 'ffw')
    return x + (norm('post_ffw_norm', y) if c.post_norm else y), cache


def init(config: Config, key) -> Params:
  """Random parameters, float32, stacked. Call under jit.

  Gemma draws every matrix at `init_std`; RecurrentGemma by fan-in (Griffin,
  arXiv 2402.19427).
  """
  return stacked(config, _init(config, key))


def init_scalar(config: Config, key) -> Params:
  """`init` with a scalar head, which starts at 0 and so does its output."""
  head = jnp.zeros((config.width, 1), jnp.float32)
  return init(config, key) | {'scalar_head': head}


def init_embedder(config: Config, key, size: int) -> Params:
  """`init` with an embedding head of `size` dimensions, drawn by fan-in."""
  shape = (config.width, size)
  head = jax.random.normal(jax.random.fold_in(key, config.layers), shape)
  params = init(config, key)
  return params | {'embedding_head': head * config.width**-0.5}


def _init(config: Config, key) -> dict[str, Any]:
  keys = jax.random.split(key, config.layers + 1)
  x = jnp.zeros((1, 1, config.width))
  position = jnp.zeros((1, 1), jnp.int32)
  griffin = config.init == 'griffin'
  std = config.width**-0.5 if griffin else config.init_std
  table = (config.vocab_size, config.width)
  params: dict[str, Any] = {
    'embedding': std * jax.random.normal(keys[-1], table),
    'final_norm': jnp.zeros((config.width,)),
  }
  for i in range(config.layers):
    block = Block(config, config.kind(i))
    params[f'layer_{i}'] = block.init(keys[i], x, position)['params']
  return params


def cast(config: Config, params: Params) -> Params:
  """Parameters in the compute dtype: once per call, outside any loop.

  Scales of norms and decays stay as they are: they enter float32 arithmetic,
  and 1 + scale or exp(-8 softplus(p)) would feel the rounding. So would the
  regression of a scalar head.
  """

  def leaf(name, x):
    exact = re.fullmatch(r'(.*/)?(\w+_norm|a_param|\w+_head)', name)
    return x if exact else x.astype(config.dtype)

  return sharding.stored(tree.map_named(leaf, params))


def stacked(config: Config, params: Params) -> Params:
  """Canonical tree -> what this module computes with."""
  return tree.stack(params, len(config.pattern))


def canonical(params: Params) -> Params:
  """What this module computes with -> canonical tree."""
  return tree.unstack(params)


def turned(params: Params, *, single: bool = False) -> Params:
  """Stacked -> what `extend` reads: a leaf per layer, outputs before inputs.

  Made once, outside a decode loop, which must not slice or turn weights for
  every token. For a `single` row only the maps to fewer channels are turned: a
  CPU multiplies one vector fastest along the longer side of a matrix.
  """
  names = TURNED_SINGLE if single else TURNED

  def turn(name, x):
    inputs = naming.lookup(INPUTS, name, 'linear maps')
    turned = name.rpartition('/')[2] in names
    if turned:
      x = jnp.moveaxis(x, range(inputs), range(-inputs, 0))
    return sharding.decoding(name, x, inputs, turned)

  return tree.map_named(turn, canonical(params))


def features(
  config: Config,
  params: Params,
  tokens: Int[Array, 'B T'],
  position: Int[Array, 'B T'],
  segment: Int[Array, 'B T'] | None = None,
  block: Int[Array, 'B T'] | None = None,
) -> Float[Array, 'B T D']:
  """Whole sequences up to the normalised last hidden state.

  Args:
    config: of the decoder.
    params: stacked, in the compute dtype (`cast`).
    tokens: ids.
    position: counts from 0 in every document; -1 is padding.
    segment: documents of a packed row.
    block: equal non-zero columns see each other (image tokens).
  """
  x = embed(config, params['embedding'], tokens)
  period = len(config.pattern)

  def run(x, block_params, kind):
    variables = {'params': sharding.gathered(block_params)}
    x = Block(config, kind).apply(variables, x, position, segment, block)[0]
    return placement.constrain(x, placement.ROWS, placement.COLUMNS)

  def group(x, group_params):
    for p, kind in enumerate(config.pattern):
      x = run(x, group_params[str(p)], kind)
    return x, None

  if config.remat != 'none':
    # Layer by layer: a checkpoint of the group around these would compute all
    # but its last layer a third time. The barrier against common expressions
    # also ties a layer's recomputation to its gradient's arrival; without it a
    # whole group is recomputed first and held. For Gemma 3's six layers that
    # saves 2 of 17 GiB and costs 3% of the compute; in groups of two it saves
    # little and costs up to 6%.
    run = jax.checkpoint(
      run, policy=REMAT[config.remat], prevent_cse=period > 2, static_argnums=2
    )
  if 'groups' in params:
    x, _ = jax.lax.scan(group, x, params['groups'], unroll=config.unroll)
  for i in range(config.layers // period * period, config.layers):
    x = run(x, params[f'layer_{i}'], config.kind(i))
  x = rms_norm(x, params['final_norm'])
  # Rows go to where the vocabulary is, once; what they cause comes back.
  return placement.moved(x, ('data',), (placement.ROWS, placement.COLUMNS))


def layer(
  config: Config,
  index: int,
  params: Params,
  x: Float[Array, 'B T D'],
  position: Int[Array, 'B T'],
  segment: Int[Array, 'B T'] | None = None,
  block: Int[Array, 'B T'] | None = None,
) -> Float[Array, 'B T D']:
  """One layer alone; `params` is the canonical subtree `layer_{index}`.

  For models whose layers are in memory one at a time.
  """
  return Block(config, config.kind(index)).apply(
    {'params': params}, x, position, segment, block
  )[0]


def unembed(
  config: Config, params: Params, x: Float[Array, '... D']
) -> Float[Array, '... V']:
  """Float32 logits of features, by `unembedding` where it is not tied."""
  table = params.get('unembedding', params['embedding'])
  logits = linear_turned(x, table, dtype=jnp.float32)
  middle = [None] * (logits.ndim - 2)
  logits = placement.constrain(logits, 'data', *middle, placement.VOCABULARY)
  if config.final_softcap is not None:
    logits = softcap(logits, config.final_softcap)
  return logits


def scalar(params: Params, x: Float[Array, '... D']) -> Float[Array, '...']:
  """One float32 number per position of features: the head of `init_scalar`."""
  return (x.astype(jnp.float32) @ params['scalar_head'])[..., 0]


def embedding(
  params: Params, x: Float[Array, 'B T D'], mask: Array
) -> Float[Array, 'B E']:
  """One unit vector per row: the head of `init_embedder` on the mean feature.

  The mean is over True of mask [B, T]; a row of none gets zeros.
  """
  weight = mask[..., None].astype(jnp.float32)
  total = jnp.sum(x.astype(jnp.float32) * weight, axis=1)
  mean = total / jnp.maximum(jnp.sum(weight, axis=1), 1)
  return unit(mean @ params['embedding_head'])


def apply(
  config: Config,
  params: Params,
  tokens: Int[Array, 'B T'],
  position: Int[Array, 'B T'] | None = None,
  segment: Int[Array, 'B T'] | None = None,
  block: Int[Array, 'B T'] | None = None,
) -> Float[Array, 'B T V']:
  """Logits of whole sequences: `unembed` of `features`, parameters cast."""
  params = cast(config, params)
  if position is None:
    position = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  x = features(config, params, tokens, position, segment, block)
  return unembed(config, params, x)


def empty_cache(config: Config, batch: int, length: int) -> dict[str, Any]:
  """A cache for `length` columns: `column` written, `layers` of slots.

  Only global layers grow with `length`.
  """

  def one(i):
    kind = config.kind(i)
    if kind == 'recurrent':
      return recurrent.empty(config, batch)
    slots = min(config.span, length) if kind == 'local' else length
    return caches.empty(
      batch, slots, config.kv_heads, config.head_dim, config.dtype
    )

  return {
    'column': jnp.zeros((), jnp.int32),
    'layers': [one(i) for i in range(config.layers)],
  }


def extend(
  config: Config,
  params: Params,
  tokens: Int[Array, 'B T'],
  position: Int[Array, 'B T'],
  cache: dict[str, Any],
  block: Int[Array, 'B T'] | None = None,
  *,
  single: bool = False,
) -> tuple[Float[Array, 'B T D'], dict[str, Any]]:
  """Features of the next T columns (a prompt chunk or one token).

  Equals `features` of the whole sequence at those columns; position -1 marks
  padding, on either side of a chunk. `params` are `turned` (and `single` says
  how), in the compute dtype.
  """
  names = TURNED_SINGLE if single else TURNED
  x = embed(config, params['embedding'], tokens)
  layers = []
  for i in range(config.layers):
    x, one = Block(config, config.kind(i), turned=names).apply(
      {'params': params[f'layer_{i}']},
      x,
      position,
      block=block,
      cache=cache['layers'][i],
      column=cache['column'],
    )
    layers.append(one)
  cache = {'column': cache['column'] + tokens.shape[1], 'layers': layers}
  return rms_norm(x, params['final_norm']), cache


def embed(
  config: Config, table: Float[Array, 'V D'], tokens: Int[Array, 'B T']
) -> Float[Array, 'B T D']:
  """Rows of the table times sqrt(D), as the released weights expect it.

  The factor has the table's dtype; RecurrentGemma's is bfloat16 in any dtype.
  """
  factor = jnp.sqrt(jnp.float32(config.width))
  if config.round_embed_scale:
    factor = factor.astype(jnp.bfloat16)
  return lookup(table, tokens) * factor.astype(table.dtype)
