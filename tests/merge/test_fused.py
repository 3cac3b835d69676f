"""The loops in C give what NumPy gives, which says what they mean."""

import shutil

import ml_dtypes
import numpy as np
import pytest

from alignjax.merge import arrays, fused
from alignjax.merge.combination import weighted_sum
from alignjax.merge.gram import full_gram, task_gram

BF16 = np.dtype(ml_dtypes.bfloat16)
F32 = np.dtype(np.float32)
# Around the ends of lanes and chunks, and many chunks.
SIZES = (1, 2, 31, 33, 1007, 1008, 1009, 5000)


@pytest.fixture(autouse=True)
def there():
  if not fused.compiled:
    assert not shutil.which('cc'), 'not compiled, though there is a compiler'
    pytest.skip('no C compiler')


@pytest.fixture
def plain(monkeypatch):
  """Calls a function as where nothing was compiled."""

  def run(fn, *args):
    with monkeypatch.context() as patch:
      patch.setattr(fused, 'compiled', False)
      return fn(*args)

  return run


def drawn(seed, size, dtype):
  return np.random.default_rng(seed).standard_normal(size).astype(dtype)


def test_every_bfloat16_is_widened(plain):
  x = np.arange(2**16, dtype=np.uint16).view(BF16)
  found = arrays.float32(x)
  assert found.dtype == F32
  assert found.tobytes() == plain(arrays.float32, x).tobytes()


def test_rounding_is_to_the_nearest_and_ties_to_even(plain):
  upper = np.arange(2**16, dtype=np.uint32) << 16
  lower = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
  x = (upper[:, None] | lower).view(np.float32)
  found = arrays.rounded(x, BF16)
  assert found.tobytes() == plain(arrays.rounded, x, BF16).tobytes()
  there = np.isfinite(x)
  with np.errstate(over='ignore', invalid='ignore'):
    expected = x.astype(BF16)
  assert np.array_equal(found[there], expected[there])
  assert np.isnan(np.float32(found[np.isnan(x)])).all()


@pytest.mark.parametrize('dtype', [BF16, F32])
@pytest.mark.parametrize('size', SIZES)
def test_what_is_not_finite_is_found_wherever_it_is(size, dtype):
  x = drawn(0, size, dtype)
  assert arrays.finite(x)
  for at in {0, size // 2, size - 1}:
    for bad in (np.nan, np.inf, -np.inf):
      y = x.copy()
      y[at] = bad
      assert not arrays.finite(y)
  assert arrays.finite(np.full(size, -3e38, dtype))


@pytest.mark.parametrize('kinds', [(BF16,) * 3, (F32,) * 3, (BF16, F32, BF16)])
@pytest.mark.parametrize('size', SIZES)
def test_sums_have_the_same_bits(size, kinds, plain):
  x = [drawn(i, size, kind) for i, kind in enumerate(kinds)]
  for weights in ((0.3, -1.7, 0.1), (0.5, 0.0, 0.5), (0, 1, 0), (0, 0, 0)):
    found = weighted_sum(x, weights)
    assert found.tobytes() == plain(weighted_sum, x, weights).tobytes()


@pytest.mark.parametrize('kinds', [(BF16,) * 4, (F32,) * 4, (F32, BF16) * 2])
@pytest.mark.parametrize('size', SIZES)
def test_inner_products(size, kinds, plain):
  base, *leaves = (drawn(i, size, kind) for i, kind in enumerate(kinds))
  wide = [np.float64(x) for x in (base, *leaves)]
  # Differences are float32 by definition.
  deltas = [np.float64(np.float32(x) - np.float32(base)) for x in leaves]
  for found, of in (
    (task_gram(base, leaves, None), deltas),
    (full_gram(base, leaves, None), wide[1:]),
  ):
    exact = np.array([[a @ b for a in of] for b in of])
    scale = np.sqrt(np.outer(np.diag(exact), np.diag(exact)))
    assert found.dtype == np.float64
    assert (np.abs(found - exact) <= 3e-7 * scale).all()
    assert np.array_equal(found, found.T)
  other = plain(task_gram, base, leaves, None)
  assert np.allclose(task_gram(base, leaves, None), other, rtol=1e-5, atol=1e-5)


def test_non_finite_weights_reach_the_inner_products():
  x = [drawn(i, 3000, BF16) for i in range(3)]
  x[1][2999] = np.nan
  found = task_gram(x[0], x[1:], None)
  assert np.isnan(found[0]).all() and np.isfinite(found[1, 1])


def test_only_what_lies_in_order_is_taken():
  x = drawn(0, 60, BF16).reshape(6, 10)
  assert fused.takes(x)
  assert not fused.takes(x[:, ::2])
  assert not fused.takes(x.astype(np.float16))
  odd = np.zeros(17, np.uint8)[1:].view(F32)
  assert not fused.takes(odd) and arrays.finite(odd)
  # What is not taken is computed all the same.
  assert np.array_equal(arrays.float32(x[:, ::2]), np.float32(x)[:, ::2])
  half = weighted_sum([x[:, ::2], x[:, 1::2]], (0.5, 0.5))
  assert np.allclose(half, (np.float32(x)[:, ::2] + np.float32(x)[:, 1::2]) / 2)
