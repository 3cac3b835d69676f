"""A file that says what is finished, one line each; it survives a kill.

What a line says is true of the moment that it was written: whoever continues
compares the checksum with what lies there.
"""

import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from alignjax.core.files import Room

NAME = '.finished'
_PAGE = 512  # uint64 of a page of 4 KiB


def _nowhere(name: str) -> None:
  del name


class Put(NamedTuple):
  """What a writer gives: called with a name and an array, it writes.

  Attributes:
    write: the call.
    finished: names that an earlier process has written, not to be put again.
    room: name -> where the array will lie, to be filled before it is put, so
      that it is written once, in parts; None where a format or a file system
      has no such thing.
  """

  write: Callable[..., None]
  finished: frozenset[Any] = frozenset()
  room: Callable[[str], Room | None] = _nowhere

  def __call__(self, *named: Any) -> None:
    self.write(*named)


class Journal:
  """Names of what is finished in a directory, with the checksum of each.

  Attributes:
    found: what an earlier process has finished, by name.
  """

  def __init__(self, directory: Any):
    self._file = Path(directory) / NAME
    self.found: dict[str, str] = dict(_lines(self._file))

  def confirm(self, checksum: Callable[[str], str | None]) -> None:
    """Forgets what was found and has not the `checksum` that was noted."""
    self.found = {k: v for k, v in self.found.items() if checksum(k) == v}
    text = ''.join(f'{json.dumps(pair)}\n' for pair in self.found.items())
    self._file.write_text(text)

  def add(self, name: str, checksum: str) -> None:
    """To be called once the bytes are with the operating system."""
    with self._file.open('a') as stream:
      stream.write(f'{json.dumps([name, checksum])}\n')

  def remove(self) -> None:
    """The work is done."""
    self._file.unlink(missing_ok=True)


def checksum(data: np.ndarray) -> str:
  """Of an array's bytes: tells a page that was not written, or not whole.

  The pages are summed before a CRC is taken of their sum: six times as fast as
  a CRC of everything, and blind to their order alone.
  """
  flat = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
  whole = flat.size // (8 * _PAGE) * 8 * _PAGE
  pages = flat[:whole].view(np.uint64).reshape(-1, _PAGE)
  found = zlib.crc32(pages.sum(0, dtype=np.uint64).data)
  return f'{zlib.crc32(flat[whole:].data, found):08x}'


def _lines(file: Path) -> Iterator[tuple[str, str]]:
  if not file.exists():
    return
  for line in file.read_text('utf-8', 'replace').splitlines():
    try:
      name, checksum = json.loads(line)
    except (TypeError, ValueError):
      continue  # cut off by a kill
    yield str(name), str(checksum)
