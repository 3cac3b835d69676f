"""What a merge reads: models of any format, as matrices of one orientation.

Opens and compares them; reads no weights before `matrix` is asked for. Not the
place for how they are merged.
"""

import dataclasses
import functools
import math
import mmap
import os
import re
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from alignjax.core import files
from alignjax.core.errors import UserError
from alignjax.interop import hf_names
from alignjax.interop.open import absolute
from alignjax.interop.open import open as open_model
from alignjax.interop.opened import Opened
from alignjax.merge import blocks, made
from alignjax.system import leaf_files, model_dir

HELD_BYTES = 64 * 2**20  # a larger leaf lies in a file while it is used
# What may differ between models that are merged: how a model is run, how many
# rows its table has (which is checked apart) and what it began from.
_FREE = (
  'vocab_size dtype init init_std remat unroll attention recurrence'.split()
)
# Linear maps by name and the number of their input axes; see hf_names.
_INPUT_AXES = (
  (r'(.*/)?attn/o', 2),
  (r'(.*/)?(attn/[qkv]|ffw/(gate|up|down)|recurrent/(x|y|out))', 1),
)


def opened(
  paths: Sequence[Any], role: str, *, pad: bool = False
) -> list[Opened]:
  """The models, once they can be merged. Raises UserError, listing all.

  Paths of directories, or models that are opened already.

  With `pad`, tables may differ in rows: what the base has not is cut off, what
  a model lacks is the base's.
  """
  models = [_opened(path, role) for path in paths]
  first, *others = models
  for other in others:
    _check_configs(first, other)
  check_same(
    str(first.path),
    first.leaves,
    {str(other.path): other.leaves for other in others},
    pad=pad,
  )
  _check_tokenizers(models)
  return models


def fitting(
  paths: Sequence[Any], role: str, *, dtype: str, pad: bool = False
) -> list[Opened]:
  """`opened`, once their dtypes are alike or `dtype` is not 'keep'."""
  models = opened(paths, role, pad=pad)
  wrong = mixed_dtypes(models)
  if wrong and dtype == 'keep':
    more = f' and {len(wrong) - 5} more' if len(wrong) > 5 else ''
    raise UserError(
      f'merge of models of different dtypes: {"; ".join(wrong[:5])}{more};'
      ' say with --dtype which the result has'
    )
  return models


def check_same(
  first: str,
  base: Mapping[str, Any],
  models: Mapping[str, Mapping[str, Any]],
  *,
  pad: bool = False,
) -> None:
  """Raises one UserError with every leaf whose name or shape differs.

  `base` and `models` map leaf names to anything with a shape; the keys of
  `models` and `first` name them in the message. `pad`: see `opened`.
  """
  wrong = []
  for where, leaves in models.items():
    for name in sorted(base.keys() | leaves.keys()):
      if name not in leaves:
        wrong.append(f'{name} is missing in {where}')
      elif name not in base:
        wrong.append(f'{name} of {where} is missing in {first}')
      elif not _fit(name, base[name].shape, leaves[name].shape, pad):
        wrong.append(
          f'{name} is {list(base[name].shape)} in {first} and'
          f' {list(leaves[name].shape)} in {where}'
        )
  if wrong:
    rows = not pad and any(line.startswith('embedding is') for line in wrong)
    raise UserError(
      f'merge of models with different shapes: {"; ".join(wrong)}'
      f'{" (--pad merges tables of different rows)" if rows else ""}'
    )


def _fit(
  name: str, one: Sequence[int], other: Sequence[int], pad: bool
) -> bool:
  if pad and name == 'embedding':
    return one[1:] == other[1:]
  return one == other


def mixed_dtypes(models: Sequence[Opened]) -> list[str]:
  """Leaves that are not stored alike by all models, a sentence each."""
  first, *others = models
  return [
    f'{name} is {spec.dtype} in {first.path} and'
    f' {other.leaves[name].dtype} in {other.path}'
    for name, spec in first.leaves.items()
    for other in others
    if other.leaves[name].dtype != spec.dtype
  ]


def outputs_first(name: str, x: Any) -> Any:
  """A leaf as [outputs, inputs] if it is a linear map, else as it is.

  A view where the strides allow it: for Hugging Face's files, theirs.
  """
  for pattern, axes in _INPUT_AXES:
    if re.fullmatch(pattern, name):
      inputs = math.prod(x.shape[:axes])
      return x.reshape(inputs, -1).T
  if name.endswith('recurrent/conv'):
    return hf_names.CONV.store(x)
  return x


def stored_again(name: str, matrix: Any, shape: Sequence[int]) -> Any:
  """`outputs_first` inverted, from a matrix to the leaf's shape."""
  for pattern, _ in _INPUT_AXES:
    if re.fullmatch(pattern, name):
      return matrix.T.reshape(shape)
  if name.endswith('recurrent/conv'):
    return matrix.T.reshape(shape)
  return matrix.reshape(shape)


def as_matrix(name: str, x: Any, turned: bool) -> Any:
  """[rows, columns] of a leaf; with `turned`, outputs first."""
  x = outputs_first(name, x) if turned else x
  return x.reshape(blocks.matrix(x.shape))


def matrices(
  models: Sequence[Opened], name: str, turned: bool, scratch: epath.PathLike
) -> list[np.ndarray]:
  """The leaf of every model, in its stored dtype; large ones in a file."""
  allocate = functools.partial(empty, scratch=scratch)
  return [
    as_matrix(name, spooled(model.view(name, allocate), scratch), turned)
    for model in models
  ]


def reader(x: np.ndarray) -> Callable[[int, int], np.ndarray]:
  """(start, stop) -> those rows of a matrix, to be read and not written to.

  Rows that lie together in a file are read from it: the pages of a window are
  each entered in a table when they are first touched, which takes longer.
  """
  whole: np.ndarray = x
  while isinstance(whole.base, np.ndarray):
    whole = whole.base
  name = getattr(whole, 'filename', None)  # of what np.memmap made
  if name is None or not x.flags.c_contiguous or not len(x):
    return lambda start, stop: x[start:stop]
  assert isinstance(whole, np.memmap)
  file = os.open(name, os.O_RDONLY)
  first = whole.offset + x.ctypes.data - whole.ctypes.data
  row = x[0].nbytes

  def read(start: int, stop: int) -> np.ndarray:
    out = np.empty((stop - start, *x.shape[1:]), x.dtype)
    left, at = out.reshape(-1).view(np.uint8).data, first + start * row
    while left:
      done = os.preadv(file, [left], at)
      if not done:
        raise UserError(f'{name} has become shorter')
      left, at = left[done:], at + done
    return out

  weakref.finalize(read, os.close, file)
  return read


def spooled(x: np.ndarray, scratch: epath.PathLike) -> np.ndarray:
  """`x`, if it takes no memory or little, or else a copy in a file.

  The file has no name: nothing is left of it, however the process ends.
  """
  if x.nbytes <= HELD_BYTES or on_file(x):
    return x
  out = empty(x.shape, x.dtype, scratch)
  np.copyto(out, x)
  return out


def empty(
  shape: Sequence[int], dtype: Any, scratch: epath.PathLike
) -> np.ndarray:
  """An array to be filled; a large one takes disk, not memory."""
  if not large(shape, dtype):
    return np.empty(shape, dtype)
  with tempfile.TemporaryFile(dir=scratch or None) as file:
    return files.window(file.fileno(), 0, shape, dtype)


def large(shape: Sequence[int], dtype: Any) -> bool:
  """Whether an array is too large to be held in memory."""
  return math.prod(shape) * np.dtype(dtype).itemsize > HELD_BYTES


def on_file(x: np.ndarray) -> bool:
  """Whether an array is a window on a file."""
  owner: Any = x
  while owner is not None:
    if isinstance(owner, np.memmap | mmap.mmap):
      return True
    # An array on a buffer holds a memoryview of it.
    owner = getattr(owner, 'obj', getattr(owner, 'base', None))
  return False


def digest(model: Opened, role: str, foreign: bool = False) -> str | None:
  """One name for a model's weights, the same in every format.

  Ours have it written down, that of a merge follows from its sources'. For
  others, if `foreign`, every leaf is read; otherwise None.
  """
  if model.merge is not None:
    return made.digest(record(model.merge, foreign))
  if model.format == 'alignjax':
    return model_dir.digest(model_dir.read(model.path), role)
  if not foreign:
    return None
  allocate = functools.partial(empty, scratch='')
  return model_dir.digest_of(
    {
      name: leaf_files.crc32(model.view(name, allocate))
      for name in model.leaves
    }
  )


def record(what: made.Merge, foreign: bool = False) -> dict[str, Any]:
  """`made.record` with the digests that there are; see `digest`."""
  return made.record(what, lambda m: digest(m, what.role, foreign))


def check_bases(
  base: Opened, models: Sequence[Opened], expected: str | None
) -> None:
  """Models that say what they were trained from must say: from this base.

  `expected` is the digest of the base. A base that was written by a merge is
  also what began as that merge, made where it was used.
  """
  if expected is None:
    return
  said = base.provenance.get('merge')
  same = {expected, made.digest(said) if isinstance(said, dict) else None}
  for model in models:
    init: Mapping[str, Any] | None = model.provenance.get('init')
    found = init.get('checksum') if isinstance(init, dict) else None
    if found is not None and found not in same:
      raise UserError(
        f'merge of models with different bases: {model.path} was trained from'
        f' weights with digest {str(found)[:12]}, the base {base.path} has'
        f' {expected[:12]} (--allow-different-bases merges them all the same)'
      )


def _opened(path: Any, role: str) -> Opened:
  if isinstance(path, Opened):
    return path
  where = absolute(path)
  ours = (where / 'model.json').exists()
  if ours and model_dir.read(where).view == 'conditioned':
    raise UserError(
      f'merge of a conditioned model: {path}; write a plain one first, '
      'aj.save(aj.load(PATH, weights=...), OUT)'
    )
  return open_model(path, role=role, head=None)


def _check_configs(first: Opened, other: Opened) -> None:
  if first.head != other.head:
    raise UserError(
      f'merge of different kinds of models: head is {first.head!r} in'
      f' {first.path} and {other.head!r} in {other.path}'
    )
  ours, theirs = (dataclasses.asdict(m.config) for m in (first, other))
  wrong = [
    f'{field} is {ours[field]!r} in {first.path} and {theirs[field]!r} in'
    f' {other.path}'
    for field in ours
    if field not in _FREE and ours[field] != theirs[field]
  ]
  if wrong:
    raise UserError(
      f'merge of models of different architectures: {"; ".join(wrong)}'
    )


def _check_tokenizers(models: Sequence[Opened]) -> None:
  """Those that have one must have the same."""
  known = [model for model in models if model.tokenizer is not None]
  for model in known[1:]:
    first = known[0]
    assert first.tokenizer is not None and model.tokenizer is not None
    if first.tokenizer.read_bytes() != model.tokenizer.read_bytes():
      raise UserError(
        'merge of models with different tokenizers:'
        f' {model_dir.TOKENIZER} of {first.path} and of {model.path} are not'
        ' the same bytes'
      )
