"""Model directories: what merge, sample, evaluate and inspect read and write.

`model.json` (decoder config, roles, view, head, provenance, a checksum per
leaf), `params/<role>/` in the canonical tree, and `tokenizer.model` if there is
one. The params are a plain Orbax checkpoint, one zarr array per leaf, so that
a leaf can be read alone and a model larger than memory can be written part by
part. Not a training checkpoint: no optimizer, no step, no stacked layers.
"""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from etils import epath

from alignjax.core import directory, naming
from alignjax.core.errors import UserError
from alignjax.core.journal import Journal, Put
from alignjax.core.spec import Spec
from alignjax.system import leaf_files

if TYPE_CHECKING:
  import tensorstore as ts

FORMAT = 1
TOKENIZER = 'tokenizer.model'
PART_BYTES = 128 * 2**20  # a writer holds this much before it writes

_FIELDS = {
  'config': dict,
  'roles': list,
  'view': str,
  'head': str,
  'provenance': dict,
  'checksums': dict,
}


class ModelDir(NamedTuple):
  """What `model.json` says; no weights.

  Attributes:
    path: absolute.
    config: the decoder config as plain JSON.
    roles: names under `params/`.
    view: plain, conditioned or lora.
    head: tied, untied, scalar(k) or embedding(k).
    provenance: where the weights come from, as JSON.
    checksums: role -> leaf name -> crc32 of its bytes, in hex.
    tokenizer: the tokenizer file, or None.
    files: every file that travels along (tokenizer, chat template, generation
      settings), the tokenizer file included.
  """

  path: epath.Path
  config: dict[str, Any]
  roles: tuple[str, ...]
  view: str
  head: str
  provenance: dict[str, Any]
  checksums: dict[str, dict[str, str]]
  tokenizer: epath.Path | None
  files: tuple[epath.Path, ...]


def read(path: epath.PathLike) -> ModelDir:
  """Reads and checks `model.json`. Raises UserError if it is not sound."""
  path = _absolute(path)
  file = path / 'model.json'
  if not path.exists():
    raise UserError(f'no model directory at {path}')
  if not file.exists():
    raise UserError(f'{path} is not a model directory: it has no model.json')
  try:
    facts = json.loads(file.read_text())
  except ValueError as error:
    raise UserError(f'{file} is not JSON: {error}') from error
  if not isinstance(facts, dict):
    raise UserError(f'{file} is not a JSON object')
  if facts.get('format') != FORMAT:
    raise UserError(
      f'{file} has format {facts.get("format")!r}, expected {FORMAT}'
    )
  for field, kind in _FIELDS.items():
    if not isinstance(facts.get(field), kind):
      raise UserError(f'{file}: field {field!r} is missing or of a wrong type')
  for role in facts['roles']:
    if not isinstance(facts['checksums'].get(role), dict):
      raise UserError(f'{file}: no checksums of the role {role!r}')
    if not (path / 'params' / role).exists():
      raise UserError(f'{path} lacks params/{role}, which model.json names')
  tokenizer = path / TOKENIZER
  return ModelDir(
    path=path,
    config=facts['config'],
    roles=tuple(facts['roles']),
    view=facts['view'],
    head=facts['head'],
    provenance=facts['provenance'],
    checksums=facts['checksums'],
    tokenizer=tokenizer if tokenizer.exists() else None,
    files=tuple(
      sorted(
        file
        for file in path.iterdir()
        if file.is_file() and file.name != 'model.json'
      )
    ),
  )


def leaves(model: ModelDir, role: str = 'policy') -> dict[str, Spec]:
  """Shapes and dtypes by leaf name, sorted; no weights are read."""
  out = {}
  for name in sorted(_known(model, role)):
    array = _open(model, role, name)
    out[name] = Spec(array.shape, array.dtype.numpy_dtype)
  return out


def load_leaf(
  model: ModelDir,
  role: str,
  name: str,
  allocate: leaf_files.Allocate = np.empty,
) -> np.ndarray:
  """One leaf, checksum verified. Raises UserError if it is damaged.

  `allocate(shape, dtype)` gives the array of a leaf that is read in chunks.
  """
  expected = _known(model, role)[name]
  try:
    array = leaf_files.read(_open(model, role, name), allocate)
  except (ValueError, OSError) as error:
    raise _damaged(model, role, name, _first_line(error)) from error
  found = leaf_files.crc32(array)
  if found != expected:
    raise _damaged(
      model, role, name, f'its checksum is {found}, expected {expected}'
    )
  return array


def load(model: ModelDir, role: str = 'policy') -> dict[str, Any]:
  """The nested dict of one role's leaves, checksums verified."""
  names = sorted(_known(model, role))
  return naming.nested({name: load_leaf(model, role, name) for name in names})


def checksums(params: Any) -> dict[str, str]:
  """What `model.json` records for a tree: crc32 in hex by leaf name."""
  return {
    name: leaf_files.crc32(np.asarray(leaf)) for name, leaf in _named(params)
  }


def digest(model: ModelDir, role: str = 'policy') -> str:
  """One name for a role's weights: sha256 over its sorted checksums."""
  return digest_of(_known(model, role))


def digest_of(sums: Mapping[str, str]) -> str:
  """`digest` of `checksums(params)`, for weights that are in memory."""
  text = '\n'.join(f'{name} {crc}' for name, crc in sorted(sums.items()))
  return hashlib.sha256(text.encode()).hexdigest()


def check_free(path: epath.PathLike, overwrite: bool = False) -> None:
  """Raises UserError if `path` must not be written to."""
  directory.check_free(_absolute(path), 'model.json', overwrite)


def write(
  path: epath.PathLike,
  *,
  config: Mapping[str, Any],
  params: Mapping[str, Any],
  provenance: Mapping[str, Any],
  tokenizer: epath.PathLike | None = None,
  files: Sequence[epath.PathLike] = (),
  view: str = 'plain',
  head: str = 'tied',
  overwrite: bool = False,
) -> ModelDir:
  """Writes a model directory: all of it or nothing.

  Args:
    path: must not exist, unless it is a model directory and `overwrite`.
    config: the decoder config as plain JSON.
    params: role -> canonical tree, or an iterable of (leaf name, array).
    provenance: JSON. A training run records its start here, as
      {'init': {'checksum': digest of the init's params}}: merge then refuses
      models of different bases.
    tokenizer: a file to copy as tokenizer.model, or None.
    files: others to copy under their own names.
    view: see ModelDir.
    head: see ModelDir.
    overwrite: replace an existing model directory.
  """
  with writer(
    path,
    config=config,
    provenance=provenance,
    tokenizer=tokenizer,
    files=files,
    view=view,
    head=head,
    overwrite=overwrite,
  ) as put:
    for role, weights in params.items():
      pairs: Iterable[tuple[str, Any]] = (
        _named(weights) if isinstance(weights, Mapping) else weights
      )
      for name, leaf in pairs:
        put(role, name, leaf)
  return read(path)


@contextlib.contextmanager
def writer(
  path: epath.PathLike,
  *,
  config: Mapping[str, Any],
  provenance: Mapping[str, Any],
  tokenizer: epath.PathLike | None = None,
  files: Sequence[epath.PathLike] = (),
  view: str = 'plain',
  head: str = 'tied',
  overwrite: bool = False,
  task: str = '',
) -> Iterator[Put]:
  """`write` leaf by leaf: yields put(role, leaf name, array).

  Holds at most PART_BYTES and one leaf, which is written from where it is if
  it exceeds PART_BYTES. The directory appears when the block ends; after an
  error there is none, and an old one is untouched. After an interruption the
  same `task` continues: (role, leaf name) of `put.finished` are there.
  """
  path = _absolute(path)
  check_free(path, overwrite)
  copies = {epath.Path(file).name: epath.Path(file) for file in files}
  if tokenizer is not None:
    copies[TOKENIZER] = epath.Path(tokenizer)
  for file in copies.values():
    if not file.exists():
      raise UserError(f'no tokenizer file at {file}')
  sums: dict[str, dict[str, str]] = {}
  part: dict[str, dict[str, np.ndarray]] = {}
  journal: Journal | None = None

  def put(role: str, name: str, leaf: Any):
    array = np.asarray(leaf)
    _check_leaf(path, name, array)
    if name in sums.setdefault(role, {}):
      raise ValueError(f'leaf {name!r} of the role {role!r} was put twice')
    sums[role][name] = leaf_files.crc32(array)
    part.setdefault(role, {})[name] = array
    if sum(x.nbytes for of in part.values() for x in of.values()) >= PART_BYTES:
      _flush(partial, part, sums, journal)

  with directory.replaced(path, task=task) as partial:
    (partial / 'params').mkdir(exist_ok=True)
    if task:
      journal = Journal(partial)
      _continue(partial, journal, sums)
    finished = ((role, name) for role, of in sums.items() for name in of)
    yield Put(put, frozenset(finished))
    _flush(partial, part, sums, journal)
    if journal is not None:
      journal.remove()
    for name, file in copies.items():
      file.copy(partial / name)
    facts = {
      'format': FORMAT,
      'config': dict(config),
      'roles': list(sums),
      'view': view,
      'head': head,
      'provenance': dict(provenance),
      'checksums': {r: dict(sorted(of.items())) for r, of in sums.items()},
    }
    (partial / 'model.json').write_text(json.dumps(facts, indent=2) + '\n')


def writer_bytes(leaf_bytes: Iterable[int]) -> tuple[int, int]:
  """Upper estimate of a writer's memory for leaves of these sizes.

  Returns (what it holds between two leaves, what it takes beyond that while it
  writes); the leaf that is put comes on top, if it exceeds PART_BYTES.
  """
  sizes = list(leaf_bytes)
  small = [size for size in sizes if size <= PART_BYTES]
  held = min(sum(small), PART_BYTES + max(small, default=0))
  # Orbax's copy of what is held, and its encoding.
  passing = leaf_files.PASSING_BYTES if len(small) < len(sizes) else 0
  return held, max(2 * held, passing)


def _named(params: Any) -> Iterable[tuple[str, Any]]:
  # Here, as it imports JAX, which a reader can do without.
  from alignjax.core import tree

  return tree.named(params).items()


def _absolute(path: epath.PathLike) -> epath.Path:
  text = os.fspath(path)
  return epath.Path(text if '://' in text else os.path.abspath(text))


def _known(model: ModelDir, role: str) -> dict[str, str]:
  if role not in model.roles:
    raise UserError(
      f'{model.path} has no role {role!r} (roles: {", ".join(model.roles)})'
    )
  return model.checksums[role]


def _open(model: ModelDir, role: str, name: str) -> 'ts.TensorStore':
  file = leaf_files.place(model.path / 'params' / role, name)
  try:
    return leaf_files.open_array(file)
  except (ValueError, OSError) as error:
    raise _damaged(model, role, name, _first_line(error)) from error


def _damaged(model: ModelDir, role: str, name: str, why: str) -> UserError:
  return UserError(
    f'{model.path / "params" / role}: leaf {name!r} is corrupt or truncated:'
    f' {why}'
  )


def _first_line(error: Exception) -> str:
  return re.sub(r' \[[a-z_]+=.*', '', str(error).splitlines()[0])


def _check_leaf(path: epath.Path, name: str, array: np.ndarray) -> None:
  # On disk '.' joins the parts of a name.
  if not re.fullmatch(r'[^./]+(/[^./]+)*', name):
    raise UserError(f'{path}: a leaf cannot be named {name!r}')
  if array.size == 0:
    raise UserError(f'{path}: leaf {name!r} is empty: {array.shape}')


def _flush(
  partial: epath.Path,
  part: dict[str, dict[str, np.ndarray]],
  sums: Mapping[str, Mapping[str, str]],
  journal: Journal | None,
) -> None:
  for role, weights in part.items():
    leaf_files.save(partial / 'params' / role, weights, PART_BYTES)
    if journal is not None:
      for name in weights:
        journal.add(f'{role}/{name}', sums[role][name])
  part.clear()


def _continue(
  partial: epath.Path, journal: Journal, sums: dict[str, dict[str, str]]
) -> None:
  """Fills `sums` with what is there as it was noted, and removes the rest."""
  params = partial / 'params'

  def checksum(path: str) -> str | None:
    role, _, name = path.partition('/')
    return leaf_files.checksum(params / role, name)

  journal.confirm(checksum)
  for path, found in journal.found.items():
    role, _, name = path.partition('/')
    sums.setdefault(role, {})[name] = found
  for folder in params.iterdir():
    if folder.name not in sums:
      folder.rmtree()
    else:
      leaf_files.keep(folder, sums[folder.name])
