"""Every implementation against a loop in float64, forward and gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.core.errors import UserError
from alignjax.kernels import linear_recurrence as module
from alignjax.kernels.linear_recurrence import (
  IMPLEMENTATIONS,
  linear_recurrence,
)


def loop(x, a, h0):
  h, state = np.zeros(x.shape), h0
  for t in range(x.shape[1]):
    h[:, t] = state = a[:, t] * state + x[:, t]
  return h, state


def loop_gradient(x, a, h0, d_h, d_last):
  """Of sum(h * d_h) + sum(last * d_last)."""
  h, _ = loop(x, a, h0)
  d_x, d_a, carry = np.zeros(x.shape), np.zeros(x.shape), d_last
  for t in reversed(range(x.shape[1])):
    carry = carry + d_h[:, t]
    d_x[:, t] = carry
    d_a[:, t] = carry * (h[:, t - 1] if t else h0)
    carry = carry * a[:, t]
  return d_x, d_a, carry


def draw(rows=2, length=45, width=24, low=0.0, seed=0):
  """x, a, h0 and weights of h and last; with resets and padding."""
  rng = np.random.default_rng(seed)
  shape = (rows, length, width)
  x, a = rng.normal(size=shape), rng.uniform(low, 1, size=shape)
  for row, t in ((0, 0), (0, length // 3), (1, length // 2)):
    a[row, t] = 0
  a[1, -3:], x[1, -3:] = 1, 0
  h0, d_last = rng.normal(size=(2, rows, width))
  return [
    y.astype(np.float32) for y in (x, a, h0, rng.normal(size=shape), d_last)
  ]


@functools.partial(jax.jit, static_argnums=0)
def run(implementation, x, a, h0, d_h, d_last):
  def loss(*arrays):
    h, last = linear_recurrence(*arrays, implementation=implementation)
    return jnp.sum(h * d_h) + jnp.sum(last * d_last), (h, last)

  gradient = jax.grad(loss, (0, 1, 2), has_aux=True)
  gradients, out = gradient(x, a, h0)
  return *out, *gradients


def wide(arrays):
  return [np.asarray(y, np.float64) for y in arrays]


# The kernel needs two blocks of 290 columns, and pads columns and channels.
@pytest.mark.parametrize(
  'implementation, length',
  [('associative', 40), ('linear', 290), ('pallas', 290), ('auto', 290)],
)
@pytest.mark.parametrize('low', [0.0, 0.9995], ids=['short', 'long memory'])
def test_equals_the_loop(implementation, length, low):
  arrays = draw(length=length, width=130, low=low)
  want = *loop(*wide(arrays[:3])), *loop_gradient(*wide(arrays))
  for found, wanted in zip(run(implementation, *arrays), want):
    assert found.dtype == jnp.float32
    scale = np.abs(wanted).max()
    np.testing.assert_allclose(found / scale, wanted / scale, atol=2e-6)


@pytest.mark.parametrize('reverse', [False, True])
def test_what_a_gpu_runs_equals_what_a_cpu_runs(reverse):
  x, a, carry, *_ = draw()
  found = module._doubling(reverse, jnp.asarray(x), jnp.asarray(a), carry)
  for one, other in zip(found, module._linear(reverse, x, a, carry)):
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_half_precision_enters_and_float32_is_carried(implementation):
  x, a, h0, d_h, d_last = draw(length=20, low=0.9)
  x, a = (jnp.asarray(y, jnp.bfloat16) for y in (x, a))
  rounded = wide((x, a, h0, d_h, d_last))
  h, last, d_x, d_a, d_h0 = run(implementation, x, a, h0, d_h, d_last)
  assert (h.dtype, last.dtype, d_h0.dtype) == ('float32',) * 3
  assert (d_x.dtype, d_a.dtype) == ('bfloat16',) * 2
  np.testing.assert_allclose(h, loop(*rounded[:3])[0], atol=2e-5)
  for found, wanted in zip((d_x, d_a, d_h0), loop_gradient(*rounded)):
    np.testing.assert_allclose(wide([found])[0], wanted, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_one_column_and_no_state(implementation):
  x, a, h0, *_ = draw()
  h, last = linear_recurrence(
    x[:, :1], a[:, :1], h0, implementation=implementation
  )
  np.testing.assert_allclose(last, a[:, 0] * h0 + x[:, 0], rtol=1e-6)
  np.testing.assert_array_equal(h[:, 0], last)
  x, a = x[:, :5], a[:, :5]
  h, _ = linear_recurrence(x, a, implementation=implementation)
  np.testing.assert_allclose(h, loop(x, a, 0 * h0)[0], atol=2e-5)


@pytest.mark.parametrize('implementation', ['linear', 'pallas', 'auto'])
def test_composes_with_vmap_scan_and_remat(implementation):
  arrays = draw(rows=4, length=20, width=6)
  want = loop_gradient(*wide(arrays))
  x, a, h0, d_h, d_last = (y.reshape(2, 2, *y.shape[1:]) for y in arrays)

  @jax.checkpoint
  def one(x, a, h0, d_h, d_last):
    h, last = linear_recurrence(x, a, h0, implementation=implementation)
    return jnp.sum(h * d_h) + jnp.sum(last * d_last)

  def mapped(x, a, h0):
    return jnp.sum(jax.vmap(one)(x, a, h0, d_h, d_last))

  def scanned(*arrays):
    def body(total, slices):
      return total + one(*slices), None

    return jax.lax.scan(body, 0.0, (*arrays, d_h, d_last))[0]

  for function in (mapped, scanned):
    found = jax.jit(jax.grad(function, (0, 1, 2)))(x, a, h0)
    for one_found, wanted in zip(found, want):
      one_found = one_found.reshape(wanted.shape)
      np.testing.assert_allclose(one_found, wanted, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize('implementation', ['linear', 'pallas', 'auto'])
def test_the_backward_pass_keeps_two_arrays(implementation):
  x, a, h0, *_ = draw()
  _, backward = jax.vjp(
    functools.partial(linear_recurrence, implementation=implementation),
    *(jnp.asarray(y) for y in (x, a, h0)),
  )
  kept = [y for y in jax.tree.leaves(backward) if np.shape(y) == x.shape]
  assert len(kept) == 2


@pytest.mark.parametrize(
  'platform, kernel, loops',
  [('cpu', False, True), ('cuda', False, False), ('tpu', True, False)],
)
def test_auto_goes_by_the_platform_that_is_compiled_for(
  platform, kernel, loops
):
  x, a, h0, d_h, d_last = draw(width=128)
  program = run.trace('auto', x, a, h0, d_h, d_last)
  text = program.lower(lowering_platforms=(platform,)).as_text()
  assert ('tpu_custom_call' in text) == kernel
  assert ('stablehlo.while' in text) == loops


def test_an_unknown_name_is_refused():
  x, a, *_ = draw()
  with pytest.raises(UserError, match="'fast'.*'linear'"):
    linear_recurrence(x, a, implementation='fast')
