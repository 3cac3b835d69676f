"""What methods need beyond operators, for NumPy's arrays and for JAX's.

Models on disk are merged by NumPy, block by block on every core: for bfloat16
it is faster than a compiled program here, and nothing waits for a compiler.
Inside a program the same methods get JAX's arrays, sharded as they are.
"""

import sys
from typing import Any

import ml_dtypes
import numpy as np

from alignjax.merge import fused

Array = Any  # NumPy's or JAX's

_BF16 = np.dtype(ml_dtypes.bfloat16)


def namespace(x: Any) -> Any:
  """`jax.numpy` for JAX's arrays, traced ones too; `numpy` for others."""
  if isinstance(x, np.ndarray | np.generic):
    return np
  # Here and below, as merging files needs no JAX and should not wait for it.
  jax = sys.modules.get('jax')
  return jax.numpy if jax and isinstance(x, jax.Array) else np


def floating(dtype: Any) -> bool:
  """Whether it is a dtype of weights; bfloat16 is one."""
  dtype = np.dtype(dtype)
  return dtype.kind == 'f' or dtype == _BF16


def named(dtype: str) -> np.dtype:
  """The dtype of that name; bfloat16 is one."""
  return _BF16 if dtype == 'bfloat16' else np.dtype(dtype)


def known(x: Any) -> bool:
  """Whether a number is there to be looked at: it is not traced."""
  jax = sys.modules.get('jax')
  return not (jax and isinstance(x, jax.core.Tracer))


def float32(x: Any) -> Any:
  """`x` as float32; a view where it is."""
  if isinstance(x, np.ndarray) and x.dtype == _BF16:
    if fused.takes(x):
      return fused.widen(x)
    # bfloat16 is the upper half of a float32.
    wide = x.view(np.uint16).astype(np.uint32)
    return np.left_shift(wide, 16, out=wide).view(np.float32)
  return namespace(x).asarray(x, dtype=np.float32)


def rounded(x: Any, dtype: Any) -> Any:
  """float32 `x` in another dtype, to the nearest, ties to even."""
  dtype = np.dtype(dtype)
  if not isinstance(x, np.ndarray) or dtype != _BF16:
    with np.errstate(over='ignore'):
      return x.astype(dtype, copy=False)
  if fused.takes(x):
    return fused.narrow(x)
  bits = x.view(np.uint32)
  out = np.right_shift(bits, 16)
  out &= 1
  out += 0x7FFF
  out += bits
  out >>= 16
  out = out.astype(np.uint16)
  if np.isnan(x).any():
    # The carry of a NaN's last bits would make it another number.
    out = np.where(np.isnan(x), np.uint16(0x7FC0), out)
  return out.view(_BF16)


def finite(x: np.ndarray) -> bool:
  """Whether no item is NaN or infinite."""
  if fused.takes(x):
    return fused.finite(x)
  return bool(np.isfinite(float32(x)).all())


def inner(a: Any, b: Any) -> Any:
  """The inner product of two float32 arrays, float64 for NumPy's."""
  if namespace(a) is np:
    # A block is short enough for float32 sums; blocks add up in float64.
    return np.float64(np.dot(a.reshape(-1), b.reshape(-1)))
  # A sum, not a dot: XLA sums in a tree, which keeps float32 accurate.
  return (a * b).sum()


def counts(x: Any, bins: int) -> Any:
  """How often each of 0 .. bins - 1 is in the whole numbers `x`; int [bins]."""
  xp = namespace(x)
  flat = x.reshape(-1)
  if xp is np:
    return np.bincount(flat, minlength=bins)
  return xp.bincount(flat, length=bins)


def bits(x: Any) -> Any:
  """uint32 of the bits of float32 `x`: in order where none is negative."""
  if namespace(x) is np:
    return np.ascontiguousarray(x).view(np.uint32)
  return x.view(np.uint32)


def ranks(x: Any) -> Any:
  """float32 ranks 0, 1, ... of float32 `x` >= 0 in its row; ties by place."""
  xp, columns = namespace(x), x.shape[-1]
  if xp is not np:
    order = xp.argsort(x, axis=-1, stable=True)
    return xp.argsort(order, axis=-1).astype(xp.float32)
  # Whole numbers of an item and its place: they sort five times as fast.
  keys = bits(x).astype(np.uint64) << 32 | np.arange(columns, dtype=np.uint64)
  keys.sort(axis=-1)
  out = np.empty(x.shape, np.float32)
  rank = np.broadcast_to(np.arange(columns, dtype=np.float32), x.shape)
  np.put_along_axis(out, (keys & 0xFFFFFFFF).astype(np.int64), rank, axis=-1)
  return out


def from_bits(x: Any) -> Any:
  """`bits` inverted."""
  if namespace(x) is np:
    return np.ascontiguousarray(x).view(np.float32)
  return x.view(np.float32)


def uniform(index: Any, seed: int) -> Any:
  """float32 in [0, 1), of its index (uint32) and the seed alone.

  Two rounds of a 32-bit mixing function over index and seed: however an array
  is cut, and on whatever machine, its items are the same.
  """
  low, high = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
  x = _mixed(index ^ np.uint32(low)) + np.uint32(high)
  x = _mixed(x) >> np.uint32(8)
  return x.astype(np.float32) * np.float32(2**-24)


def _mixed(x: Any) -> Any:
  """A bijection of uint32 in which each bit depends on every other."""
  for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
    x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
  return x ^ (x >> np.uint32(16))
