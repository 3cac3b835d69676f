"""The recurrent mixer against a literal one in float64, and against itself."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.models import recurrent
from alignjax.models.recurrentgemma import recurrentgemma

CONFIG = recurrentgemma(
  vocab_size=32, width=12, hidden=16, layers=3, heads=2, lru_width=16, window=4
)
LENGTH = 24


def parameters(seed=0):
  """Nothing is zero, and the gates do open."""
  x, position = jnp.zeros((1, 1, CONFIG.width)), jnp.zeros((1, 1), jnp.int32)
  module = recurrent.Recurrent(CONFIG)
  params = jax.jit(module.init)(jax.random.key(seed), x, position)['params']
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda y: np.asarray(y + 0.4 * rng.normal(size=y.shape), np.float32),
    params,
  )


PARAMS = parameters()


def literal(params, x, position):
  """One row, token by token, from the equations of Griffin."""
  p = {name: np.asarray(y, np.float64) for name, y in params.items()}
  heads = p['a_gate'].shape[0]

  def gelu(z):
    return 0.5 * z * (1 + np.tanh((2 / np.pi) ** 0.5 * (z + 0.044715 * z**3)))

  def gate(name, u):
    groups = zip(np.split(u, heads), p[name], p[f'{name}_bias'])
    z = np.concatenate([group @ w + b for group, w, b in groups])
    return 1 / (1 + np.exp(-z))

  document, h, out = [], np.zeros(p['a_param'].shape), []
  for token, place in zip(x.astype(np.float64), position):
    if place < 0:
      out.append(np.full(x.shape[1], np.nan))
      continue
    if place == 0:
      document = []
    document.append(token @ p['x'] + p['x_bias'])
    u = p['conv_bias'] + sum(
      w * past for w, past in zip(p['conv'][::-1], document[::-1])
    )
    log_a = -8 * gate('a_gate', u) * np.log1p(np.exp(p['a_param']))
    a, enters = np.exp(log_a), np.sqrt(-np.expm1(2 * log_a))
    if place == 0:
      a, enters = 0, 1
    h = a * h + enters * gate('input_gate', u) * u
    y = gelu(token @ p['y'] + p['y_bias'])
    out.append((h * y) @ p['out'] + p['out_bias'])
  return np.stack(out)


def rows():
  """Positions: whole, packed, short documents, left-, right-padded, both."""
  count = np.arange(LENGTH)
  documents = [np.arange(n) for n in (2, 1, 3, 9, 1, 8)]
  return np.stack(
    [
      count,
      np.concatenate([np.arange(10), np.arange(LENGTH - 10)]),
      np.concatenate(documents),
      np.maximum(count - 7, -1),
      np.where(count < 15, count, -1),
      np.where(count < 20, np.maximum(count - 5, -1), -1),
      np.concatenate([np.arange(11), np.arange(6), np.full(7, -1)]),
    ]
  ).astype(np.int32)


POSITION = rows()
X = np.random.default_rng(1).normal(size=(*POSITION.shape, CONFIG.width))
X = X.astype(np.float32)
REAL = POSITION >= 0


@jax.jit
def apply(params, x, position, cache=None):
  module = recurrent.Recurrent(CONFIG)
  return module.apply({'params': params}, x, position, cache)


@functools.lru_cache(maxsize=1)
def want():
  return np.stack([literal(PARAMS, x, p) for x, p in zip(X, POSITION)])


def close(found, wanted, **kwargs):
  np.testing.assert_allclose(found, wanted, atol=2e-5, rtol=1e-5, **kwargs)


def test_equals_the_equations():
  out, cache = apply(PARAMS, X, POSITION)
  assert cache is None
  close(out[REAL], want()[REAL])


def chunked(chunks, position):
  cache = recurrent.empty(CONFIG, len(X))
  parts, start = [], 0
  for length in chunks:
    columns = slice(start, start + length)
    part, cache = apply(PARAMS, X[:, columns], position[:, columns], cache)
    parts.append(part)
    start += length
  return np.concatenate(parts, axis=1), cache


@pytest.mark.parametrize(
  'chunks',
  [[24], [1] * 24, [2, 1, 2, 3, 2, 2, 1, 1, 3, 2, 2, 3], [13, 11]],
  ids=['whole', 'one by one', 'small', 'large'],
)
def test_any_chunks_equal_the_whole(chunks):
  # The padding of the rows lands before, after and around tokens of a chunk,
  # and fills some chunks altogether.
  out, cache = chunked(chunks, POSITION)
  close(out[REAL], want()[REAL])
  _, whole = chunked([LENGTH], POSITION)
  close(cache['h'], whole['h'])
  assert (cache['h'].dtype, cache['h'].shape) == (jnp.float32, (7, 16))
  for row, position in enumerate(POSITION):
    # Inputs before the last document are never read.
    seen = min(3, position[position >= 0][-1] + 1)
    close(cache['conv'][row, 3 - seen :], whole['conv'][row, 3 - seen :])


def test_the_cache_holds_the_last_real_inputs():
  _, cache = chunked([LENGTH], POSITION)
  inputs = X @ PARAMS['x'] + PARAMS['x_bias']
  for row in (0, 3, 4, 5):
    close(cache['conv'][row], inputs[row][REAL[row]][-3:])


@pytest.mark.parametrize('length', [1, 5])
def test_padding_leaves_the_cache_alone(length):
  _, cache = chunked([LENGTH], POSITION)
  padding = np.full((len(X), length), -1, np.int32)
  out, after = apply(PARAMS, X[:, :length], padding, cache)
  assert np.isfinite(out).all()
  for name in cache:
    np.testing.assert_array_equal(after[name], cache[name])


def test_position_0_forgets_the_cache():
  _, cache = chunked([LENGTH], POSITION)
  out, _ = apply(
    PARAMS, X[:1], POSITION[:1], jax.tree.map(lambda y: y[:1], cache)
  )
  close(out, want()[:1])


def test_a_row_cut_from_a_document_does_not_read_its_padding():
  position = np.arange(5, 5 + LENGTH - 7, dtype=np.int32)[None]
  padded = np.pad(position, ((0, 0), (7, 0)), constant_values=-1)
  out, _ = apply(PARAMS, X[:1], padded)
  alone, _ = apply(PARAMS, X[:1, 7:], position)
  close(out[:, 7:], alone)


def test_what_padding_holds_changes_nothing():
  def loss(params, x):
    out, _ = apply(params, x, POSITION)
    return jnp.sum(jnp.where(REAL[..., None], out, 0) ** 2)

  other = np.where(REAL[..., None], X, 1000 * X)
  gradients = jax.jit(jax.grad(loss, (0, 1)))
  for found, wanted in zip(
    jax.tree.leaves(gradients(PARAMS, other)[0]),
    jax.tree.leaves(gradients(PARAMS, X)[0]),
  ):
    close(found, wanted)
  assert not gradients(PARAMS, other)[1][~REAL].any()


@pytest.mark.parametrize(
  'p', [-200.0, -20.0, 200.0], ids=['a 1', 'a near 1', 'a 0']
)
def test_gradients_are_finite_at_the_ends(p):
  u = jnp.asarray(np.random.default_rng(2).normal(size=(2, 6, 16)), jnp.float32)
  gates = [
    (PARAMS[name], PARAMS[f'{name}_bias']) for name in ('input_gate', 'a_gate')
  ]

  def loss(u, gates, a_param):
    position = np.array([[0, 1, 2, 3, 4, 5], [-1, 0, 1, 0, 1, -1]])
    return jnp.sum(recurrent.rg_lru(u, *gates, a_param, position)[0] ** 2)

  gradients = jax.jit(jax.grad(loss, (0, 1, 2)))(u, gates, jnp.full((16,), p))
  assert all(np.isfinite(y).all() for y in jax.tree.leaves(gradients))


def test_the_slope_of_the_root_is_held():
  slope = jax.vmap(jax.grad(recurrent.sqrt))(jnp.array([0, 1e-9, 2.5e-7, 0.25]))
  np.testing.assert_allclose(slope, [1000, 1000, 1000, 1], rtol=1e-5)


def test_half_precision_keeps_gates_and_state_in_float32():
  half = jax.tree.map(lambda y: jnp.asarray(y, jnp.bfloat16), PARAMS)
  x = jnp.asarray(X, jnp.bfloat16)
  cache = recurrent.empty(recurrentgemma(heads=10, dtype='bfloat16'), 1)
  assert (cache['conv'].dtype, cache['h'].dtype) == (jnp.bfloat16, jnp.float32)
  out, _ = apply(half, x, POSITION)
  assert out.dtype == jnp.bfloat16
  rounded = [
    literal(half, np.asarray(row, np.float32), p) for row, p in zip(x, POSITION)
  ]
  error = np.asarray(out, np.float32)[REAL] - np.stack(rounded)[REAL]
  assert np.abs(error).max() < 0.02 * np.abs(np.stack(rounded)[REAL]).max()
  program = jax.make_jaxpr(recurrent.rg_lru)(
    jnp.zeros((1, 4, 16), jnp.bfloat16),
    *((half[n], half[f'{n}_bias']) for n in ('input_gate', 'a_gate')),
    half['a_param'],
    jnp.zeros((1, 4), jnp.int32),
  )
  checked = ('dot_general', 'logistic', 'exp', 'expm1')
  names = {equation.primitive.name for equation in program.eqns}
  assert names.issuperset(checked)
  for equation in program.eqns:
    if equation.primitive.name in checked:
      assert equation.outvars[0].aval.dtype == jnp.float32


def test_initialisation_is_griffins():
  config = recurrentgemma(width=96, lru_width=256, heads=4, layers=26)
  module = recurrent.Recurrent(config)
  x, position = jnp.zeros((1, 1, 96)), jnp.zeros((1, 1), jnp.int32)
  params = jax.jit(module.init)(jax.random.key(0), x, position)['params']
  deviations = {
    'x': 96**-0.5,
    'y': 96**-0.5,
    'out': (2 / 26 / 256) ** 0.5,
    'conv': 0.05,
    'input_gate': 256**-0.5,
    'a_gate': 256**-0.5,
  }
  for name, deviation in deviations.items():
    np.testing.assert_allclose(np.std(params[name]), deviation, rtol=0.1)
  zero = sorted(name for name, y in params.items() if not y.any())
  assert zero == sorted(name for name in params if name.endswith('_bias'))
  radius = 1 / (1 + np.exp(params['a_param']))
  assert 0.9 <= radius.min() < 0.91 and 0.99 < radius.max() <= 0.999
  # Uniform in area: half of the ring's area lies within this radius.
  assert abs(np.mean(radius < ((0.9**2 + 0.999**2) / 2) ** 0.5) - 0.5) < 0.1
