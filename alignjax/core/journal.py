"""A file that says what is finished, one line each; it survives a kill.

What a line says is true of the moment that it was written: whoever continues
compares the checksum with what lies there.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple


class Put(NamedTuple):
  """What a writer gives: called with a name and an array, it writes.

  Attributes:
    write: the call.
    finished: names that an earlier process has written, not to be put again.
  """

  write: Callable[..., None]
  finished: frozenset[Any] = frozenset()

  def __call__(self, *named: Any) -> None:
    self.write(*named)


class Journal:
  """Names of what is finished, with the checksum of each.

  Attributes:
    found: what an earlier process has finished, by name.
  """

  def __init__(self, file: Any):
    self._file = Path(file)
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


def _lines(file: Path) -> Iterator[tuple[str, str]]:
  if not file.exists():
    return
  for line in file.read_text('utf-8', 'replace').splitlines():
    try:
      name, checksum = json.loads(line)
    except (TypeError, ValueError):
      continue  # cut off by a kill
    yield str(name), str(checksum)
