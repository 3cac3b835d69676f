"""Pools of segments: two pieces of each of several documents.

What a contrastive encoder learns from: pieces of one document belong together,
and a row holds enough documents for each of its own to be told from. Refuses to
know what is done with them.
"""

import numpy as np

from alignjax.core.errors import UserError
from alignjax.data import sources
from alignjax.data import text as texts

SHORTEST = 4  # tokens of a segment


def segments(
  tokenizer,
  batch_size: int,
  seed: int,
  *,
  path: str = '',
  field: str = 'text',
  pattern: str = '*.py',
  max_bytes: int = 6_000_000,
  length: int = 48,
  documents: int = 8,
  passes: int = 8,
  part: str = 'train',
  held_out: float = 0.05,
) -> sources.Rows:
  """Rows of 2 * `documents` segments: 2k and 2k + 1 are of one document.

  Fields response and mask [rows, 2 * documents, length]. The segments of a
  document do not overlap and are of half of it where it is shorter than two
  lengths. Documents are grouped and cut anew in each of `passes`, by `seed`. A
  lone text is taken for the documents that its top-level blocks make.
  """
  if documents < 2 or length < SHORTEST or passes < 1:
    raise UserError(
      f'source.documents = {documents}, source.length = {length}, '
      f'source.passes = {passes}: expected 2, {SHORTEST} and 1 or more'
    )
  encoded = _encoded(
    tokenizer, path, field, pattern, max_bytes, 8 * length, part, held_out
  )
  if len(encoded) < documents:
    raise UserError(
      f'{path or "stdlib"}: {len(encoded)} documents of {2 * SHORTEST} tokens '
      f'or more in the {part} part, expected source.documents = {documents} or '
      'more'
    )
  rng = np.random.default_rng(seed)
  rows = len(encoded) // documents
  tokens = np.full(
    (passes * rows, 2 * documents, length), tokenizer.pad, np.int32
  )
  mask = np.zeros(tokens.shape, bool)
  for i in range(passes):
    order = rng.permutation(len(encoded))[: rows * documents]
    for n, document in enumerate(order):
      row, place = i * rows + n // documents, 2 * (n % documents)
      for k, ids in enumerate(_pair(encoded[document], length, rng)):
        tokens[row, place + k, : len(ids)] = ids
        mask[row, place + k, : len(ids)] = True
  fields = {'response': tokens, 'mask': mask}
  return sources.Rows(fields, [{}] * len(tokens), batch_size, seed)


def _pair(ids, length: int, rng) -> tuple[list[int], list[int]]:
  """Two segments that do not overlap, in any order."""
  length = min(length, len(ids) // 2)
  room = len(ids) - 2 * length
  first = int(rng.integers(room + 1))
  second = int(rng.integers(first, room + 1)) + length
  parts = ids[first : first + length], ids[second : second + length]
  return parts if rng.integers(2) else parts[::-1]


def _encoded(
  tokenizer, path, field, pattern, max_bytes, stretch, part, held_out
):
  """Token ids of the documents of one part that are long enough."""
  if part not in sources.PARTS:
    raise UserError(
      f'source.part: found {part!r}, expected one of {list(sources.PARTS)}'
    )
  found = texts.documents(
    path, field=field, pattern=pattern, max_bytes=max_bytes
  )
  if len(found) == 1:
    pieces = texts.split(found[0], int(2.6 * stretch), rest=True)
    found = [
      texts.Document(f'{found[0].name}#{i}', piece)
      for i, piece in enumerate(pieces)
    ]
  chosen = [
    document.text
    for document in found
    if part == 'all'
    or texts.held_out(document.name, held_out) == (part == 'held_out')
  ]
  encoded = tokenizer.encode_batch(chosen)
  return [ids for ids in encoded if len(ids) >= 2 * SHORTEST]
