"""Records of a teacher: k ids and probabilities per position, by row.

`write` runs a teacher over a source's rows in the order of their ids, shard by
shard, and goes on where it was killed. `recorded` is a source that joins the
records to the rows. `teacher.json` says what they belong to: records of other
rows, of another tokenizer or of another length are refused before any compute.
Knows no model.
"""

import dataclasses
import functools
import hashlib
import json
import os
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from alignjax.core import files, lookup
from alignjax.core.errors import UserError
from alignjax.data.sources import Rows
from alignjax.data.tokenizer import fingerprint

FORMAT = 1
FACTS = 'teacher.json'
SHARD_ROWS = 256  # what a kill may cost again
_AT_RANDOM = 'readahead_buffer_size:0,max_parallelism:0'
_HEAD = struct.Struct('<qI')  # row id, crc32 of its tokens
_FIELDS = ('tokens', 'segment', 'position', 'loss_mask')


@dataclasses.dataclass(frozen=True)
class Recorded:
  """A Source: `rows`, with `teacher_ids` and `teacher_probs` [B, T-1, k]."""

  rows: Rows
  path: Path
  facts: Mapping[str, Any]

  listens = False

  def __len__(self) -> int:
    return len(self.rows)

  def batch(self, k: int) -> dict[str, np.ndarray]:
    """Batch k of the rows, and what the teacher said about them."""
    batch = self.rows.batch(k)
    records = [
      self._record(int(i), tokens)
      for i, tokens in zip(batch['id'], batch['tokens'])
    ]
    ids, probs = zip(*records)
    return batch | {
      'teacher_ids': np.stack(ids),
      'teacher_probs': np.stack(probs),
    }

  def batches(self, start: int) -> Iterator[dict[str, np.ndarray]]:
    k = start
    while True:
      yield self.batch(k)
      k += 1

  def records(self, ids) -> list[dict[str, Any]]:
    return self.rows.records(ids)

  def state(self) -> dict[str, Any]:
    return self.rows.state()

  def restore(self, state: dict[str, Any]) -> None:
    self.rows.restore(state)

  def tell(self, batch) -> None:
    del batch

  def _record(self, row: int, tokens: np.ndarray):
    shard, at = divmod(row, self.facts['shard_rows'])
    file = _shard(self.path, shard)
    try:
      data = _reader(file).read([at])[0]
      found, crc = _HEAD.unpack_from(data)
    except (RuntimeError, IndexError, ValueError, struct.error) as error:
      raise UserError(f'{file}: record {at} cannot be read') from error
    if (found, crc) != (row, zlib.crc32(tokens.tobytes())):
      raise UserError(
        f'{file}: record {at} is of row {found}, expected row {row} with the '
        'same tokens'
      )
    shape = (len(tokens) - 1, self.facts['k'])
    size = 4 * shape[0] * shape[1]
    if len(data) != _HEAD.size + 2 * size:
      raise UserError(
        f'{file}: record {at} has {len(data)} bytes, expected '
        f'{_HEAD.size + 2 * size}'
      )
    body = memoryview(data)[_HEAD.size :]
    ids = np.frombuffer(body[:size], '<i4').reshape(shape)
    return ids, np.frombuffer(body[size:], '<f4').reshape(shape)


def recorded(
  tokenizer, batch_size: int, seed: int, *, rows: dict, path: str = ''
) -> Recorded:
  """The source of section `rows`, with a teacher's records at `path`.

  Raises UserError where the records are not of these rows, whole.
  """
  source = lookup.build('data', rows, tokenizer, batch_size, seed)
  folder = Path(path)
  facts = read_facts(folder)
  _refuse(folder / FACTS, facts, _expected(source, tokenizer))
  for shard in range(_shards(facts)):
    begin = shard * facts['shard_rows']
    there = _shard(folder, shard)
    if not there.is_file():
      raise UserError(
        f'{folder}: no record of row {begin}; the same `alignjax teach` goes '
        'on where it stopped'
      )
    expected = min(facts['shard_rows'], facts['rows'] - begin)
    if (count := _reader(there).num_records()) != expected:
      raise UserError(
        f'{there}: damaged, {count} whole records of {expected}; remove it and '
        'start the same `alignjax teach` again'
      )
  return Recorded(source, folder, facts)


def read_facts(folder: Path) -> dict[str, Any]:
  """What the records in a folder say about themselves; no record is read.

  Raises UserError if there are none, or none that are sound.
  """
  file = folder / FACTS
  if not file.is_file():
    raise UserError(
      f"source.path: no teacher's records at {str(folder)!r} (no {FACTS}); "
      '`alignjax teach` writes them'
    )
  try:
    facts = json.loads(file.read_text('utf-8'))
  except (OSError, ValueError) as error:
    raise UserError(f'{file}: not JSON ({error})') from error
  numbers = ('k', 'rows', 'shard_rows')
  if not isinstance(facts, dict) or facts.get('format') != FORMAT:
    raise UserError(f"{file}: not a teacher's records of format {FORMAT}")
  if not all(isinstance(facts.get(name), int) for name in numbers):
    raise UserError(f'{file}: expected numbers {list(numbers)}')
  return facts


def write(
  path: Path,
  source: Rows,
  tokenizer,
  about: Mapping[str, Any],
  fn: Callable[[dict[str, np.ndarray]], tuple[Any, Any]],
  *,
  shard_rows: int = SHARD_ROWS,
  advance: Callable[[int, str], None] = lambda done, text: None,
) -> None:
  """Writes the records of all rows; the same call again goes on.

  Args:
    path: the folder; new, or of an interrupted call.
    source: plain sequences, in batches of its `batch_size`.
    tokenizer: of the rows and of the teacher.
    about: JSON that says who the teacher is; holds `k`.
    fn: batch -> (ids int32, probabilities f32), each [B, T-1, k].
    shard_rows: per file, the work that a kill can cost.
    advance: called with (rows done, '').

  Raises:
    UserError: the folder holds something else, or cannot be written.
  """
  module = _array_record()
  facts = _expected(source, tokenizer) | dict(about)
  facts |= {'format': FORMAT, 'shard_rows': shard_rows}
  file = path / FACTS
  if file.is_file():
    _refuse(file, read_facts(path), facts)
  elif path.exists() and (not path.is_dir() or any(path.iterdir())):
    raise UserError(f'{path} exists and has no {FACTS}, so it is left alone')
  else:
    files.write(file, json.dumps(facts, indent=2, sort_keys=True) + '\n')
  for shard in range(_shards(facts)):
    ids = np.arange(shard * shard_rows, len(source))[:shard_rows]
    there = _shard(path, shard)
    if not there.is_file():
      partial = there.with_name(f'.{there.name}.partial')
      out = module.ArrayRecordWriter(str(partial), 'group_size:1')
      for begin in range(0, len(ids), source.batch_size):
        for record in _records(source, ids[begin:][: source.batch_size], fn):
          out.write(record)
        advance(int(ids[begin]), '')
      out.close()
      os.replace(partial, there)
    advance(int(ids[-1]) + 1, '')


def _records(source: Rows, ids: np.ndarray, fn) -> Iterator[bytes]:
  """The records of up to a batch of rows."""
  # The last batch is filled up: every call of `fn` has the same shapes.
  batch = source.rows(np.resize(ids, source.batch_size))
  found, probs = (np.asarray(x) for x in fn(batch))
  for i, row in enumerate(ids):
    tokens = batch['tokens'][i]
    yield (
      _HEAD.pack(int(row), zlib.crc32(tokens.tobytes()))
      + found[i].astype('<i4').tobytes()
      + probs[i].astype('<f4').tobytes()
    )


def _expected(source: Any, tokenizer) -> dict[str, Any]:
  """What records of these rows say about them."""
  fields = getattr(source, 'fields', {})
  if 'tokens' not in fields:
    raise UserError(
      'a teacher is written down for plain sequences, and this source gives '
      f'{sorted(fields) or "something else"}'
    )
  digest = hashlib.sha256()
  for name in _FIELDS:
    digest.update(np.ascontiguousarray(fields[name]).tobytes())
  return {
    'length': fields['tokens'].shape[1],
    'tokenizer': fingerprint(tokenizer),
    'rows': len(source),
    'rows_digest': digest.hexdigest(),
  }


def _refuse(file: Path, found: Mapping, expected: Mapping) -> None:
  """UserError with the first thing that differs."""
  for name, value in expected.items():
    if found.get(name) != value:
      raise UserError(
        f'{file}: these records have {name} = {found.get(name)!r}, expected '
        f'{value!r}'
      )


def _shards(facts: Mapping[str, Any]) -> int:
  return -(-facts['rows'] // facts['shard_rows'])


def _shard(path: Path, number: int) -> Path:
  return path / f'teacher-{number:06}.array_record'


@functools.lru_cache(maxsize=64)
def _reader(file: Path):
  try:
    return _array_record().ArrayRecordReader(str(file), _AT_RANDOM)
  except RuntimeError as error:
    raise UserError(f'{file}: not a whole ArrayRecord file') from error


def _array_record():
  try:
    from array_record.python import array_record_module  # pyright: ignore
  except ImportError as error:
    raise UserError(
      "a teacher's records need the package array_record, which cannot be "
      f'imported here: {error}'
    ) from error
  return array_record_module
