"""Inner loops of merging in C: one reading of weights as they are stored.

NumPy makes an array of every step; `fused.c` takes bfloat16 or float32 and
keeps what lies between in a core's first cache. It is compiled when the package
is installed, if there is a compiler; without one `compiled` is false and the
callers compute what it means by NumPy, more slowly. Not the place for what a
method does.
"""

import ctypes
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

_BF16 = np.dtype(ml_dtypes.bfloat16)
_WIDE = {_BF16: 0, np.dtype(np.float32): 1}  # the dtypes that C takes


def _library() -> ctypes.CDLL | None:
  suffix = sysconfig.get_config_var('EXT_SUFFIX')
  try:
    library = ctypes.CDLL(str(Path(__file__).with_name(f'_fused{suffix}')))
  except OSError:  # not there, or of another machine
    return None
  size, pointer, kind = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int
  for name, arguments in (
    ('widen', (size, pointer, pointer)),
    ('narrow', (size, pointer, pointer)),
    ('all_finite', (size, pointer, kind)),
    ('weighted_sum', (size, kind, pointer, pointer, pointer, pointer)),
    ('gram', (size, kind, pointer, pointer, pointer, kind, pointer)),
  ):
    getattr(library, name).argtypes = arguments
  return library


_C: Any = _library()
compiled = _C is not None


def takes(*found: Any) -> bool:
  """Whether C is there and these are arrays of NumPy's that it reads."""
  return compiled and all(
    isinstance(x, np.ndarray)
    and x.dtype in _WIDE
    and x.flags.c_contiguous
    and x.flags.aligned
    for x in found
  )


def widen(x: np.ndarray) -> np.ndarray:
  """float32 of bfloat16 `x`."""
  out = np.empty(x.shape, np.float32)
  _C.widen(x.size, x.ctypes.data, out.ctypes.data)
  return out


def narrow(x: np.ndarray) -> np.ndarray:
  """bfloat16 of float32 `x`, to the nearest, ties to even."""
  out = np.empty(x.shape, _BF16)
  _C.narrow(x.size, x.ctypes.data, out.ctypes.data)
  return out


def finite(x: np.ndarray) -> bool:
  """Whether no item is NaN or infinite."""
  return bool(_C.all_finite(x.size, x.ctypes.data, _WIDE[x.dtype]))


def weighted_sum(
  terms: Sequence[np.ndarray], weights: Sequence[np.float32]
) -> np.ndarray:
  """float32 sum of weight * term in their order, of terms of one shape."""
  places, kinds = _told(terms)
  shares = np.array(weights, np.float32)
  out = np.empty(terms[0].shape, np.float32)
  _C.weighted_sum(
    *(out.size, len(terms), places.ctypes.data, kinds.ctypes.data),
    *(shares.ctypes.data, out.ctypes.data),
  )
  return out


def gram(base: np.ndarray | None, leaves: Sequence[np.ndarray]) -> np.ndarray:
  """float64 [M, M] inner products of leaf - base, or without it of leaves.

  Products are float32, in sums of few; raises MemoryError.
  """
  places, kinds = _told(leaves)
  out = np.empty((len(leaves), len(leaves)), np.float64)
  whole = _C.gram(
    *(leaves[0].size, len(leaves), places.ctypes.data, kinds.ctypes.data),
    None if base is None else base.ctypes.data,
    0 if base is None else _WIDE[base.dtype],
    out.ctypes.data,
  )
  if not whole:
    raise MemoryError
  return np.tril(out) + np.tril(out, -1).T


def _told(found: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
  """Where arrays of one size lie, and which dtypes they have."""
  assert len({x.size for x in found}) == 1
  places = np.array([x.ctypes.data for x in found], np.uintp)
  return places, np.array([_WIDE[x.dtype] for x in found], np.intc)
