"""Rewrites an opened model in another format, one leaf at a time.

`plan` decides and refuses, before anything is written; `run` copies. Numbers
change only where the caller asks for another dtype, and rows only where one
side's tables are padded. It holds one leaf, and what the writer holds.
"""

import contextlib
import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from etils import epath

from alignjax.core.errors import UserError
from alignjax.core.journal import Put
from alignjax.core.spec import Spec
from alignjax.data.tokenizer import Tokenizer
from alignjax.interop import deepmind, hf
from alignjax.interop.open import EXTRA
from alignjax.interop.opened import Opened
from alignjax.models.config import Config, to_json
from alignjax.system import model_dir

FORMATS = ('alignjax', 'hf', 'deepmind')
# What a directory without a place for provenance says of it all the same.
_RECORDED = ('merge', 'alignjax')
DTYPES = ('keep', 'bfloat16', 'float32')
# Rows of the embedding: what Gemma 1 and 2 have in DeepMind's trees, and what
# Gemma 3 has where transformers adds image tokens, as (padded, text).
_DEEPMIND_ROWS = (256_128, 256_000)
_IMAGE_ROWS = (262_208, 262_144)

Step = Callable[[str], None]  # told 'what happened' after each leaf


class Plan(NamedTuple):
  """A checked conversion: nothing in it can be refused any more but weights.

  Attributes:
    source: what is read.
    path: what is written.
    to: its format.
    config: its decoder.
    leaves: shape and dtype of what is written, by canonical name.
    extra: tensors beyond the decoder that are copied, by foreign name.
    notes: what is not the same on both sides, one sentence each.
    provenance: JSON; what a format keeps of where the weights come from.
    overwrite: replace what is there.
    role: of the leaves, where the format has roles.
  """

  source: Opened
  path: epath.Path
  to: str
  config: Config
  leaves: dict[str, Spec]
  extra: dict[str, Spec]
  notes: tuple[str, ...]
  provenance: dict[str, Any]
  overwrite: bool
  role: str = 'policy'

  @property
  def steps(self) -> int:
    """How often `run` calls its step."""
    return len(self.leaves) + len(self.extra)

  @property
  def parameters(self) -> int:
    return sum(math.prod(x.shape) for x in self.leaves.values())

  @property
  def bytes(self) -> int:
    """Of the arrays that are written."""
    return sum(map(size, (*self.leaves.values(), *self.extra.values())))

  @property
  def peak_bytes(self) -> int:
    """Upper estimate of what the arrays of the conversion occupy at once."""
    given, written = self.source.leaves, [*self.leaves.values()]
    written += self.extra.values()
    largest = max(map(size, (*given.values(), *written)))
    # A leaf as stored and turned, or as stored and as written and padded.
    copies = 2 if all(given[k] == x for k, x in self.leaves.items()) else 3
    if self.to == 'hf':
      return copies * largest
    parts = sum(model_dir.writer_bytes(map(size, written)))
    if self.to == 'deepmind':
      # Up to three leaves wait until they are one tensor.
      layers = (x for k, x in self.leaves.items() if k != 'embedding')
      parts += 3 * max(map(size, layers))
    return copies * largest + parts


def size(spec: Spec) -> int:
  """Bytes of an array."""
  return math.prod(spec.shape) * spec.dtype.itemsize


def plan(
  source: Opened,
  path: epath.PathLike,
  *,
  to: str,
  dtype: str = 'keep',
  provenance: Mapping[str, Any] = {},  # noqa: B006
  overwrite: bool = False,
  role: str = 'policy',
) -> Plan:
  """Checks a conversion. Raises UserError if it cannot be done.

  `provenance` is added to what the source says of itself.
  """
  for what, value, known in (('--to', to, FORMATS), ('--dtype', dtype, DTYPES)):
    if value not in known:
      raise UserError(f'{what} is {value!r}, expected one of {list(known)}')
  path = epath.Path(path)
  rows, notes = _rows(source, to)
  check_tokenizer(source, rows)
  leaves = {}
  for name, spec in source.leaves.items():
    shape = spec.shape if name != 'embedding' else (rows, *spec.shape[1:])
    leaves[name] = Spec(shape, _dtype(spec.dtype, dtype))
  if dtype != 'keep' and any(
    leaves[name].dtype != spec.dtype for name, spec in source.leaves.items()
  ):
    notes.append(f'the decoder is stored as {dtype}')
  extra = dict(source.extra)
  if extra and not _same_names(source, to):
    notes.append(
      f'{len(extra)} tensors beyond the decoder (vision tower, projector) are'
      f' not written: a {to} directory names them otherwise'
    )
    extra = {}
  if to == 'hf' and not source.config.window_self:
    notes.append(
      'transformers counts W keys in a window with the query itself; this model'
      ' sees W earlier ones'
    )
  if to == 'alignjax':
    model_dir.check_free(path, overwrite)
  else:
    check = deepmind.check_free if to == 'deepmind' else hf.check_free
    check(path, overwrite)
  config = dataclasses.replace(source.config, vocab_size=rows)
  provenance = {**source.provenance, **provenance}
  return Plan(
    *(source, path, to, config, leaves, extra, tuple(notes)),
    provenance=provenance,
    overwrite=overwrite,
    role=role,
  )


def run(what: Plan, step: Step = lambda text: None) -> None:
  """Writes the destination: all of it or nothing. Raises UserError."""
  with writer(what) as put:
    for name, spec in what.leaves.items():
      put(name, cast(what.source.load(name), spec))
      step(f'wrote {name}')
    for name in what.extra:
      put(name, what.source.load_extra(name))
      step(f'wrote {name}')


def cast(leaf: np.ndarray, spec: Spec) -> np.ndarray:
  """A leaf with the rows and the dtype of `spec`; new rows are 0."""
  if leaf.shape != spec.shape:
    rows = spec.shape[0]
    if rows > len(leaf):
      widths = [(0, rows - len(leaf))] + [(0, 0)] * (leaf.ndim - 1)
      leaf = np.pad(leaf, widths)
    leaf = leaf[:rows]
  return leaf.astype(spec.dtype, copy=False)


def check_tokenizer(source: Opened, rows: int) -> None:
  """Raises UserError if the tokenizer has ids that the model has not."""
  if source.tokenizer is None:
    return
  found = Tokenizer.load(os.fspath(source.tokenizer)).size
  if found > rows:
    raise UserError(
      f'{source.tokenizer} has {found} ids and the embedding of {source.path}'
      f' {rows} rows, expected no more ids than rows: not the tokenizer of this'
      ' model'
    )


def _rows(source: Opened, to: str) -> tuple[int, list[str]]:
  """Rows that the destination has, and what is to be said about that."""
  rows = source.config.vocab_size
  record = source.provenance.get('source', {})
  wanted = rows
  padded, text = _DEEPMIND_ROWS
  gemma = 'recurrent' not in source.config.pattern
  if to == 'hf' and rows == padded and gemma:
    wanted = record.get('rows', text) if record.get('format') == 'hf' else text
  if to == 'deepmind' and gemma:
    # The released trees' shapes, which DeepMind's code insists on.
    wanted = {text: padded, _IMAGE_ROWS[0]: _IMAGE_ROWS[1]}.get(rows, rows)
  if wanted == rows:
    return rows, []
  if wanted < rows:
    return wanted, [
      f'rows {wanted} to {rows - 1} of the embedding, which belong to no text'
      ' token, are left out'
    ]
  return wanted, [
    f'rows {rows} to {wanted - 1} of the embedding are padding and 0'
  ]


def _same_names(source: Opened, to: str) -> bool:
  """Whether the destination calls the tensors beyond the decoder the same."""
  record = source.provenance.get('source', {})
  origin = record.get('format', source.format)
  return to in ('alignjax', origin)


def _dtype(stored: Any, dtype: str) -> np.dtype:
  kind = np.dtype(stored)
  floating = kind.kind == 'f' or kind == ml_dtypes.bfloat16
  if dtype == 'keep' or not floating:
    return kind
  return np.dtype(ml_dtypes.bfloat16 if dtype == 'bfloat16' else np.float32)


@contextlib.contextmanager
def writer(what: Plan, task: str = '') -> Iterator[Put]:
  """put(name, array) of the destination's format.

  After an interruption the same `task` continues: names in `put.finished` are
  there.
  """
  common: dict[str, Any] = dict(
    files=what.source.files, overwrite=what.overwrite
  )
  if '://' in str(what.path):
    task = ''  # only local files can be continued
  provenance = what.provenance
  if what.to == 'alignjax':
    with model_dir.writer(
      what.path,
      config=to_json(what.config),
      provenance=provenance,
      head=what.source.head,
      task=task,
      **common,
    ) as put:
      ours = {_place(what, name): name for name in (*what.leaves, *what.extra)}
      yield Put(
        lambda name, array: put(*_place(what, name), array),
        frozenset(ours[place] for place in put.finished if place in ours),
      )
  elif what.to == 'deepmind':
    with deepmind.writer(
      what.path,
      what.config,
      provenance=provenance,
      needed_bytes=what.bytes,
      task=task,
      **common,
    ) as put:
      yield put
  else:
    source: Mapping[str, Any] = provenance.get('source', {})
    if source.get('format') != 'hf':
      source = {}
    with hf.writer(
      what.path,
      what.config,
      {**what.leaves, **what.extra},
      source=source,
      record={k: provenance[k] for k in _RECORDED if k in provenance},
      task=task,
      **common,
    ) as put:
      yield put


def _place(what: Plan, name: str) -> tuple[str, str]:
  """Role and leaf of a name, in our directories."""
  if name in what.leaves:
    return what.role, name
  # A '.' joins the parts of a name in Hugging Face's files.
  return EXTRA, name.replace('.', '/')
