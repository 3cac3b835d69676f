"""Decoding through caches equals the whole pass, for every family.

Any chunking of the columns, several wrap-arounds of the rings, and ragged
prompts padded on either side; RecurrentGemma under both rules of its window.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.core import naming, tree
from alignjax.models import decoder
from alignjax.models.config import Config
from alignjax.models.shapes import shapes
from alignjax.policies import lm
from tests import tiny
from tests.golden import weights

VOCAB, LENGTH, PAD = 60, 44, 0
COMMON = dict(
  vocab_size=VOCAB,
  width=24,
  hidden=40,
  heads=4,
  kv_heads=2,
  head_dim=8,
  window=8,
)
GRIFFIN = COMMON | dict(
  layers=5,
  heads=3,
  kv_heads=1,
  pattern=('recurrent', 'recurrent', 'local'),
  lru_width=30,
  bias=True,
  rope_fraction=0.5,
  final_softcap=3.0,
  round_embed_scale=True,
)
CONFIGS = {
  'gemma1': Config(**COMMON | dict(kv_heads=1), layers=2),
  'gemma2': Config(
    **COMMON,
    layers=5,
    pattern=('local', 'global'),
    query_scale=12**-0.5,
    attn_softcap=2.0,
    final_softcap=3.0,
    post_norm=True,
  ),
  'gemma3': Config(
    **COMMON,
    layers=7,
    pattern=('local',) * 5 + ('global',),
    rope_base=1e6,
    rope_scale=8.0,
    qk_norm=True,
    post_norm=True,
  ),
  'recurrentgemma': Config(**GRIFFIN, window_self=False),
  'recurrentgemma_self': Config(**GRIFFIN),
}
# 44 columns go round a ring of 8 or 9 slots more than four times. Few sizes, as
# each of them compiles.
CHUNKS = {
  'at once': [44],
  'by one': [1] * 44,
  'mixed': [12, 5, 1, 1, 12, 5, 5, 1, 1, 1],
  'prompt, then by one': [12, *[1] * 32],
}


@functools.cache
def parameters(family):
  """Canonical parameters, nothing of them zero.

  Matrices are smaller than in the golden models: with theirs, half a unit in
  the last place of the weights alone can move a logit by 2e-5.
  """
  specs = shapes(CONFIGS[family])
  values = weights.tree(5, {name: x.shape for name, x in specs.items()})
  gentle = {name: x * 0.6 if x.ndim > 1 else x for name, x in values.items()}
  return jax.tree.map(jnp.asarray, naming.nested(gentle))


@functools.partial(jax.jit, static_argnums=0)
def whole(config, params, tokens, position):
  params = decoder.stacked(config, params)
  return decoder.apply(config, params, tokens, position)


@functools.partial(jax.jit, static_argnums=0)
def extend(config, params, tokens, position, cache):
  x, cache = decoder.extend(config, params, tokens, position, cache)
  return decoder.unembed(config, params, x), cache


@jax.jit
def turned(params):
  return decoder.turned(params)


def by_chunks(config, params, tokens, position, chunks):
  """Logits of all columns, read into a cache a chunk at a time."""
  rows, length = tokens.shape
  params = turned(params)
  cache = decoder.empty_cache(config, rows, length)
  parts, column = [], 0
  for size in chunks:
    columns = slice(column, column + size)
    logits, cache = extend(
      config, params, tokens[:, columns], position[:, columns], cache
    )
    parts.append(logits)
    column += size
  assert column == length
  return jnp.concatenate(parts, axis=1)


@pytest.mark.parametrize('chunks', CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize('family', CONFIGS)
def test_any_chunking_equals_the_whole_pass(family, chunks):
  config, params = CONFIGS[family], parameters(family)
  tokens = weights.tokens(30, 2, LENGTH, VOCAB)
  position = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens.shape)
  tiny.check_logits(
    by_chunks(config, params, tokens, position, chunks),
    whole(config, params, tokens, position),
  )


@pytest.mark.parametrize('family', CONFIGS)
def test_ragged_chunks_padded_on_either_side(family):
  # Prompts in 12 columns: full, padded left, padded right, padded on both
  # sides; then 32 columns of what follows, wherever each row is.
  config, params = CONFIGS[family], parameters(family)
  tokens = weights.tokens(31, 4, LENGTH, VOCAB)
  first, last = np.array([0, 7, 0, 3]), np.array([12, 12, 9, 8])
  lengths = (last - first)[:, None]
  column = np.arange(12) - first[:, None]
  prompt = np.where((column >= 0) & (column < lengths), column, -1)
  position = np.concatenate([prompt, lengths + np.arange(32)], axis=1)
  position = position.astype(np.int32)
  real = position >= 0
  # The same rows without the padding, which then is all at the end.
  order = np.argsort(~real, axis=1, kind='stable')
  expected = whole(
    config,
    params,
    np.take_along_axis(tokens, order, axis=1),
    np.take_along_axis(position, order, axis=1),
  )
  back = np.argsort(order, axis=1)[..., None]
  expected = np.take_along_axis(np.asarray(expected), back, axis=1)
  # A column read alone may be padding only before a row's first token: a ring
  # has one slot for it, and something there would be lost (`cache.write`).
  for chunks in (
    [12, *[1] * 32],
    [12, 12, 5, 1, 1, 1, 12],
    [5, 5, 5, 12, 5, 12],
  ):
    logits = by_chunks(config, params, tokens, position, chunks)
    tiny.check_logits(logits[real], expected[real])


@pytest.mark.parametrize('prefill_chunk', [1024, 5])
@pytest.mark.parametrize('family', CONFIGS)
def test_a_policy_reads_and_goes_on(family, prefill_chunk):
  config, params = CONFIGS[family], parameters(family)
  policy = lm.lm(config, 'policy', PAD, prefill_chunk=prefill_chunk)
  tokens = weights.tokens(32, 3, LENGTH, VOCAB)
  lengths = np.array([13, 6, 10])
  prompt = np.zeros((3, 13), np.int32)
  for row, length in enumerate(lengths):
    # One padded on the left, one on the right.
    columns = slice(13 - length, 13) if row == 1 else slice(0, length)
    prompt[row, columns] = tokens[row, :length]
  batch = {'prompt': jnp.asarray(prompt), 'id': jnp.arange(3)}
  stacked = {'policy': decoder.stacked(config, params)}
  view = policy.view(stacked, batch)
  logits, cache = jax.jit(policy.start, static_argnums=2)(view, batch, 44)
  step = jax.jit(policy.step)
  position = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens.shape)
  expected = whole(config, params, tokens, position)
  rows = np.arange(3)
  for i in range(30):
    at = lengths - 1 + i
    tiny.check_logits(logits, expected[rows, at])
    logits, cache = step(view, cache, jnp.asarray(tokens[rows, at + 1]))


@pytest.mark.parametrize('family', CONFIGS)
def test_what_is_kept_does_not_grow_where_it_need_not(family):
  config = CONFIGS[family]
  short, long = (
    jax.eval_shape(lambda n=n: decoder.empty_cache(config, 1, n))
    for n in (LENGTH, 10 * LENGTH)
  )
  for i in range(config.layers):
    sizes = [tree.size(cache['layers'][i]) for cache in (short, long)]
    assert (sizes[0] == sizes[1]) == (config.kind(i) != 'global')
