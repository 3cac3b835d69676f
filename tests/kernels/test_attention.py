import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.core.errors import UserError
from alignjax.kernels import attention_chunked as chunked
from alignjax.kernels import attention_plain as plain
from alignjax.kernels import attention_splash as splash
from alignjax.kernels.attention import attention
from alignjax.kernels.attention_plain import Tokens

# Most of the time here is compilation.
QUICK = {'xla_backend_optimization_level': 0}


def arrays(length, heads, kv_heads, dim, batch, keys=None, dtype='float32'):
  """q (scaled so that the cap of 5 bends), k, v and a cotangent."""
  random = np.random.default_rng(0)
  kv = (batch, keys or length, kv_heads, dim)
  shapes = [(batch, length, heads, dim), kv, kv, (batch, length, heads, dim)]
  return [jnp.asarray(random.normal(size=s), dtype) for s in shapes]


def rows(length):
  """Whole, packed, left- and right-padded rows: positions and segments."""
  one, two = length // 3, length - length // 3 - 4
  packed = [*range(one), *range(two), *[-1] * 4]
  position = [
    [*range(length)],
    packed,
    [*[-1] * 5, *range(length - 5)],
    [*range(length - 6), *[-1] * 6],
  ]
  segment = np.ones((4, length), np.int32)
  segment[1] = [*[1] * one, *[2] * two, *[0] * 4]
  position = np.asarray(position, np.int32)
  return position, np.where(position < 0, 0, segment)


def images(length):
  """Runs of image tokens in every row of `rows`, away from the padding."""
  block = np.zeros((4, length), np.int32)
  block[:, 7:12] = 1  # across a block of 8 queries
  block[:, 14:23] = 2  # longer than one
  block[1, 7:12] = 0
  block[1, length // 3 + 2 : length // 3 + 12] = 1
  block[1, 14 : length // 3 + 2] = 0
  return block


def outputs(function, q, k, v, g):
  """[out, dq, dk, dv] under jit; rows that see nothing carry no cotangent."""

  def both(q, k, v):
    out, pull = jax.vjp(function, q, k, v)
    return [jnp.where(g == 0, 0, out), *pull(g.astype(out.dtype))]

  both = jax.jit(both, compiler_options=QUICK)
  return [np.asarray(x, np.float32) for x in both(q, k, v)]


def close(found, expected, tolerance=2e-5):
  for name, one, other in zip(('out', 'dq', 'dk', 'dv'), found, expected):
    np.testing.assert_allclose(
      one, other, atol=tolerance, rtol=tolerance, err_msg=name
    )


# Every window and cap; heads, sizes of blocks, images and skipping go round.
@pytest.mark.parametrize(
  'window, softcap, heads, kv_heads, sizes, with_images, aligned',
  [
    (None, None, 4, 4, (8, 5), False, True),
    (None, None, 4, 2, (8, 8), True, True),
    (None, 5.0, 4, 1, (7, 16), True, False),
    (3, None, 4, 1, (5, 8), False, True),
    (3, 5.0, 4, 4, (8, 8), True, True),
    (8, None, 4, 2, (8, 3), False, False),
    (8, 5.0, 2, 2, (4, 64), True, True),
    (100, 5.0, 2, 1, (64, 4), False, True),
  ],
)
def test_chunked_equals_plain(
  window, softcap, heads, kv_heads, sizes, with_images, aligned
):
  length = 37
  position, segment = rows(length)
  tokens = Tokens(position, segment, images(length) if with_images else None)
  tokens = jax.tree.map(jnp.asarray, tokens)
  q, k, v, g = arrays(length, heads, kv_heads, 8, 4)
  g *= (position >= 0)[..., None, None]
  how = dict(queries=tokens, keys=tokens, window=window, softcap=softcap)
  expected = outputs(functools.partial(plain.attention, **how), q, k, v, g)
  assert all(np.abs(x).max() > 0.1 for x in expected)
  how |= dict(query_block=sizes[0], key_block=sizes[1], aligned=aligned)
  found = outputs(functools.partial(chunked.attention, **how), q, k, v, g)
  close(found, expected)


def literal(q, k, v, queries, keys, window, softcap):
  """Attention as one would explain it, key by key."""
  batch, length, heads, _ = q.shape
  out = np.zeros(q.shape)
  for b, t, n in np.ndindex(batch, length, heads):
    at, scores, values = queries.position[b, t], [], []
    for s in range(k.shape[1]):
      other = keys.position[b, s]
      same = queries.block[b, t] == keys.block[b, s] > 0
      if other < 0 or not (other <= at or same):
        continue
      if window is not None and other <= at - window:
        continue
      if queries.segment[b, t] != keys.segment[b, s]:
        continue
      head = n // (heads // k.shape[2])
      score = np.dot(q[b, t, n], k[b, s, head])
      scores.append(softcap * np.tanh(score / softcap) if softcap else score)
      values.append(v[b, s, head])
    if scores:
      weights = np.exp(scores - np.max(scores))
      out[b, t, n] = weights @ values / weights.sum()
  return out


@pytest.mark.parametrize('window, softcap', [(None, 5.0), (4, None)])
def test_images_are_mutually_visible_within_the_window(window, softcap):
  length = 37
  position, segment = rows(length)
  block = images(length)
  q, k, v, _ = (np.asarray(x) for x in arrays(length, 2, 1, 4, 4))
  tokens = Tokens(position, segment, block)
  expected = literal(q, k, v, tokens, tokens, window, softcap)
  without = tokens._replace(block=np.zeros_like(block))
  causal = literal(q, k, v, without, without, window, softcap)
  assert np.abs(expected - causal).max() > 0.1
  real = (position >= 0)[..., None, None]
  for implementation in ('plain', 'chunked'):
    call = functools.partial(
      attention,
      q_position=position,
      k_position=position,
      q_segment=segment,
      k_segment=segment,
      window=window,
      softcap=softcap,
      q_block=block,
      k_block=block,
      aligned=True,
      implementation=implementation,
    )
    found = jax.jit(call, compiler_options=QUICK)(q, k, v)
    np.testing.assert_allclose(
      np.where(real, found, 0), expected * real, atol=1e-5
    )


@pytest.mark.parametrize('window', [None, 6])
def test_keys_of_a_ring_in_any_order(window):
  # 19 slots of which some are empty, and five queries among them.
  random = np.random.default_rng(1)
  slots = np.concatenate([np.arange(14), np.full(5, -1)])
  k_position = np.stack([random.permutation(slots) for _ in range(2)])
  q_position = np.array([[9, 10, 11, 12, 13], [-1, -1, 11, 12, 13]])
  q, k, v, g = arrays(5, 4, 2, 8, 2, keys=19)
  g *= (q_position >= 0)[..., None, None]
  how = dict(window=window, softcap=5.0)
  tokens = [Tokens(jnp.asarray(x)) for x in (q_position, k_position)]
  how |= dict(queries=tokens[0], keys=tokens[1])
  expected = outputs(functools.partial(plain.attention, **how), q, k, v, g)
  how |= dict(query_block=3, key_block=4)
  found = outputs(functools.partial(chunked.attention, **how), q, k, v, g)
  close(found, expected)
  tokens = [Tokens(x, 0 * x, 0 * x) for x in (q_position, k_position)]
  q, k, v = (np.asarray(x) for x in (q, k, v))
  by_hand = literal(q, k, v, *tokens, window, 5.0)
  by_hand *= (q_position >= 0)[..., None, None]
  np.testing.assert_allclose(expected[0], by_hand, atol=1e-5)


@pytest.mark.parametrize('function', [plain.attention, chunked.attention])
def test_rows_that_see_nothing_stay_finite(function):
  nothing = Tokens(jnp.full((1, 6), -1))
  how = dict(queries=nothing, keys=nothing, softcap=5.0)
  found = outputs(functools.partial(function, **how), *arrays(6, 2, 1, 4, 1))
  assert all(np.isfinite(x).all() for x in found)
  assert function is plain.attention or not any(x.any() for x in found)


def test_bfloat16_stays_close_to_float32():
  position = jnp.broadcast_to(jnp.arange(70), (2, 70))
  tokens = Tokens(position)
  q, k, v, g = arrays(70, 4, 2, 16, 2)
  how = dict(queries=tokens, keys=tokens, window=20, softcap=5.0)
  exact = outputs(functools.partial(plain.attention, **how), q, k, v, g)
  low = [x.astype(jnp.bfloat16) for x in (q, k, v)]
  call = functools.partial(
    chunked.attention, aligned=True, query_block=16, key_block=16, **how
  )
  assert call(*low).dtype == jnp.bfloat16
  for found, expected in zip(outputs(call, *low, g), exact):
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert error < 0.02


@pytest.mark.parametrize(
  'length, window, softcap, kv_heads, packed',
  [(256, 20, 5.0, 2, True), (128, None, None, 1, False)],
)
def test_splash_equals_plain(length, window, softcap, kv_heads, packed):
  position, segment = (jnp.asarray(x[1:3]) for x in rows(length))
  if not packed:  # the same left padding twice, no segments
    position, segment = jnp.stack([position[1]] * 2), None
  tokens = Tokens(position, segment)
  q, k, v, g = arrays(length, 4, kv_heads, 64, 2)
  q, g = q / 8, g * (position >= 0)[..., None, None]
  how = dict(queries=tokens, keys=tokens, window=window, softcap=softcap)
  expected = outputs(functools.partial(plain.attention, **how), q, k, v, g)
  call = functools.partial(splash.attention, interpret=True, **how)
  close(outputs(call, q, k, v, g), expected)


@pytest.mark.parametrize('columns', [1, 37, 64])
@pytest.mark.parametrize('window', [None, 1, 8, 100])
@pytest.mark.parametrize('sizes', [(8, 8), (8, 3), (3, 16)])
def test_key_range_is_tight(columns, window, sizes):
  first, end = chunked.key_range(columns, window, *sizes)
  tokens = Tokens(np.arange(columns)[None])
  seen = np.asarray(plain.visible(tokens, tokens, window))[0]
  for i, (low, high) in enumerate(zip(first, end)):
    part = seen[i * sizes[0] : (i + 1) * sizes[0]].any(axis=0)
    needed = np.flatnonzero(part) // sizes[1]
    assert (low, high) == (needed.min(), needed.max() + 1)


def test_local_layers_cost_by_the_window():
  def visited(columns, window):
    first, end = chunked.key_range(columns, window, 64, 64)
    return (end - first).sum()

  assert visited(4096, None) == 64 * 65 / 2
  assert visited(4096, 256) < 64 * 5
  assert visited(8192, 256) < 2.1 * visited(4096, 256)


def test_last_of_run():
  block = jnp.array([[0, 0, 3, 3, 3, 1, 1, 0, 2], [5, 5, 5, 5, 5, 5, 0, 0, 0]])
  assert chunked.last_of_run(block).tolist() == [
    [0, 1, 4, 4, 4, 6, 6, 7, 8],
    [5, 5, 5, 5, 5, 5, 6, 7, 8],
  ]


def whole(length, implementation='auto', dim=64, heads=2, **how):
  """(function of q, k, v; their shapes) for one aligned row."""
  position = jnp.arange(length)[None]

  def call(q, k, v):
    rest = dict(q_position=position, k_position=position, aligned=True)
    return attention(
      q, k, v, implementation=implementation, **rest | dict(window=64) | how
    )

  shape = jax.ShapeDtypeStruct((1, length, heads, dim), jnp.float32)
  return call, [shape] * 3


def gradient(call):
  return jax.grad(lambda *qkv: call(*qkv).sum(), (0, 1, 2))


def test_memory_is_linear_in_length():
  def temporary(length, implementation):
    call, shapes = whole(length, implementation, window=None)
    call = jax.jit(gradient(call), compiler_options=QUICK)
    compiled = call.lower(*shapes).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  plain_short, plain_long = (temporary(t, 'plain') for t in (2048, 4096))
  assert plain_long > 3.5 * plain_short
  auto_short, auto_long = (temporary(t, 'auto') for t in (4096, 8192))
  assert 1.7 * auto_short < auto_long < 2.2 * auto_short
  assert auto_short < plain_long / 10


def kernels(call, shapes, platform):
  traced = jax.jit(call).trace(*shapes)
  text = traced.lower(lowering_platforms=(platform,)).as_text()
  return text.count('tpu_custom_call')


def test_auto_goes_by_the_platform_of_the_lowering():
  call, shapes = whole(256)
  assert kernels(call, shapes, 'tpu') == 1
  assert kernels(call, shapes, 'cpu') == kernels(call, shapes, 'cuda') == 0
  # Forward, and two for the backward pass.
  assert kernels(gradient(call), shapes, 'tpu') == 3
  odd, shapes = whole(200)
  assert kernels(odd, shapes, 'tpu') == 0
  image, shapes = whole(256, q_block=jnp.ones((1, 256), int))
  assert kernels(image, shapes, 'tpu') == 0


def test_auto_under_scan_remat_vmap_and_grad():
  def layers(implementation):
    call, shapes = whole(128, implementation)

    @jax.checkpoint
    def layer(x, _):
      return jax.vmap(lambda y: call(y, y, y))(x), None

    def loss(x):
      return jnp.sum(jax.lax.scan(layer, x, length=2)[0] ** 2)

    x = jax.ShapeDtypeStruct((2, *shapes[0].shape), jnp.float32)
    return jax.grad(loss), x

  auto, x = layers('auto')
  assert kernels(auto, [x], 'tpu') >= 3
  x = 0.3 * jax.random.normal(jax.random.key(0), x.shape)
  found, expected = (
    jax.jit(function, compiler_options=QUICK)(x)
    for function in (auto, layers('plain')[0])
  )
  np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-4)


def test_platforms_share_what_the_backward_pass_keeps():
  # What one platform's branch saves, every other one's must carry as zeros.
  def kept(implementation):
    call, shapes = whole(512, implementation)
    pull = jax.eval_shape(lambda *qkv: jax.vjp(call, *qkv)[1], *shapes)
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(pull))

  assert kept('auto') < 1.05 * kept('chunked')
  assert kept('chunked') < kept('plain') / 2


def test_one_query_is_plain_on_every_platform():
  q, k, v, _ = arrays(1, 2, 1, 64, 1, keys=8192)
  how = dict(q_position=jnp.zeros((1, 1)), k_position=jnp.zeros((1, 8192)))
  text = str(jax.make_jaxpr(lambda *qkv: attention(*qkv, **how))(q, k, v))
  assert 'while' not in text and 'platform_index' not in text


@pytest.mark.parametrize(
  'change, sentence',
  [
    (dict(implementation='flash'), "found 'flash', expected one of"),
    (dict(implementation='splash', aligned=False), 'columns of the queries'),
    (dict(implementation='splash', dim=24), '24 is no multiple of 64'),
    (
      dict(implementation='splash', length=100, q_block=jnp.ones((1, 100))),
      '100 columns are no multiple of 128; image tokens',
    ),
  ],
)
def test_refusals(change, sentence):
  with pytest.raises(UserError, match=sentence):
    call, shapes = whole(**dict(length=128) | change)
    jax.eval_shape(call, *shapes)
