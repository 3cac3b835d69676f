"""Text to ids and back: SentencePiece files as they are, and plain bytes.

`decode(encode(text)) == text` for every text, because nothing in a text can
become a control token: where a document spells one ('<end_of_turn>'), it is
encoded in parts. Control tokens are placed by id (data/format.py). Refuses to
normalise, to add BOS, to pad and to know about batches.
"""

import dataclasses
import functools
import hashlib
import io
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import sentencepiece
from etils import epath

from alignjax.core.errors import UserError

START_OF_TURN = '<start_of_turn>'
END_OF_TURN = '<end_of_turn>'
# Pieces that are never text, beyond those that a model file marks as control.
_SPECIAL = re.compile(
  r'<(?:pad|eos|bos|unk|mask|2mass|\[@BOS@\]|unused\d+|(?:start|end)_of_turn'
  r'|(?:start|end)_of_image|image_soft_token)>|\[multimodal\]'
)
_SPACE = '\u2581'  # how SentencePiece writes a space
_SPACE_UTF8 = _SPACE.encode()
_INDENTS = tuple(_SPACE * n for n in (4, 8, 12, 16))
# In every vocabulary, like the space: without a piece of its own a space would
# fall back to the bytes of its mark.
_ASCII = ''.join(map(chr, range(33, 127)))
_OPTIONS: dict[str, Any] = {
  'model_type': 'bpe',
  'hard_vocab_limit': False,
  'byte_fallback': True,
  'character_coverage': 0.999,
  'required_chars': _ASCII,
  'normalization_rule_name': 'identity',
  'add_dummy_prefix': False,
  'remove_extra_whitespaces': False,
  'allow_whitespace_only_pieces': True,
  'split_digits': True,
  'split_by_unicode_script': False,  # '__init__(self,' may be one piece
  'user_defined_symbols': [
    *(START_OF_TURN, END_OF_TURN),
    *('\n', '\n\n', '\n\n\n', '\t'),
    *_INDENTS,
  ],
  **{'pad_id': 0, 'eos_id': 1, 'bos_id': 2, 'unk_id': 3},
  **{'pad_piece': '<pad>', 'eos_piece': '<eos>', 'bos_piece': '<bos>'},
  'num_threads': 1,
  'minloglevel': 2,
}
_TRAIN_BYTES = 2_500_000
_CHUNK_LINES = 40
# <start_of_turn> of Gemma 1, Gemma 2 and RecurrentGemma, whose chat format has
# no system message. Gemma 3's is 105.
_GEMMA2_TURN = 106
# Bytes of a character that may be missing at the end of a text.
_UNSURE = 3


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
  """A SentencePiece model whose special ids are known.

  Attributes:
    path: the model file.
    size: number of ids.
    stop: ids that end a response, and belong to it.
    illegal: ids that are never sampled.
    system: whether the chat format of its models has a system message.
  """

  path: str
  processor: sentencepiece.SentencePieceProcessor
  size: int
  pad: int
  eos: int
  bos: int
  unk: int
  start_of_turn: int
  end_of_turn: int
  special: frozenset[int]

  @classmethod
  def load(cls, path: epath.PathLike) -> 'Tokenizer':
    """Read a model file; raises UserError if it is missing or unusable."""
    file = epath.Path(path)
    if not file.exists():
      raise UserError(f'{path}: no such tokenizer file')
    processor = sentencepiece.SentencePieceProcessor()
    try:
      processor.LoadFromSerializedProto(file.read_bytes())
      size = processor.GetPieceSize()
    except (RuntimeError, OSError) as error:
      raise UserError(f'{path}: not a SentencePiece model') from error
    probe = 'a\x01  \n'
    first = processor.Encode(probe, out_type=str)[0]
    ids = processor.Encode(probe)
    if processor.Decode(ids) != probe or first.startswith(_SPACE):
      raise UserError(
        f'{path}: adds a space in front of text or knows no bytes, expected'
        ' a model that keeps text as it is'
      )
    # Gemma marks only pad, eos and bos as control; its turn marks are
    # user-defined pieces like newlines and '<table>', which are text.
    specials = frozenset(
      i
      for i in range(size)
      if processor.IsControl(i)
      or processor.IsUnknown(i)
      or _SPECIAL.fullmatch(processor.IdToPiece(i))
    )
    ids = {
      'pad': processor.pad_id(),
      'eos': processor.eos_id(),
      'bos': processor.bos_id(),
      'unk': processor.unk_id(),
      'start_of_turn': processor.PieceToId(START_OF_TURN),
      'end_of_turn': processor.PieceToId(END_OF_TURN),
    }
    for name, i in ids.items():
      if i < 0 or (i == ids['unk'] and name != 'unk'):
        raise UserError(f'{path}: the model has no <{name}> piece')
    return cls(str(path), processor, size, special=specials, **ids)

  @property
  def stop(self) -> tuple[int, ...]:
    return self.eos, self.end_of_turn

  @property
  def illegal(self) -> tuple[int, ...]:
    return tuple(sorted(self.special - set(self.stop)))

  @property
  def system(self) -> bool:
    return self.start_of_turn != _GEMMA2_TURN

  @functools.cached_property
  def _space_bytes(self) -> list[int]:
    return [self.processor.PieceToId(f'<0x{b:02X}>') for b in _SPACE_UTF8]

  def encode(self, text: str) -> list[int]:
    """Ids of a text, without BOS. No id of it is a special one."""
    return self.encode_batch([text])[0]

  def encode_batch(
    self, texts: Sequence[str], *, threads: int = 0
  ) -> list[list[int]]:
    """Ids of many texts; threads = 0 means one for each core."""
    parts, owners = [], []
    for number, text in enumerate(texts):
      for part in _parts(text):
        parts.append(_utf8(part))
        owners.append(number)
    encoded = self.processor.Encode(parts, num_threads=threads or -1)
    ids: list[list[int]] = [[] for _ in texts]
    for owner, part, found in zip(owners, parts, encoded):
      ids[owner] += self._space_bytes if part == _SPACE_UTF8 else found
    return ids

  def decode(self, ids: Sequence[int]) -> str:
    """The text of ids; special ones are dropped, broken UTF-8 is replaced."""
    return self.processor.Decode([i for i in ids if i not in self.special])


def _utf8(text: str) -> bytes:
  try:
    return text.encode()
  except UnicodeEncodeError as error:
    raise UserError(
      f'a text is not valid Unicode (half a surrogate pair at character'
      f' {error.start})'
    ) from error


def _parts(text: str) -> list[str]:
  """Cut a text so that no part spells a special piece or hides a space mark.

  '<end_of_turn>' becomes '<' and 'end_of_turn>': the same bytes, other ids.
  """
  parts = [text]
  if '<' in text or '[' in text:
    cuts = [match.start() + 1 for match in _SPECIAL.finditer(text)]
    parts = [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)])]
  if _SPACE in text:
    parts = [p for part in parts for p in re.split(f'({_SPACE})', part)]
  return [part for part in parts if part]


@dataclasses.dataclass(frozen=True)
class ByteTokenizer:
  """UTF-8 bytes: the tokenizer that needs no file. Byte b is id 6 + b."""

  path: str = ''
  size: int = 262
  pad: int = 0
  eos: int = 1
  bos: int = 2
  unk: int = 3
  start_of_turn: int = 4
  end_of_turn: int = 5
  system: bool = True

  @property
  def stop(self) -> tuple[int, ...]:
    return self.eos, self.end_of_turn

  @property
  def illegal(self) -> tuple[int, ...]:
    return self.pad, self.bos, self.unk, self.start_of_turn

  def encode(self, text: str) -> list[int]:
    """Ids of a text, without BOS."""
    return [6 + byte for byte in _utf8(text)]

  def encode_batch(
    self, texts: Sequence[str], *, threads: int = 0
  ) -> list[list[int]]:
    """Ids of many texts."""
    del threads
    return [self.encode(text) for text in texts]

  def decode(self, ids: Sequence[int]) -> str:
    """The text of ids; special ones are dropped, broken UTF-8 is replaced."""
    return bytes(i - 6 for i in ids if i >= 6).decode('utf-8', 'replace')


def fingerprint(tokenizer: Tokenizer | ByteTokenizer) -> str:
  """The same for tokenizers that mean the same by every id, in hex.

  Pieces in order with their scores; the file may differ in other things.
  """
  if isinstance(tokenizer, ByteTokenizer):
    return 'bytes'
  of = tokenizer.processor
  pieces = '\n'.join(
    f'{of.IdToPiece(i)}\t{of.GetScore(i)}' for i in range(tokenizer.size)
  )
  return hashlib.sha256(pieces.encode()).hexdigest()


def streamed(
  decode: Callable[[Sequence[int]], str], blocks: Iterable[Sequence[int]]
) -> Iterator[str]:
  """Text of a response while it grows, whole characters only.

  `decode` is a tokenizer's, `blocks` are the ids as they come; what is yielded
  adds up to `decode` of all of them. Half a character waits for its other half.
  """
  pending: list[int] = []
  said = 0
  for ids in blocks:
    pending += ids
    text = decode(pending)
    sure = len(text)
    while sure > len(text) - _UNSURE and text[:sure].endswith('\ufffd'):
      sure -= 1
    if sure > said:
      yield text[said:sure]
      said = sure
    if sure == len(text):
      pending, said = [], 0
  if rest := decode(pending)[said:]:
    yield rest


def train(
  texts: Iterable[str],
  path: str | Path,
  *,
  vocab_size: int = 1536,
  seed: int = 0,
) -> Tokenizer:
  """Train a byte-fallback BPE model on texts and write it to `path`.

  Ids as in Gemma: pad 0, eos 1, bos 2, unk 3, then the turn marks, runs of
  newlines and of indentation, 256 bytes, merges, characters. The same texts,
  size and seed give the same file. Of more than 2.5 MB of text an even sample
  is used, and the seed says which. Too little text for `vocab_size` pieces
  gives fewer of them.

  Raises:
    UserError: no text, or a vocab_size too small for bytes and characters.
  """
  lines = _sample(texts, seed)
  if not lines:
    raise UserError('no text to train a tokenizer on')
  model = io.BytesIO()
  try:
    sentencepiece.SentencePieceTrainer.Train(
      # Line by line: newlines are pieces of their own, nothing merges across.
      sentence_iterator=iter([*lines, ' '.join(_ASCII)]),
      model_writer=model,
      vocab_size=vocab_size,
      **_OPTIONS,
    )
  except RuntimeError as error:
    need = re.search(r'required_chars\. \d+ vs (\d+)', str(error))
    raise UserError(
      f'vocab_size is {vocab_size}, expected at least {need[1]}: the bytes and'
      ' the characters of this text'
      if need
      else f'vocab_size {vocab_size} does not work for this text ({error})'
    ) from error
  target = epath.Path(path)
  target.parent.mkdir(parents=True, exist_ok=True)
  partial = target.parent / f'.{target.name}.partial'
  partial.write_bytes(model.getvalue())
  partial.replace(target)
  return Tokenizer.load(path)


def _sample(texts: Iterable[str], seed: int) -> list[str]:
  """Lines of an even sample of the texts, in order, in chunks of lines."""
  chunks, total = [], 0
  for text in texts:
    # The trainer cuts sentences at NUL and drops those beyond 4192 bytes.
    lines = re.findall(r'[^\n\0]{1,1000}', text)
    for i in range(0, len(lines), _CHUNK_LINES):
      chunks.append(lines[i : i + _CHUNK_LINES])
    total += len(text.encode('utf-8', 'replace'))
  share = min(1.0, _TRAIN_BYTES / max(total, 1))
  offset = seed * 0.618 % 1
  return [
    line
    for n, chunk in enumerate(chunks)
    if int((n + 1) * share + offset) > int(n * share + offset)
    for line in chunk
  ]
