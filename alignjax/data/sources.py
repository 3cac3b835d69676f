"""Sources: batch k is a function of (seed, k).

Each function here reads, checks and tokenizes once, before any compute, and
returns `Rows`. grain gives the order: a new permutation every epoch, by random
access, so that no state but k needs saving.
"""

import dataclasses
import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np

from alignjax.core.errors import UserError
from alignjax.data import format as chats
from alignjax.data import pack as packing
from alignjax.data import text as texts

PARTS = ('train', 'held_out', 'all')


@dataclasses.dataclass(frozen=True)
class Rows:
  """A Source over rows in memory.

  Attributes:
    fields: batch fields, arrays of the same first axis.
    facts: what the host knows of each row.
    batch_size, seed: of the batches.
  """

  fields: dict[str, np.ndarray]
  facts: Sequence[dict[str, Any]]
  batch_size: int
  seed: int

  listens = False

  def __len__(self) -> int:
    return len(next(iter(self.fields.values())))

  def batch(self, k: int) -> dict[str, np.ndarray]:
    """Batch k; goes through all rows before any comes again."""
    order = _order(len(self), self.seed)
    start = k * self.batch_size
    ids = np.array([order[start + i] for i in range(self.batch_size)])
    return self.rows(ids)

  def rows(self, ids: np.ndarray) -> dict[str, np.ndarray]:
    """The given rows, in that order."""
    fields = {name: values[ids] for name, values in self.fields.items()}
    return fields | {'id': ids.astype(np.int32)}

  def batches(self, start: int) -> Iterator[dict[str, np.ndarray]]:
    k = start
    while True:
      yield self.batch(k)
      k += 1

  def records(self, ids) -> list[dict[str, Any]]:
    return [self.facts[int(i)] for i in np.asarray(ids)]

  def state(self) -> dict[str, Any]:
    return {}

  def restore(self, state: dict[str, Any]) -> None:
    del state

  def tell(self, batch) -> None:
    del batch


@functools.lru_cache(maxsize=8)
def _order(size: int, seed: int):
  """Row numbers, a new permutation every epoch."""
  return grain.MapDataset.range(size).seed(seed).shuffle().repeat()


def text(
  tokenizer,
  batch_size: int,
  seed: int,
  *,
  path: str = '',
  field: str = 'text',
  pattern: str = '*.py',
  max_bytes: int = 6_000_000,
  length: int = 128,
  part: str = 'train',
  held_out: float = 0.05,
) -> Rows:
  """Packed rows of plain text: BOS, a piece of a document, EOS.

  A piece starts at a top-level line and is about `length` tokens at most; the
  rest of a longer block makes further pieces, and EOS comes after the last.
  """
  pieces = _pieces(
    path, field, pattern, max_bytes, length, part, held_out, rest=True
  )
  encoded = tokenizer.encode_batch([piece for _, piece in pieces])
  following = [piece for _, piece in pieces[1:]] + ['']
  documents = []
  for ids, after in zip(encoded, following):
    # Text that goes on in the next piece has not ended here.
    ids = ids if after[:1].isspace() else [*ids, tokenizer.eos]
    for begin in range(0, len(ids), length - 1):
      part_ids = [tokenizer.bos, *ids[begin : begin + length - 1]]
      documents.append((part_ids, [True] * len(part_ids)))
  return _rows(packing.pack(documents, length), batch_size, seed)


def chat(
  tokenizer,
  batch_size: int,
  seed: int,
  *,
  path: str = '',
  field: str = 'messages',
  length: int = 128,
) -> Rows:
  """Packed conversations of a JSONL file; the loss is on model turns only.

  Each row has `field`: a list of {'role': 'user'|'model', 'content': text}.
  """
  documents = []
  for number, row in enumerate(_json_rows(path), start=1):
    if field not in row:
      raise UserError(
        f'{path}, row {number}: no field {field!r}; found {sorted(row)}'
      )
    try:
      ids, mask = chats.chat_tokens(tokenizer, row[field])
    except UserError as error:
      raise UserError(f'{path}, row {number}: {error}') from None
    if len(ids) > length:
      raise UserError(
        f'{path}, row {number}: {len(ids)} tokens do not fit the context of '
        f'{length} (source.length)'
      )
    documents.append((ids, mask))
  return _rows(packing.pack(documents, length), batch_size, seed)


def prompts(
  tokenizer,
  batch_size: int,
  seed: int,
  *,
  path: str = '',
  field: str = 'text',
  pattern: str = '*.py',
  max_bytes: int = 6_000_000,
  prompt_tokens: int = 48,
  response_tokens: int = 0,
  uncond: str | None = None,
  whole: bool = False,
  part: str = 'train',
  held_out: float = 0.05,
) -> Rows:
  """Prompts, left-padded to `prompt_tokens`: BOS and text.

  By default a prompt is the beginning of a piece of a document, cut at a line
  end (in a piece of one line, between words) so that something is left to
  write. With `whole` the text of a row or file is the prompt, and one that
  does not fit is an error; the other fields of a JSONL row (a reference answer)
  are among the facts of its record. With `response_tokens` the response of a
  row is what follows, cut to so many tokens. With `uncond`, a text or '' for
  BOS alone, every row has that negative prompt too.
  """
  if whole and response_tokens:
    raise UserError('source.response_tokens: nothing follows a whole text')
  budget = prompt_tokens - 1
  if whole:
    found = texts.documents(
      path, field=field, pattern=pattern, max_bytes=max_bytes
    )
    heads = [(d.name, d.text, '') for d in found]
    known = {d.name: d.fields for d in found}
  else:
    pieces = _pieces(path, field, pattern, max_bytes, 128, part, held_out)
    heads = _heads(tokenizer, pieces, budget)
    known = {}
  if not heads:
    raise UserError(
      f'{path or "stdlib"}: no text is long enough for a prompt of up to '
      f'{prompt_tokens} tokens'
    )
  named = [(name, head) for name, head, _ in heads]
  fields = {'prompt': _prompts(tokenizer, named, prompt_tokens)}
  if uncond is not None:
    row = _prompts(tokenizer, [('source.uncond', uncond)], prompt_tokens)
    fields['uncond'] = np.broadcast_to(row, fields['prompt'].shape)
  facts = [
    known.get(name, {}) | {'name': name, 'prompt': head, 'reference': rest}
    for name, head, rest in heads
  ]
  if response_tokens:
    rests = [rest for _, _, rest in heads]
    fields |= _responses(tokenizer, rests, response_tokens)
  return Rows(fields, facts, batch_size, seed)


def _prompts(tokenizer, named, width: int) -> np.ndarray:
  """BOS and each of [(name, text)], left-padded: int32 [rows, width]."""
  out = np.full((len(named), width), tokenizer.pad, np.int32)
  encoded = tokenizer.encode_batch([text for _, text in named])
  for row, (name, _), ids in zip(out, named, encoded):
    if len(ids) >= width:
      raise UserError(
        f'{name}: a prompt of {len(ids) + 1} tokens is longer than '
        f'the context for prompts, {width} (source.prompt_tokens)'
      )
    ids = [tokenizer.bos, *ids]
    row[-len(ids) :] = ids
  return out


def _responses(tokenizer, texts, length: int) -> dict[str, np.ndarray]:
  """One response to each prompt: response and mask, [rows, 1, length]."""
  shape = (len(texts), 1, length)
  out = np.full(shape, tokenizer.pad, np.int32)
  mask = np.zeros(shape, bool)
  for i, ids in enumerate(tokenizer.encode_batch(texts)):
    ids = ids[:length]
    out[i, 0, : len(ids)] = ids
    mask[i, 0, : len(ids)] = True
  return {'response': out, 'mask': mask}


def _heads(tokenizer, pieces, budget: int) -> list[tuple[str, str, str]]:
  """(name, head, rest): heads that fit `budget` tokens."""
  out = []
  # Most text has more than two characters a token; what still does not fit
  # loses lines until it does.
  waiting = [(name, piece, _cut(piece, 2 * budget)) for name, piece in pieces]
  while waiting := [item for item in waiting if item[2]]:
    encoded = tokenizer.encode_batch([head for _, _, head in waiting])
    retry = []
    for (name, piece, head), ids in zip(waiting, encoded):
      if len(ids) <= budget:
        out.append((name, head, piece[len(head) :]))
      else:
        retry.append((name, piece, _cut(piece, len(head) - 1)))
    waiting = retry
  return sorted(out)


def _cut(text: str, limit: int) -> str:
  """The whole lines within `limit` characters, always leaving a rest.

  Words, where the text is a single line.
  """
  limit = min(limit, len(text) - 1)
  end = '\n' if '\n' in text.rstrip('\n') else ' '
  at = text.rfind(end, 0, limit)
  return text[: at + 1] if end == '\n' else text[: max(at, 0)]


def _pieces(
  path, field, pattern, max_bytes, length, part, held_out, rest=False
):
  """[(name, text)] of one part of the documents."""
  if part not in PARTS:
    raise UserError(
      f'source.part: found {part!r}, expected one of {list(PARTS)}'
    )
  found = texts.documents(
    path, field=field, pattern=pattern, max_bytes=max_bytes
  )
  out = []
  for document in found:
    for i, piece in enumerate(
      texts.split(document, int(2.6 * length), rest=rest)
    ):
      # A lone document is divided by piece, many are by document, so that
      # neighbouring pieces do not leak into the held-out part.
      unit = document.name if len(found) > 1 else f'{document.name}#{i}'
      if part == 'all' or texts.held_out(unit, held_out) == (
        part == 'held_out'
      ):
        out.append((f'{document.name}#{i}', piece))
  if not out:
    raise UserError(
      f'{path or "stdlib"}: nothing falls into the {part} part '
      f'(source.held_out = {held_out})'
    )
  return out


def _rows(fields, batch_size: int, seed: int) -> Rows:
  facts: list[dict[str, Any]] = [{} for _ in fields['tokens']]
  return Rows(fields, facts, batch_size, seed)


def _json_rows(path: str) -> Iterator[dict[str, Any]]:
  if not path or not Path(path).is_file():
    raise UserError(f'source.path: no such file: {path!r}')
  lines = Path(path).read_bytes().splitlines()
  if not any(line.strip() for line in lines):
    raise UserError(f'{path}: empty, expected one JSON object a line')
  for number, line in enumerate(lines, start=1):
    try:
      row = json.loads(line)
    except ValueError as error:  # of JSON or of UTF-8
      raise UserError(f'{path}, row {number}: not JSON ({error})') from None
    if not isinstance(row, dict):
      raise UserError(f'{path}, row {number}: expected an object')
    yield row
