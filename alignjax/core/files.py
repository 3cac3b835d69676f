"""Writing a file whole or not at all, or through a window on a part of it.

It knows nothing of what is written.
"""

import math
import mmap
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from alignjax.core.errors import UserError


def write(path: str | os.PathLike, data: str | bytes) -> None:
  """Writes by way of a temporary name beside `path`, made durable.

  Raises UserError where the file cannot be written; an old one survives.
  """
  path = Path(path)
  if isinstance(data, str):
    data = data.encode()
  partial = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(partial, 'wb') as file:
      file.write(data)
      file.flush()
      os.fsync(file.fileno())
    os.replace(partial, path)
  except OSError as error:
    try:
      partial.unlink(missing_ok=True)
    except OSError:
      pass  # its folder is not one: nothing was written
    raise UserError(f'{path}: cannot be written ({error.strerror})') from error


def window(
  file: int, start: int, shape: Sequence[int], dtype: Any
) -> np.ndarray:
  """An array that is a part of an open file, from byte `start` on.

  Its blocks are allocated first: a full disk is an OSError here, not a signal
  when the array is filled.
  """
  size = math.prod(shape) * np.dtype(dtype).itemsize
  if hasattr(os, 'posix_fallocate'):
    os.posix_fallocate(file, start, size)
  elif os.fstat(file).st_size < start + size:
    os.truncate(file, start + size)
  skipped = start % mmap.ALLOCATIONGRANULARITY
  memory = mmap.mmap(file, skipped + size, offset=start - skipped)
  return (
    np.frombuffer(memory, np.uint8, size, skipped).view(dtype).reshape(shape)
  )


class Room(NamedTuple):
  """A part of an open file.

  Attributes:
    array: what lies there, whoever wrote it.
    write: (x, byte) -> None puts the items of `x` there, from any thread; an
      OSError where the disk is full.
  """

  array: np.ndarray
  write: Callable[[np.ndarray, int], None]


def room(file: int, start: int, shape: Sequence[int], dtype: Any) -> Room:
  """The part of an open file that an array takes, from byte `start` on."""

  def write(x: np.ndarray, at: int) -> None:
    left = np.ascontiguousarray(x).reshape(-1).view(np.uint8).data
    at += start
    while left:
      done = os.pwrite(file, left, at)
      left, at = left[done:], at + done

  return Room(window(file, start, shape, dtype), write)
