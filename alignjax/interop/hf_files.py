"""Which tensors a Hugging Face directory has, and in which of its files.

One file, several with an index, or several without. Headers only; a pickle is
never opened, and an index that its files contradict is not believed.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from alignjax.core.errors import UserError
from alignjax.interop import safetensors
from alignjax.interop.safetensors import Tensor

PICKLES = ('.bin', '.pt', '.pth', '.ckpt', '.pkl', '.pickle')
_LISTED = 20


def tensors(path: epath.Path) -> dict[str, Tensor]:
  """Tensors of a directory by name, as its index or else its files have them.

  Raises UserError for a directory without safetensors files, a damaged file,
  and an index that its files contradict.
  """
  names = sorted(file.name for file in path.iterdir())
  files = [name for name in names if name.endswith('.safetensors')]
  index = path / safetensors.INDEX
  listed: dict[str, str] | None = None
  # Where both are there, transformers takes the single file.
  if safetensors.SINGLE in files:
    files = [safetensors.SINGLE]
  elif index.exists():
    listed = _weight_map(index)
    files = sorted(set(listed.values()))
  if not files:
    raise _no_weights(path, names)
  # A link of a download cache may lead nowhere.
  if absent := [name for name in files if not (path / name).exists()]:
    by = index if listed is not None else path
    raise UserError(f'{by} names files that are not there: {some(absent)}')
  found: dict[str, Tensor] = {}
  for name in files:
    header = safetensors.header(path / name)
    if twice := sorted(set(found) & set(header)):
      raise UserError(
        f'{path}: tensors in {name} and in another file: {some(twice)}'
      )
    found |= header
  if listed is not None:
    _check_index(index, listed, found)
  return found


def json_of(file: epath.Path) -> dict[str, Any]:
  """A JSON object that must be there. Raises UserError."""
  if not file.parent.is_dir():
    raise UserError(f'no directory at {file.parent}')
  if not file.exists():
    raise UserError(f'{file.parent} has no {file.name}')
  try:
    facts = json.loads(file.read_text())
  except (ValueError, RecursionError) as error:
    raise UserError(f'{file} is not JSON: {error}') from error
  if not isinstance(facts, dict):
    raise UserError(f'{file} is not a JSON object')
  return facts


def some(names: Sequence[str]) -> str:
  """A list for a sentence, cut short."""
  more = len(names) - _LISTED
  rest = f' and {more} more' if more > 0 else ''
  return ', '.join(names[:_LISTED]) + rest


def _no_weights(path: epath.Path, names: Sequence[str]) -> UserError:
  pickles = [name for name in names if name.endswith(PICKLES)]
  if pickles:
    return UserError(
      f'{path} has its weights in {some(pickles)}: pickle files may run code'
      ' and are never opened; expected *.safetensors'
    )
  return UserError(f'{path} has no *.safetensors file')


def _weight_map(index: epath.Path) -> dict[str, str]:
  listed = json_of(index).get('weight_map')
  if not isinstance(listed, dict) or not all(
    isinstance(file, str) and file.endswith('.safetensors') and '/' not in file
    for file in listed.values()
  ):
    raise UserError(
      f'{index}: weight_map is not an object of tensor -> file.safetensors'
    )
  return listed


def _check_index(
  index: epath.Path, listed: Mapping[str, str], found: Mapping[str, Tensor]
) -> None:
  wrong = [
    f'{name} (in {found[name].file.name if name in found else "no file"},'
    f' expected in {listed.get(name, "none")})'
    for name in sorted({*listed, *found})
    if name not in found or found[name].file.name != listed.get(name)
  ]
  if wrong:
    raise UserError(f'{index} contradicts its files: {some(wrong)}')
