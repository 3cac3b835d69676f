"""safetensors files, written one tensor at a time, in any order.

Not the package of that name, whose writer wants all tensors at once. A local
file is written where it stays. An object store takes no byte out of its place:
a file for it is made on the local disk and sent when it is complete.
"""

import contextlib
import json
import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from etils import epath

from alignjax.core import files, journal
from alignjax.core.errors import UserError
from alignjax.core.files import Room
from alignjax.core.journal import Journal, Put
from alignjax.core.spec import Spec
from alignjax.interop.safetensors import (
  CODES,
  DTYPES,
  INDEX,
  SINGLE,
  Tensor,
  read,
)

SHARD_BYTES = 4 * 10**9
PIECE_BYTES = 2**24  # sent at once


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
  nothing is held in memory. Within a shard tensors lie as the safetensors
  package lays them. The directory must exist; swapping it in is the caller's
  job.
  With `resume`, tensors that are there, of this shape and with the checksum
  that was noted when they were written, are `put.finished`.

  Args:
    directory: where the files go.
    tensors: name -> shape and dtype; shards are filled in this order.
    shard_bytes: a shard is closed before it would grow beyond this.
  """
  directory = epath.Path(directory)
  shards = _shards(tensors, shard_bytes)
  places: dict[str, tuple[str, IO[bytes], int]] = {}
  left = set(tensors)
  book = _continued(directory, tensors, shards) if resume else None
  finished = frozenset(book.found if book else ())
  left -= finished
  with contextlib.ExitStack() as stack:
    sent = '://' in str(directory)
    local = Path(directory)
    if sent:
      local = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    for file, names in shards.items():
      mode = 'w+b' if finished.isdisjoint(names) else 'r+b'
      stream: IO[bytes] = stack.enter_context(open(local / file, mode))
      header, starts = _header(tensors, names)
      stream.write(header)
      places |= {name: (file, stream, at) for name, at in starts.items()}

    def put(name: str, array: np.ndarray) -> None:
      spec = tensors[name]
      if name not in left:
        raise ValueError(f'tensor {name!r} was put twice')
      if (array.shape, array.dtype) != (spec.shape, spec.dtype):
        raise ValueError(
          f'tensor {name!r} is {array.dtype}{list(array.shape)}, announced as'
          f' {spec.dtype}{list(spec.shape)}'
        )
      file, stream, start = places[name]
      if name not in rooms:
        stream.seek(start)
        stream.write(_bytes(array))
      left.remove(name)
      if book is not None:
        stream.flush()
        book.add(name, journal.checksum(array))
      if sent and left.isdisjoint(shards[file]):
        stream.close()
        _send(local / file, directory / file)

    rooms: set[str] = set()

    def room(name: str) -> Room:
      (_, stream, start), spec = places[name], tensors[name]
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


def _send(file: Path, to: epath.Path) -> None:
  """Moves a complete file to where it belongs."""
  with file.open('rb') as local, to.open('wb') as remote:
    shutil.copyfileobj(local, remote, PIECE_BYTES)
  file.unlink()


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
