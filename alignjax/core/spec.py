"""What an array is before it is read: its shape and its dtype.

As `jax.ShapeDtypeStruct`, for what works on files and needs no JAX: importing
that takes longer than opening a model does.
"""

import dataclasses
import math
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Spec:
  """Shape and dtype of an array; `dtype` may be given as NumPy takes it."""

  shape: tuple[int, ...]
  dtype: Any

  def __post_init__(self):
    object.__setattr__(self, 'shape', tuple(self.shape))
    object.__setattr__(self, 'dtype', np.dtype(self.dtype))

  @property
  def ndim(self) -> int:
    return len(self.shape)

  @property
  def size(self) -> int:
    """Number of items."""
    return math.prod(self.shape)

  @property
  def nbytes(self) -> int:
    return self.size * self.dtype.itemsize
