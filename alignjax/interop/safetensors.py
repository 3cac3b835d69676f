"""safetensors files, read and written one tensor at a time.

Headers are checked whole before anything is read: after that a name is a place
in a file. Not the package of that name, whose numpy side knows no bfloat16,
whose writer wants all tensors at once, and whose errors name no tensor. Only
this format: it never unpickles and never guesses.
"""

import contextlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any, NamedTuple, TypeGuard

import ml_dtypes
import numpy as np
from etils import epath

from alignjax.core import files, journal
from alignjax.core.errors import UserError
from alignjax.core.files import Room
from alignjax.core.journal import Journal, Put
from alignjax.core.spec import Spec

SINGLE = 'model.safetensors'
INDEX = 'model.safetensors.index.json'
HEADER_BYTES = 100_000_000  # the format's own limit
SHARD_BYTES = 4 * 10**9

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


@contextlib.contextmanager
def writer(
  directory: epath.PathLike,
  tensors: Mapping[str, Spec],
  *,
  shard_bytes: int = SHARD_BYTES,
  resume: bool = False,
) -> Iterator[Put]:
  """Writes tensors as one file, or as shards with an index.

  Yields put(name, array), to be called once for every tensor, in any order;
  nothing is held back. Within a shard tensors lie as the safetensors package
  lays them. The directory must exist; swapping it in is the caller's job.
  With `resume`, tensors that are there, of this shape and with the checksum
  that was noted when they were written, are `put.finished`.

  Args:
    directory: where the files go.
    tensors: name -> shape and dtype; shards are filled in this order.
    shard_bytes: a shard is closed before it would grow beyond this.
  """
  directory = epath.Path(directory)
  shards = _shards(tensors, shard_bytes)
  places: dict[str, tuple[IO[bytes], int]] = {}
  left = set(tensors)
  book = _continued(directory, tensors, shards) if resume else None
  finished = frozenset(book.found if book else ())
  left -= finished
  with contextlib.ExitStack() as stack:
    for file, names in shards.items():
      if '://' in str(directory):
        opened = (directory / file).open('wb')
      else:  # epath cannot read what it writes
        mode = 'w+b' if finished.isdisjoint(names) else 'r+b'
        opened = open(directory / file, mode)
      stream: IO[bytes] = stack.enter_context(opened)
      header, starts = _header(tensors, names)
      stream.write(header)
      places |= {name: (stream, start) for name, start in starts.items()}

    def put(name: str, array: np.ndarray) -> None:
      spec = tensors[name]
      if name not in left:
        raise ValueError(f'tensor {name!r} was put twice')
      if (array.shape, array.dtype) != (spec.shape, spec.dtype):
        raise ValueError(
          f'tensor {name!r} is {array.dtype}{list(array.shape)}, announced as'
          f' {spec.dtype}{list(spec.shape)}'
        )
      stream, start = places[name]
      if name not in rooms:
        stream.seek(start)
        stream.write(_bytes(array))
      left.remove(name)
      if book is not None:
        stream.flush()
        book.add(name, journal.checksum(array))

    rooms: set[str] = set()

    def room(name: str) -> Room | None:
      if '://' in str(directory):
        return None
      (stream, start), spec = places[name], tensors[name]
      stream.flush()
      rooms.add(name)
      return files.room(stream.fileno(), start, spec.shape, spec.dtype)

    yield Put(put, finished, room)
    if left:
      raise ValueError(f'tensors never put: {sorted(left)}')
  if book is not None:
    book.remove()
  if len(shards) > 1:
    (directory / INDEX).write_text(_index(tensors, shards))


def _continued(
  directory: epath.Path,
  tensors: Mapping[str, Spec],
  shards: Mapping[str, Sequence[str]],
) -> Journal:
  """The journal of a writer that was interrupted: what it had finished."""
  places = {
    name: (directory / file, start)
    for file, names in shards.items()
    for name, start in _header(tensors, names)[1].items()
  }

  def checksum(name: str) -> str | None:
    if name not in places:
      return None
    (file, start), spec = places[name], tensors[name]
    try:
      data = read(Tensor(name, file, spec.shape, np.dtype(spec.dtype), start))
    except (OSError, UserError):  # not there, or shorter than it was
      return None
    return journal.checksum(data)

  book = Journal(directory)
  book.confirm(checksum)
  return book


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


def _bytes(array: np.ndarray) -> memoryview:
  return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _shards(
  tensors: Mapping[str, Spec], shard_bytes: int
) -> dict[str, list[str]]:
  """File name -> the tensors that it holds."""
  shards: list[list[str]] = [[]]
  filled = 0
  for name, spec in tensors.items():
    if shards[-1] and filled + size(spec) > shard_bytes:
      shards.append([])
      filled = 0
    shards[-1].append(name)
    filled += size(spec)
  if len(shards) == 1:
    return {SINGLE: shards[0]}
  return {
    f'model-{i:05d}-of-{len(shards):05d}.safetensors': names
    for i, names in enumerate(shards, 1)
  }


def size(spec: Spec) -> int:
  """Bytes of an array."""
  return math.prod(spec.shape) * np.dtype(spec.dtype).itemsize


def _header(
  tensors: Mapping[str, Spec], names: Sequence[str]
) -> tuple[bytes, dict[str, int]]:
  """The beginning of a file, and where each of its tensors begins."""
  codes = {name: CODES[np.dtype(tensors[name].dtype)] for name in names}
  order = list(DTYPES)
  entries: dict[str, Any] = {'__metadata__': {'format': 'pt'}}
  end = 0
  for name in sorted(names, key=lambda n: (-order.index(codes[n]), n)):
    start, end = end, end + size(tensors[name])
    entries[name] = {
      'dtype': codes[name],
      'shape': list(tensors[name].shape),
      'data_offsets': [start, end],
    }
  text = json.dumps(entries, separators=(',', ':'), ensure_ascii=False).encode()
  text += b' ' * (-len(text) % 8)
  data = 8 + len(text)
  places = {name: data + entries[name]['data_offsets'][0] for name in names}
  return len(text).to_bytes(8, 'little') + text, places


def _index(
  tensors: Mapping[str, Spec],
  shards: Mapping[str, Sequence[str]],
) -> str:
  facts = {
    'metadata': {'total_size': sum(map(size, tensors.values()))},
    'weight_map': {
      name: file for file, names in shards.items() for name in names
    },
  }
  return json.dumps(facts, indent=2, sort_keys=True) + '\n'
