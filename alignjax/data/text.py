"""Documents: named texts from a directory, a text file, JSONL or the stdlib.

Reads and checks once, in a fixed order, and hands out plain strings. Refuses
to tokenize, shuffle, batch or download, and to guess at an encoding: text is
UTF-8 or an error that says where it is not.
"""

import json
import re
import sys
import sysconfig
import zlib
from pathlib import Path
from typing import Any, NamedTuple

from alignjax.core.errors import UserError

# Folders of the standard library without much to learn from: tests, other
# people's packages, demos, and tables.
_STDLIB_SKIPS = frozenset(
  'test tests idle_test site-packages dist-packages idlelib lib2to3 encodings'
  ' turtledemo pydoc_data __pycache__'.split()
)
_CONTINUES = re.compile(r'[)\]}\s]|(?:else|elif|except|finally)\b')


class Document(NamedTuple):
  """A text and a name that stays the same from run to run.

  Of a JSONL row, `fields` are its other fields.
  """

  name: str
  text: str
  fields: dict[str, Any] = {}


def documents(
  path: str = '',
  *,
  field: str = 'text',
  pattern: str = '*.py',
  max_bytes: int = 6_000_000,
  max_bad: int = 10,
) -> list[Document]:
  """Read the documents at a path, in the order of their names or rows.

  Args:
    path: a directory (files that match `pattern`, at any depth), a `.jsonl`
      file, any other file (one document), or '' or 'stdlib' for the Python
      standard library's own source.
    field: the field of a JSONL row that holds the text.
    pattern: glob of the files of a directory.
    max_bytes: size of all documents together. Of a directory with more, files
      are chosen by a hash of their names; of a file with more, the beginning.
    max_bad: how many unusable files of a directory or rows of a JSONL file
      are skipped (and told on stderr) before they are an error.

  Raises:
    UserError: nothing there, nothing in it, not text, not UTF-8, not JSON, no
      such field; names the file, the row or the byte.
  """
  if max_bytes < 1:
    raise UserError(f'max_bytes is {max_bytes}, expected at least 1')
  if path in ('', 'stdlib'):
    root = Path(sysconfig.get_path('stdlib'))
    return _directory(root, '*.py', _STDLIB_SKIPS, max_bytes, max_bad)
  source = Path(path).expanduser()
  if not source.exists():
    raise UserError(f'{path}: no such file or directory')
  if source.is_dir():
    return _directory(source, pattern, frozenset(), max_bytes, max_bad)
  if source.suffix in ('.jsonl', '.ndjson'):
    return _rows(source, field, max_bytes, max_bad)
  text = _read(source, max_bytes)
  return [Document(source.name, text)]


def _read(path: Path, max_bytes: int) -> str:
  """Text of a file; if it is larger than max_bytes, its first whole lines."""
  try:
    with path.open('rb') as file:
      data = file.read(max_bytes + 1)
  except OSError as error:
    raise UserError(f'{path}: cannot be read ({error.strerror})') from error
  if len(data) > max_bytes:
    data = data[: data.rfind(b'\n', 0, max_bytes) + 1]
    if not data:
      raise UserError(
        f'{path}: its first line is longer than max_bytes ({max_bytes})'
      )
  if not data.strip():
    raise UserError(f'{path}: empty, expected text')
  nul = data.find(b'\0')
  if nul >= 0:
    raise UserError(f'{path}: binary (NUL at byte {nul}), expected text')
  try:
    text = data.decode('utf-8')
  except UnicodeDecodeError as error:
    raise UserError(
      f'{path}: not UTF-8 (byte {error.start} is 0x{data[error.start]:02x})'
    ) from error
  return text.removeprefix('\ufeff').replace('\r\n', '\n')


def _directory(
  root: Path,
  pattern: str,
  skips: frozenset[str],
  max_bytes: int,
  max_bad: int,
) -> list[Document]:
  files = {
    path.relative_to(root).as_posix(): path
    for path in root.rglob(pattern)
    if path.is_file() and not skips.intersection(path.relative_to(root).parts)
  }
  if not files:
    raise UserError(f'{root}: no file matches {pattern!r}')
  found, bad, left = [], [], max_bytes
  # By hash, so that a limit keeps some of everything and not the first names.
  for name in sorted(files, key=lambda n: (zlib.crc32(n.encode()), n)):
    path = files[name]
    size = path.stat().st_size
    # Empty files (`__init__.py`) are ordinary.
    if size > left or not size:
      continue
    try:
      text = _read(path, size)
    except UserError as error:
      bad.append(str(error))
      continue
    left -= size
    found.append(Document(name, text))
  _check_bad(root, 'files', bad, len(files), max_bad)
  if not found:
    raise UserError(
      bad[0]
      if bad
      else f'{root}: the {len(files)} files that match {pattern!r} are empty'
      f' or larger than max_bytes ({max_bytes})'
    )
  return sorted(found)


def _rows(
  path: Path, field: str, max_bytes: int, max_bad: int
) -> list[Document]:
  found, bad, left, number = [], [], max_bytes, 0
  with path.open('rb') as file:
    for number, line in enumerate(file, start=1):
      if not line.strip():
        continue
      if b'\0' in line:
        raise UserError(f'{path}: binary (NUL in row {number}), expected JSONL')
      try:
        row = _row(line, field)
      except UserError as error:
        bad.append(f'{path}: row {number} {error}')
        continue
      text = row.pop(field)
      left -= len(text.encode())
      if left < 0 and found:
        break
      found.append(Document(f'{path.name}:{number}', text, row))
  _check_bad(path, 'rows', bad, number, max_bad)
  if not found:
    raise UserError(bad[0] if bad else f'{path}: empty, expected JSON rows')
  return found


def _row(line: bytes, field: str) -> dict[str, Any]:
  """A row with text in `field`; the error is the end of a sentence."""
  try:
    row = json.loads(line.decode('utf-8'))
  except UnicodeDecodeError as error:
    raise UserError(
      f'is not UTF-8 (byte {error.start} of the row is'
      f' 0x{line[error.start]:02x})'
    ) from error
  except (ValueError, RecursionError) as error:
    raise UserError(f'is not JSON ({error})') from error
  if not isinstance(row, dict):
    raise UserError(f'is a {type(row).__name__}, expected an object')
  if field not in row:
    raise UserError(
      f'has no field {field!r} (fields: {", ".join(row) or "none"})'
    )
  text = row[field]
  if not isinstance(text, str):
    raise UserError(
      f'has a {type(text).__name__} in field {field!r}, expected a string'
    )
  if not text.strip():
    raise UserError(f'has nothing in field {field!r}')
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise UserError(
      f'has half a surrogate pair in field {field!r} (character {error.start})'
    ) from error
  return row | {field: text.replace('\r\n', '\n')}


def _check_bad(
  path: Path, what: str, bad: list[str], total: int, max_bad: int
) -> None:
  if not bad:
    return
  first = '; '.join(bad[:3])
  if len(bad) > max_bad:
    raise UserError(
      f'{path}: {len(bad)} of {total} {what} are unusable, more than'
      f' {max_bad}: {first}'
    )
  print(f'skipped {len(bad)} of {total} {what}: {first}', file=sys.stderr)


def split(
  document: Document, max_chars: int, *, rest: bool = False
) -> list[str]:
  """Cut a document into pieces of at most max_chars that begin at a top level.

  A piece is one or more whole blocks: the lines from one unindented line
  after a blank line to the next. A longer block is cut at a line end and goes
  on at its next unindented line, if there is one; what lies between is
  dropped, or with `rest` makes pieces that begin inside a block (indented).
  Pieces end with a newline and are never blank.
  """
  lines = [f'{line}\n' for line in document.text.split('\n')]
  strong, weak = _starts(lines)
  pieces: list[str] = []
  blocks = [*strong, len(lines)]
  piece = ''
  for first, last in zip(blocks, blocks[1:]):
    block = ''.join(lines[first:last])
    if len(piece) + len(block.rstrip()) + 1 <= max_chars:
      piece += block
      continue
    pieces.append(piece)
    piece = ''
    while len(block.rstrip()) + 1 > max_chars and first < last:
      size = 0
      for line in lines[first:last]:
        if size + len(line) > max_chars:
          break
        piece += line
        size += len(line)
        first += 1
      pieces.append(piece)
      if not rest or not piece:  # a single line may be too long
        first = next((n for n in weak if first < n < last), last)
      piece = ''
      block = ''.join(lines[first:last])
    piece = block
  pieces.append(piece)
  return [p.rstrip() + '\n' for p in pieces if p.strip()]


def _starts(lines: list[str]) -> tuple[list[int], list[int]]:
  """Numbers of the lines that can begin a piece: after a blank, and others."""
  quoted = _quoted(lines)
  # A comment belongs to what follows it, which may be inside a block.
  opens, top = [], True
  for line in reversed(lines):
    if line.strip() and not line.startswith('#'):
      top = not _CONTINUES.match(line)
    opens.append(top and not line.isspace())
  opens.reverse()
  weak = [
    n
    for n, opening in enumerate(opens)
    if opening and not quoted[n] and not (n and lines[n - 1].startswith('@'))
  ]
  strong = [n for n in weak if n and not lines[n - 1].strip()]
  return [0, *(n for n in strong if n)], weak


def _quoted(lines: list[str]) -> list[bool]:
  """Whether a line begins inside a triple-quoted string.

  Counts quotes only; where that does not come out even (prose, an odd
  comment) no line is.
  """
  inside, flags = '', []
  for line in lines:
    flags.append(bool(inside))
    if not inside and line.lstrip().startswith('#'):
      continue
    for quotes in re.findall(r'\"{3}|\'{3}', line):
      inside = '' if inside == quotes else inside or quotes
  return [False] * len(lines) if inside else flags


def held_out(name: str, fraction: float) -> bool:
  """Whether a document belongs to the held-out part: by its name alone."""
  return zlib.crc32(name.encode()) < fraction * 2**32
