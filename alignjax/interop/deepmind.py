"""DeepMind's Gemma and RecurrentGemma checkpoints: Orbax trees, both ways.

Reads the four layouts that are about (flat, nested, stacked, and a training
state of Kauldron) in either of Orbax's kinds of storage: names and shapes
first, weights one tensor or one slice at a time. Writes the nested layout. A
file `alignjax.json` beside the arrays keeps what a tree cannot say. Gemma 3n
and Gemma 4 trees are refused, by the tensors that they have beyond these.
"""

import contextlib
import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from etils import epath

from alignjax.core import directory
from alignjax.core.errors import UserError
from alignjax.core.journal import Journal, Put
from alignjax.core.spec import Spec
from alignjax.interop import (
  deepmind_config,
  deepmind_names,
  orbax,
)
from alignjax.interop.hf import FILES
from alignjax.interop.opened import Opened
from alignjax.models.config import Config, from_json, to_json
from alignjax.system import leaf_files, model_dir

if TYPE_CHECKING:
  import tensorstore as ts

SIDE_FILE = 'alignjax.json'
FORMAT = 1
_EMBEDDING = 'embedder/input_embedding'
_STACKED = re.compile(r'stacked_layers/attention_type_(\d+)/(.+)')
_DECODER = re.compile(r'(layer_\d+|blocks/\d+|final_norm|embedder/input_)')
_EXTRA = re.compile(r'(vision_encoder/|embedder/mm_)')


class _Tensor(NamedTuple):
  """A tensor of the nested layout; `layer` is its place in a stack."""

  stored: str
  array: 'ts.TensorStore'
  layer: int | None = None

  @property
  def shape(self) -> tuple[int, ...]:
    return self.array.shape[self.layer is not None :]

  def name(self, index: int | None) -> str:
    """Stored name with the places that are read."""
    places = [i for i in (self.layer, index) if i is not None]
    return self.stored + ''.join(f'[{i}]' for i in places)

  def read(self, path: epath.Path, index: int | None = None) -> np.ndarray:
    places = tuple(i for i in (self.layer, index) if i is not None)
    return orbax.read(path, self.stored, self.array, places)


def read(path: epath.PathLike, *, window_self: bool | None = None) -> Opened:
  """Opens a checkpoint; no weights are read.

  Args:
    path: its folder, or the folder of a step that holds it as `default`.
    window_self: overrides how the window counts (see Config).

  Raises UserError for what is not such a tree, listing every tensor that is
  missing, unexpected or of a wrong shape.
  """
  path = epath.Path(path)
  folder = orbax.find(path)
  if folder is None:
    raise UserError(f'{path} holds no Orbax checkpoint')
  layout, tensors, extra = _tensors(folder, orbax.arrays(folder))
  shapes = {name: tensor.shape for name, tensor in tensors.items()}
  side = _side(folder)
  if side is None:
    config, told = deepmind_config.infer(folder, shapes)
    stored = str(tensors[_EMBEDDING].array.dtype.numpy_dtype)
    compute = 'bfloat16' if stored == 'bfloat16' else 'float32'
    config = dataclasses.replace(config, dtype=compute)
  else:
    config, told = from_json(side['config']), SIDE_FILE
  if window_self is not None:
    config = dataclasses.replace(config, window_self=window_self)
  source = {
    'format': 'deepmind',
    'layout': layout,
    'gating_transposed': _gating_transposed(config, shapes),
    'fused': any(name.endswith('/qkv_einsum/w') for name in shapes),
  }
  pieces = deepmind_names.pieces(
    config,
    gating_transposed=source['gating_transposed'],
    fused=source['fused'],
  )
  _check(folder, config, pieces, shapes)
  files = _files(path, folder)
  kept = side['provenance'] if side else {}

  def load(name: str) -> np.ndarray:
    piece = pieces[name]
    return piece.read(tensors[_key(piece)].read(folder, piece.index))

  def dtype(tensor: _Tensor) -> np.dtype:
    return tensor.array.dtype.numpy_dtype

  return Opened(
    path=path,
    format='deepmind',
    config=config,
    leaves={
      name: Spec(piece.leaf_shape, dtype(tensors[_key(piece)]))
      for name, piece in pieces.items()
    },
    load=load,
    view=lambda name, allocate=None: load(name),
    origin={
      name: (tensors[_key(piece)].name(piece.index),)
      for name, piece in pieces.items()
    },
    tokenizer=files.get(model_dir.TOKENIZER),
    files=tuple(files.values()),
    provenance={'source': source, 'config': f'from {told}', **kept},
    extra={
      name: Spec(tensor.shape, dtype(tensor)) for name, tensor in extra.items()
    },
    load_extra=lambda name: extra[name].read(folder),
  )


def _key(piece: deepmind_names.Piece) -> str:
  return piece.tensor.replace('.', '/')


def _tensors(
  path: epath.Path, arrays: 'Mapping[str, ts.TensorStore]'
) -> tuple[str, dict[str, _Tensor], dict[str, _Tensor]]:
  """(layout, the decoder's tensors, others), by name in the nested layout."""
  prefix = _prefix(path, arrays)
  training = prefix.startswith('params/')
  wrapper = prefix.removesuffix('transformer/')
  patterns = {
    match[1] for name in arrays if (match := _stacked(name, prefix)) is not None
  }
  tensors: dict[str, _Tensor] = {}
  extra: dict[str, _Tensor] = {}
  strange = []
  for stored, array in arrays.items():
    if not stored.startswith(wrapper):
      continue  # step, optimizer, other networks
    if (match := _stacked(stored, prefix)) is not None:
      for repeat in range(array.shape[0] if array.shape else 0):
        number = repeat * len(patterns) + int(match[1])
        name = _bare(f'layer_{number}/{match[2]}')
        tensors[name] = _Tensor(stored, array, repeat)
      continue
    name = _bare(stored.removeprefix(prefix).removeprefix(wrapper))
    name = re.sub(r'^SigLiPFromPatches_0/', 'vision_encoder/', name)
    if stored.startswith(prefix) and _DECODER.match(name):
      tensors[name] = _Tensor(stored, array)
    elif _EXTRA.match(name):
      extra[name] = _Tensor(stored, array)
    else:
      strange.append(stored)
  if strange:
    raise UserError(
      f'{path}: tensors that no Gemma 1, 2, 3 or RecurrentGemma has:'
      f' {", ".join(strange)}'
    )
  layout = 'flat' if prefix.endswith('transformer/') else 'nested'
  layout = 'kauldron' if training else 'stacked' if patterns else layout
  return layout, tensors, extra


def _prefix(path: epath.Path, arrays: Mapping[str, Any]) -> str:
  """What stands in front of the decoder's names."""
  found = [
    name.removesuffix(_EMBEDDING)
    for name in arrays
    if name == _EMBEDDING or name.endswith(f'/{_EMBEDDING}')
    if not name.startswith('opt_state/')
  ]
  if len(found) == 1:
    return found[0]
  if found:
    raise UserError(
      f'{path} holds {len(found)} decoders, expected one: {", ".join(found)}'
    )
  some = ', '.join(list(arrays)[:3]) or 'none'
  raise UserError(
    f'{path} is an Orbax checkpoint without {_EMBEDDING}, so not one of a Gemma'
    f' (arrays: {some}{", ..." if len(arrays) > 3 else ""})'
  )


def _stacked(stored: str, prefix: str) -> re.Match[str] | None:
  if not stored.startswith(prefix):
    return None
  return _STACKED.fullmatch(stored.removeprefix(prefix))


def _bare(name: str) -> str:
  """Flat trees wrap the feed-forward's arrays as {'w': array}."""
  return re.sub(r'(/mlp/(?:gating_einsum|linear))/w$', r'\1', name)


def _gating_transposed(
  config: Config, shapes: Mapping[str, tuple[int, ...]]
) -> bool:
  """Read off the shape; where F == D, what the release would be."""
  D, F = config.width, config.hidden
  for name, shape in shapes.items():
    if D != F and name.endswith('/mlp/gating_einsum'):
      return shape == (2, F, D)
  return deepmind_names.transposed(config)


def _check(
  path: epath.Path,
  config: Config,
  pieces: Mapping[str, deepmind_names.Piece],
  shapes: Mapping[str, tuple[int, ...]],
) -> None:
  expected = {_key(piece): piece.shape for piece in pieces.values()}
  wrong = []
  for name in sorted(expected.keys() | shapes.keys()):
    if name not in shapes:
      wrong.append(f'{name} {list(expected[name])} is missing')
    elif name not in expected:
      wrong.append(f'{name} {list(shapes[name])} is not expected')
    elif shapes[name] != expected[name]:
      wrong.append(
        f'{name} is {list(shapes[name])}, expected {list(expected[name])}'
      )
  if wrong:
    raise UserError(
      f'{path} does not hold a whole decoder of {config.layers} layers of width'
      f' {config.width}: {"; ".join(wrong)}'
    )


def _side(folder: epath.Path) -> dict[str, Any] | None:
  file = folder / SIDE_FILE
  if not file.exists():
    return None
  try:
    facts = json.loads(file.read_text())
    if facts['format'] != FORMAT:
      raise ValueError(f'format {facts["format"]!r}, expected {FORMAT}')
    for field in ('config', 'provenance'):
      if not isinstance(facts[field], dict):
        raise ValueError(f'{field} must be an object')
  except (ValueError, KeyError, TypeError) as error:
    raise UserError(f'{file} is not sound: {error}') from error
  return facts


def _files(path: epath.Path, folder: epath.Path) -> dict[str, epath.Path]:
  """Files that travel; a released tokenizer lies beside the folder."""
  places = [path.parent / model_dir.TOKENIZER]
  for place in (path, folder):
    places += [place / name for name in FILES]
  return dict(sorted((p.name, p) for p in places if p.exists()))


@contextlib.contextmanager
def writer(
  path: epath.PathLike,
  config: Config,
  *,
  provenance: Mapping[str, Any] = {},  # noqa: B006
  files: Sequence[epath.PathLike] = (),
  needed_bytes: int = 0,
  overwrite: bool = False,
  task: str = '',
) -> Iterator[Put]:
  """Writes a checkpoint leaf by leaf, nested: yields put(name, array).

  A name is canonical, or a nested name of an `Opened.extra`. Holds at most
  model_dir.PART_BYTES, the tensors that wait for their other parts, and one
  leaf. The directory appears when the block ends; after an error there is
  none, and an old one is untouched. After an interruption the same `task`
  continues: leaves of tensors that are whole are in `put.finished`.
  """
  path = epath.Path(path)
  check_free(path, overwrite)
  source = provenance.get('source', {})
  kept = source if source.get('format') == 'deepmind' else {}
  pieces = deepmind_names.pieces(
    config,
    gating_transposed=kept.get(
      'gating_transposed', deepmind_names.transposed(config)
    ),
    fused=kept.get('fused', config.heads == config.kv_heads),
  )
  with directory.replaced(path, needed_bytes, task) as partial:
    assembly = _Assembly(partial, pieces, Journal(partial) if task else None)
    yield Put(assembly.put, assembly.finished)
    assembly.finish()
    for file in map(epath.Path, files):
      file.copy(partial / file.name)
    facts = {
      'format': FORMAT,
      'config': to_json(config),
      'provenance': dict(provenance),
    }
    (partial / SIDE_FILE).write_text(json.dumps(facts, indent=2) + '\n')


class _Assembly:
  """Canonical leaves on their way into whole tensors on disk.

  Attributes:
    finished: leaves of the tensors that an earlier process has written.
  """

  def __init__(
    self,
    folder: epath.Path,
    pieces: Mapping[str, deepmind_names.Piece],
    journal: Journal | None,
  ):
    self._folder = folder
    self._journal = journal
    self._begun: dict[str, np.ndarray] = {}
    self._whole: dict[str, np.ndarray] = {}
    self._waiting = dict(pieces)
    self.finished: frozenset[str] = frozenset()
    if journal is not None:
      journal.confirm(lambda tensor: leaf_files.checksum(folder, tensor))
      leaf_files.keep(folder, journal.found)
      written = {k for k, p in pieces.items() if p.tensor in journal.found}
      extra = filter(_EXTRA.match, journal.found)
      self.finished = frozenset({*written, *extra})
      self._waiting = {k: p for k, p in pieces.items() if k not in written}

  def put(self, name: str, array: Any) -> None:
    array = np.asarray(array)
    piece = self._waiting.pop(name, None)
    if piece is None:
      if not _EXTRA.match(name):
        raise ValueError(f'{name!r} is no leaf of this decoder, or came twice')
      self._add(name, array)
    elif array.shape != piece.leaf_shape:
      raise UserError(
        f'{self._folder}: leaf {name} is {list(array.shape)}, expected'
        f' {list(piece.leaf_shape)}'
      )
    elif piece.index is None:
      self._add(piece.tensor, piece.write(array))
    else:
      whole = self._begun.get(piece.tensor)
      if whole is None:
        whole = self._begun[piece.tensor] = np.empty(piece.shape, array.dtype)
      if whole.dtype != array.dtype:
        raise UserError(
          f'{self._folder}: {name} is {array.dtype} and other parts of'
          f' {piece.tensor} are {whole.dtype}'
        )
      whole[piece.index] = piece.write(array)
      if all(piece.tensor != other.tensor for other in self._waiting.values()):
        self._add(piece.tensor, self._begun.pop(piece.tensor))

  def finish(self) -> None:
    if self._waiting:
      raise ValueError(f'leaves that never came: {sorted(self._waiting)}')
    self._flush()
    if self._journal is not None:
      self._journal.remove()

  def _add(self, tensor: str, array: np.ndarray) -> None:
    self._whole[tensor] = array
    held = sum(x.nbytes for x in self._whole.values())
    if held >= model_dir.PART_BYTES:
      self._flush()

  def _flush(self) -> None:
    if self._whole:
      leaf_files.save(self._folder, self._whole, model_dir.PART_BYTES)
      if self._journal is not None:
        for tensor, array in self._whole.items():
          self._journal.add(tensor, leaf_files.crc32(array))
    self._whole.clear()


def check_free(path: epath.PathLike, overwrite: bool = False) -> None:
  """Raises UserError if `path` must not be written to."""
  directory.check_free(epath.Path(path), SIDE_FILE, overwrite)
