"""A decoder under a role of the bundle, as a Policy.

Here, and only here, prompts meet responses: rows of [prompt | response] are
laid out, positions skip padding, and features are shifted so that the i-th one
predicts the i-th response token. Prompts may be padded on either side; inside,
padding is on the left.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from alignjax.core.types import (
  Batch,
  Bundle,
  Embed,
  Model,
  Params,
  Policy,
  Scalar,
)
from alignjax.models import decoder
from alignjax.models.config import Config
from alignjax.policies.combine import restrict


class Layouts(NamedTuple):
  """One set of weights, cast, as training scans it and as decoding reads it.

  `single` is for decoding one row, `turned` for more. What a jitted caller does
  not use is never computed.
  """

  scanned: Params
  turned: Params
  single: Params


def decoding(weights: Layouts, rows: int) -> Layouts:
  """What `start` and `step` of `rows` rows use of a view."""
  tables = ('embedding', 'unembedding')
  head = {k: v for k, v in weights.scanned.items() if k in tables}
  if rows == 1:
    return Layouts(head, {}, weights.single)
  return Layouts(head, weights.turned, {})


def model(config: Config, tokenizer) -> Model:
  """The model of a config and its tokenizer, over legal tokens only.

  `tokenizer` has size, pad, stop and illegal (`data.tokenizer`).
  """
  illegal = sorted(
    set(tokenizer.illegal) | set(range(tokenizer.size, config.vocab_size))
  )

  def bare(role: str) -> Policy:
    return lm(config, role, tokenizer.pad)

  def legal(policy: Policy) -> Policy:
    return restrict(policy, illegal)

  return Model(
    init=lambda key: decoder.init(config, key),
    policy=lambda role: legal(bare(role)),
    stop=tuple(tokenizer.stop),
    pad=tokenizer.pad,
    scalar_init=lambda key: decoder.init_scalar(config, key),
    scalar=lambda role: scalar(config, role, tokenizer.pad),
    bare=bare,
    legal=legal,
    embed_init=lambda key, size=64: decoder.init_embedder(config, key, size),
    embed=lambda role: embedder(config, role),
  )


def lm(
  config: Config, role: str, pad: int = 0, *, prefill_chunk: int = 1024
) -> Policy:
  """The bare distribution of `role`: raw logits, nothing masked.

  Prompts wider than `prefill_chunk` are read that many columns at a time.
  """

  def view(bundle: Bundle, batch: Batch) -> Layouts:
    params = decoder.cast(config, bundle[role])
    return Layouts(
      params, decoder.turned(params), decoder.turned(params, single=True)
    )

  def features(weights: Layouts, batch: Batch):
    if 'response' not in batch:
      tokens, position = batch['tokens'], batch['position']
      x = decoder.features(
        config, weights.scanned, tokens, position, batch['segment']
      )
      return x[:, :-1], {}
    prompt, response = _to_the_right(batch['prompt'], pad), batch['response']
    rows, count, length = response.shape
    width = prompt.shape[1]
    wide = jnp.broadcast_to(prompt[:, None], (rows, count, width))
    tokens = jnp.concatenate([wide, response], axis=-1)
    position = _position(prompt, pad, width + length)
    position = jnp.repeat(position, count, axis=0)
    tokens = tokens.reshape(rows * count, width + length)
    x = decoder.features(config, weights.scanned, tokens, position)
    # Column width - 1 + i predicts response token i.
    x = x[:, width - 1 : -1]
    return x.reshape(rows, count, length, -1), {}

  def head(weights, x):
    return decoder.unembed(config, weights.scanned, x)

  def extend(weights, tokens, position, cache):
    single = len(tokens) == 1
    params = weights.single if single else weights.turned
    return decoder.extend(
      config, params, tokens, position, cache, single=single
    )

  def start(weights, batch: Batch, length: int):
    prompt = _to_the_right(batch['prompt'], pad)
    rows, width = prompt.shape
    chunk = min(width, prefill_chunk)
    extra = -width % chunk
    prompt = jnp.pad(prompt, ((0, 0), (extra, 0)), constant_values=pad)
    position = _position(prompt, pad, width + extra)
    cache = decoder.empty_cache(config, rows, length + extra)

    def read(cache, columns):
      tokens, position = columns
      x, cache = extend(weights, tokens, position, cache)
      return cache, x[:, -1]

    if width == chunk:
      cache, x = read(cache, (prompt, position))
    else:
      chunks = [
        jnp.moveaxis(x.reshape(rows, -1, chunk), 1, 0)
        for x in (prompt, position)
      ]
      cache, last = jax.lax.scan(read, cache, chunks)
      x = last[-1]
    cache['next'] = position[:, -1] + 1
    return head(weights, x), cache

  def step(weights, cache, tokens):
    position = cache['next']
    inner = {'column': cache['column'], 'layers': cache['layers']}
    x, inner = extend(weights, tokens[:, None], position[:, None], inner)
    return head(weights, x[:, 0]), inner | {'next': position + 1}

  def take(cache, rows):
    def gather(x):
      return jnp.take(x, rows, axis=0)

    layers = [{k: gather(v) for k, v in c.items()} for c in cache['layers']]
    return {
      'column': cache['column'],
      'layers': layers,
      'next': gather(cache['next']),
    }

  return Policy(view, features, head, start, step, take)


def scalar(config: Config, role: str, pad: int = 0) -> Scalar:
  """The decoder of `role` up to a scalar head; see `Model.scalar`."""
  trunk = lm(config, role, pad)

  def values(bundle: Bundle, batch: Batch):
    weights = trunk.view(bundle, batch)
    x, _ = trunk.features(weights, batch)
    return decoder.scalar(weights.scanned, x)

  return values


def embedder(config: Config, role: str) -> Embed:
  """The decoder of `role` up to a mean over a response; see `Model.embed`.

  The response is read alone, from position 0; a response without tokens gets
  zeros.
  """

  def embed(bundle: Bundle, batch: Batch):
    params = decoder.cast(config, bundle[role])
    shape = batch['response'].shape
    tokens = batch['response'].reshape(-1, shape[-1])
    mask = batch['mask'].reshape(-1, shape[-1])
    position = jnp.where(mask, jnp.cumsum(mask, axis=-1) - 1, -1)
    x = decoder.features(config, params, tokens, position.astype(jnp.int32))
    return decoder.embedding(params, x, mask).reshape(*shape[:-1], -1)

  return embed


def _to_the_right(prompt, pad: int):
  """Rows rolled until their last real token is in the last column."""
  width = prompt.shape[1]
  after = jnp.argmax(prompt[:, ::-1] != pad, axis=1, keepdims=True)
  column = (jnp.arange(width) - after) % width
  return jnp.take_along_axis(prompt, column, axis=1)


def _position(prompt, pad: int, length: int):
  """Positions of `length` columns, counted from the first real token; -1 on
  the left padding."""
  padding = jnp.sum(prompt == pad, axis=1, keepdims=True)
  return jnp.maximum(jnp.arange(length)[None] - padding, -1).astype(jnp.int32)
