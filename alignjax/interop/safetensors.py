"""safetensors files, read one tensor at a time.

Headers are checked whole before anything is read: after that a name is a place
in a file. Not the package of that name, whose numpy side knows no bfloat16 and
whose errors name no tensor. Only this format: it never unpickles and never
guesses.
"""

import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeGuard

import ml_dtypes
import numpy as np
from etils import epath

from alignjax.core.errors import UserError

SINGLE = 'model.safetensors'
INDEX = 'model.safetensors.index.json'
HEADER_BYTES = 100_000_000  # the format's own limit

# From narrow to wide: files hold the widest tensors first, which aligns them.
DTYPES = {
  'BOOL': np.dtype(np.bool_),
  'U8': np.dtype(np.uint8),
  'I8': np.dtype(np.int8),
  'I16': np.dtype('<i2'),
  'U16': np.dtype('<u2'),
  'F16': np.dtype('<f2'),
  'BF16': np.dtype(ml_dtypes.bfloat16),
  'I32': np.dtype('<i4'),
  'U32': np.dtype('<u4'),
  'F32': np.dtype('<f4'),
  'F64': np.dtype('<f8'),
  'I64': np.dtype('<i8'),
  'U64': np.dtype('<u8'),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}


class Tensor(NamedTuple):
  """Where a tensor lies.

  Attributes:
    name: in the file.
    file: that holds it.
    shape: as in the header.
    dtype: of numpy or ml_dtypes.
    start: its first byte, counted from the start of the file.
  """

  name: str
  file: epath.Path
  shape: tuple[int, ...]
  dtype: np.dtype
  start: int

  @property
  def nbytes(self) -> int:
    """Size in the file."""
    return math.prod(self.shape) * self.dtype.itemsize


def header(file: epath.PathLike) -> dict[str, Tensor]:
  """Tensors of a file by name, in the order of their bytes.

  Raises UserError unless the header is sound and the file has every byte that
  it promises and no other.
  """
  file = epath.Path(file)
  size = file.stat().length
  with file.open('rb') as stream:
    head = stream.read(8)
    length = int.from_bytes(head, 'little')
    if len(head) < 8 or not 2 <= length <= HEADER_BYTES:
      raise UserError(
        f'{file} is not a safetensors file: {size} bytes, of which the first'
        f' 8 say that its header has {length}'
      )
    text = stream.read(length)
  if len(text) < length:
    raise UserError(
      f'{file} is truncated: its header needs {8 + length} bytes, the file has'
      f' {size}'
    )
  entries = _entries(file, text)
  entries.pop('__metadata__', None)
  tensors = [
    _tensor(file, name, entry, 8 + length) for name, entry in entries.items()
  ]
  tensors.sort(key=lambda tensor: (tensor.start, tensor.nbytes))
  _check_bytes(file, tensors, 8 + length, size)
  return {tensor.name: tensor for tensor in tensors}


def read(tensor: Tensor) -> np.ndarray:
  """A whole tensor."""
  return _read(tensor, tensor.start, tensor.shape)


def view(tensor: Tensor) -> np.ndarray:
  """A whole tensor as a window on its file, which is read where it is used.

  Not to be written to. Files that are not local are read.
  """
  if '://' in str(tensor.file) or not tensor.nbytes:
    return read(tensor)
  mapped = np.memmap(tensor.file, np.uint8, 'r', tensor.start, (tensor.nbytes,))
  return mapped.view(np.ndarray).view(tensor.dtype).reshape(tensor.shape)


def rows(tensor: Tensor, start: int, stop: int) -> np.ndarray:
  """Entries start to stop of the first axis; nothing else is read."""
  if not 0 <= start <= stop <= tensor.shape[0]:
    raise IndexError(f'rows {start}:{stop} of {tensor.name} {tensor.shape}')
  shape = (stop - start, *tensor.shape[1:])
  row_bytes = math.prod(tensor.shape[1:]) * tensor.dtype.itemsize
  return _read(tensor, tensor.start + start * row_bytes, shape)


def same(a: Tensor, b: Tensor, piece_bytes: int = 2**25) -> bool:
  """Whether two tensors have one shape, dtype and bytes; reads in pieces."""
  if (a.shape, a.dtype) != (b.shape, b.dtype):
    return False
  for start in range(0, a.nbytes, piece_bytes):
    shape = (min(piece_bytes, a.nbytes - start),)
    ours, theirs = (
      _read(x._replace(dtype=DTYPES['U8']), x.start + start, shape)
      for x in (a, b)
    )
    if not np.array_equal(ours, theirs):
      return False
  return True


def _entries(file: epath.Path, text: bytes) -> dict[str, Any]:
  def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
      raise ValueError('a name occurs twice')
    return found

  try:
    entries = json.loads(text, object_pairs_hook=unique)
  except (ValueError, RecursionError) as error:
    raise UserError(
      f'{file} is not a safetensors file: its header is not JSON ({error})'
    ) from error
  if not isinstance(entries, dict):
    raise UserError(
      f'{file} is not a safetensors file: its header is no object'
    )
  return entries


def _tensor(file: epath.Path, name: str, entry: Any, data: int) -> Tensor:
  """One entry of a header whose data begins at byte `data`."""

  def bad(why: str) -> UserError:
    return UserError(f'{file}: tensor {name!r} {why}')

  if not isinstance(entry, dict):
    raise bad('has no description')
  code = entry.get('dtype')
  if not isinstance(code, str) or code not in DTYPES:
    raise bad(f'has dtype {code!r}, expected one of {list(DTYPES)}')
  shape, offsets = entry.get('shape'), entry.get('data_offsets')
  if not _sizes(shape):
    raise bad(f'has shape {shape!r}, expected a list of sizes')
  if not _sizes(offsets) or len(offsets) != 2:
    raise bad(f'has data_offsets {offsets!r}, expected two sizes')
  start, end = offsets
  tensor = Tensor(name, file, tuple(shape), DTYPES[code], data + start)
  if end - start != tensor.nbytes:
    raise bad(
      f'has {end - start} bytes, expected {tensor.nbytes} of {code}{shape}'
    )
  return tensor


def _sizes(value: Any) -> TypeGuard[list[int]]:
  return isinstance(value, list) and all(
    type(size) is int and size >= 0 for size in value
  )


def _check_bytes(
  file: epath.Path, tensors: Sequence[Tensor], data: int, size: int
) -> None:
  """The tensors follow each other without a gap up to the end of the file."""
  end = data
  for tensor in tensors:
    if tensor.start != end:
      raise UserError(
        f'{file}: tensor {tensor.name!r} begins at byte {tensor.start},'
        f' expected {end}, where the one before ends'
      )
    end += tensor.nbytes
    if end > size:
      raise UserError(
        f'{file} is truncated: tensor {tensor.name!r} needs bytes'
        f' {tensor.start} to {end}, the file has {size}'
      )
  if end != size:
    raise UserError(
      f'{file} has {size} bytes, its header describes {end} of them'
    )


def _read(tensor: Tensor, start: int, shape: tuple[int, ...]) -> np.ndarray:
  out = np.empty(math.prod(shape) * tensor.dtype.itemsize, np.uint8)
  view, done = out.data, 0
  with tensor.file.open('rb') as opened:
    stream: Any = opened  # epath's type of it lacks readinto
    stream.seek(start)
    while done < len(view):
      count = stream.readinto(view[done:])
      if not count:
        raise UserError(
          f'{tensor.file} is truncated: tensor {tensor.name!r} needs bytes'
          f' {start} to {start + len(view)}, the file has {start + done}'
        )
      done += count
  return out.view(tensor.dtype).reshape(shape)
