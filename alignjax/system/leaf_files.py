"""Arrays of a plain Orbax checkpoint: zarr folders, read and written.

An array of any size passes in boxes of CHUNK_BYTES, each a chunk of the zarr
folder, so that what is held beyond the array itself does not grow with it;
Orbax alone would copy the array and then encode it whole. Nothing here knows
of models, or of checksums on record.
"""

import itertools
import json
import math
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from etils import epath

from alignjax.core import naming

if TYPE_CHECKING:
  import tensorstore as ts

CHUNK_BYTES = 32 * 2**20
# What reading or writing holds beyond the array: a chunk as it is given, as
# TensorStore keeps it, encoded, and the one before it if that is not yet freed.
PASSING_BYTES = 4 * CHUNK_BYTES

Box = tuple[slice, ...]


def open_array(path: epath.Path) -> 'ts.TensorStore':
  """Opens to read. Raises ValueError or OSError for what is no array."""
  import tensorstore as ts  # late: other formats need not wait for it

  spec = {'driver': 'zarr', 'kvstore': _store(path)}
  return ts.open(spec, read=True).result()


Allocate = Callable[[tuple[int, ...], np.dtype], np.ndarray]


def read(array: 'ts.TensorStore', allocate: Allocate = np.empty) -> np.ndarray:
  """The whole array. Raises ValueError or OSError if it is damaged.

  One of several chunks is read into what `allocate(shape, dtype)` gives.
  """
  # A chunk is decoded whole, however little of it is asked for.
  chunk = array.chunk_layout.read_chunk.shape or array.shape
  boxes = list(_boxes(array.shape, [size or 1 for size in chunk]))
  if len(boxes) == 1:
    return np.asarray(array.read().result())
  out = allocate(tuple(array.shape), array.dtype.numpy_dtype)
  for box in boxes:
    out[box] = array[box].read().result()
  return out


def save(
  directory: epath.Path, arrays: Mapping[str, np.ndarray], large_bytes: int
) -> None:
  """Saves arrays by leaf name as an Orbax checkpoint, or adds to one.

  One that exceeds `large_bytes` is not copied. Raises OSError or ValueError
  for what the file system refuses, and may leave some of it.
  """
  # Here, as they take long and whoever only reads has no use for them.
  import jax
  import orbax.checkpoint as ocp

  me = jax.process_index()
  handler = ocp.PyTreeCheckpointHandler(
    use_ocdbt=False,
    use_zarr3=False,
    # One process writes alone: waiting for the others would hang.
    multiprocessing_options=ocp.options.MultiprocessingOptions(
      primary_host=me,
      active_processes={me},
      barrier_sync_key_prefix=f'model_dir_{me}',
    ),
  )
  large = {name: x for name, x in arrays.items() if x.nbytes > large_bytes}
  # Orbax gets one item of a large array, which makes the entry in its index
  # and the kind of zarr; the array itself then takes that place.
  items = {name: np.zeros([1] * x.ndim, x.dtype) for name, x in large.items()}
  saved = naming.nested({**arrays, **items})
  index = directory / '_METADATA'
  before = json.loads(index.read_text()) if index.exists() else None
  directory.mkdir(parents=True, exist_ok=True)
  handler.save(directory, args=ocp.args.PyTreeSave(saved))
  for name, array in large.items():
    _rewrite(place(directory, name), array)
  if before is not None:
    # Orbax lists what it has just saved; the earlier parts belong to it too.
    after = json.loads(index.read_text())
    after['tree_metadata'] = before['tree_metadata'] | after['tree_metadata']
    index.write_text(json.dumps(after))


def checksum(directory: epath.Path, name: str) -> str | None:
  """`crc32` of a leaf as it lies there; None where it is not whole."""
  try:
    json.loads((directory / '_METADATA').read_text())
    return crc32(read(open_array(place(directory, name))))
  except (ValueError, OSError):
    return None


def keep(directory: epath.Path, names: Iterable[str]) -> None:
  """Removes the leaves that are not among these, whole or not."""
  kept = {place(directory, name).name for name in names}
  for leaf in directory.iterdir():
    if leaf.is_dir() and leaf.name not in kept:
      leaf.rmtree()


def place(directory: epath.Path, name: str) -> epath.Path:
  """Where Orbax puts the leaf of this name."""
  return directory / name.replace('/', '.')


def _rewrite(path: epath.Path, array: np.ndarray) -> None:
  """Puts `array` in place of the one that Orbax has written at `path`.

  What was there has as many axes and the same dtype; its kind of zarr (codec,
  names of chunks) is kept, so Orbax restores the new one as it would its own.
  """
  import tensorstore as ts

  chunk = chunks(array.shape, array.dtype.itemsize)
  metadata = json.loads((path / '.zarray').read_text())
  metadata |= {'shape': list(array.shape), 'chunks': list(chunk)}
  store = ts.open(
    {
      'driver': 'zarr',
      'kvstore': _store(path),
      'metadata': metadata,
      # A chunk of zeros is written too: one that is missing was lost.
      'store_data_equal_to_fill_value': True,
    },
    create=True,
    delete_existing=True,
  ).result()
  for box in _boxes(array.shape, chunk):
    store[box].write(array[box]).result()


def crc32(array: np.ndarray) -> str:
  """Of the bytes in C order, in hex; no array is copied whole for it."""
  found = 0
  for box in _boxes(array.shape, chunks(array.shape, array.dtype.itemsize)):
    flat = np.ascontiguousarray(array[box]).reshape(-1)
    found = zlib.crc32(flat.view(np.uint8).data, found)
  return f'{found:08x}'


def chunks(shape: Sequence[int], itemsize: int) -> tuple[int, ...]:
  """Shape of boxes of at most CHUNK_BYTES (or one item), each contiguous."""
  out = [1] * len(shape)
  for axis in reversed(range(len(shape))):
    inner = itemsize * math.prod(shape[axis + 1 :])
    out[axis] = max(1, min(shape[axis], CHUNK_BYTES // inner))
    if out[axis] < shape[axis]:
      break
  return tuple(out)


def _boxes(shape: Sequence[int], chunk: Sequence[int]) -> Iterator[Box]:
  """Every box of a grid, in C order."""
  sides = [
    [slice(start, min(start + size, full)) for start in range(0, full, size)]
    for full, size in zip(shape, chunk)
  ]
  return itertools.product(*sides)


def _store(path: epath.Path) -> Any:
  text = os.fspath(path)
  return text if '://' in text else {'driver': 'file', 'path': text}
