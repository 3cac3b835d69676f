"""Orbax checkpoints as named arrays: shapes first, then one array or slice.

Both kinds on disk (OCDBT and one zarr folder per array, zarr 2 and 3) are
listed and opened through TensorStore, so no tree has to be known, nothing is
restored whole, and no file is executed. It knows nothing of models.
"""

import contextlib
import json
import os
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np
from etils import epath

from alignjax.core.errors import UserError

if TYPE_CHECKING:
  import tensorstore as ts

_MARKS = ('manifest.ocdbt', '_METADATA', '_CHECKPOINT_METADATA')
# Where training frameworks keep the item that holds the params.
_ITEMS = ('', 'default', 'state', 'params')
_ARRAY = re.compile(r'(.+)/(\.zarray|zarr\.json)')


def find(path: epath.Path) -> epath.Path | None:
  """The checkpoint at or just below a folder; None if there is none."""
  for item in _ITEMS:
    folder = path / item if item else path
    # A parent of items may be marked as well; arrays make a checkpoint.
    if any((folder / mark).exists() for mark in _MARKS):
      if _ocdbt(folder) or any(_ARRAY.match(key) for key in _keys(folder)):
        return folder
  return None


def arrays(path: epath.Path) -> 'dict[str, ts.TensorStore]':
  """Every array by name, opened and not read; names are joined by '/'.

  A '.' of a stored name counts as '/': Orbax writes both for nesting.
  """
  import tensorstore as ts

  stored = {
    match[1]: 'zarr' if match[2] == '.zarray' else 'zarr3'
    for key in _keys(path)
    if (match := _ARRAY.fullmatch(key))
  }
  store, complete = _store(path), _complete(path)
  pending = {}
  for name, driver in stored.items():
    spec: dict[str, Any] = {
      'driver': driver,
      'kvstore': store | {'path': f'{store.get("path", "")}{name}/'},
    }
    if complete:  # a chunk that is not there was lost
      spec['fill_missing_data_reads'] = False
    pending[name] = ts.open(spec, read=True)
  out: dict[str, ts.TensorStore] = {}
  for name, future in pending.items():
    with _readable(path, name):
      out[name.replace('.', '/')] = future.result()
  return dict(sorted(out.items()))


def read(
  path: epath.Path, name: str, array: 'ts.TensorStore', index: tuple[int, ...]
) -> np.ndarray:
  """`array[index]`; nothing else of it is kept. Raises UserError if damaged."""
  with _readable(path, name):
    return np.asarray(array[index].read().result())


@contextlib.contextmanager
def _readable(path: epath.Path, name: str) -> Iterator[None]:
  try:
    yield
  except (ValueError, OSError) as error:
    why = re.sub(r' \[[a-z_]+=.*', '', str(error).splitlines()[0])
    raise UserError(
      f'{path}: array {name!r} is corrupt or truncated: {why}'
    ) from error


def _keys(path: epath.Path) -> list[str]:
  """Every key of the store, chunks included."""
  import tensorstore as ts

  try:
    store = ts.KvStore.open(_store(path)).result()
    return [key.decode() for key in store.list().result()]
  except (ValueError, OSError) as error:
    why = str(error).splitlines()[0][:200]
    raise UserError(
      f'{path} is not a readable Orbax checkpoint: {why}'
    ) from error


def _store(path: epath.Path) -> dict[str, Any]:
  text = os.fspath(path)
  if _ocdbt(path):
    base = text if '://' in text else f'file://{quote(text)}'
    return {'driver': 'ocdbt', 'base': f'{base}/'}
  if '://' in text:
    scheme, _, rest = text.partition('://')
    bucket, _, folder = rest.partition('/')
    return {'driver': scheme, 'bucket': bucket, 'path': f'{folder}/'}
  return {'driver': 'file', 'path': f'{text}/'}


def _ocdbt(path: epath.Path) -> bool:
  return (path / 'manifest.ocdbt').exists()


def _complete(path: epath.Path) -> bool:
  """Whether the checkpoint says that it left out no chunk, even of zeros."""
  try:
    facts = json.loads((path / '_METADATA').read_text())
    return bool(facts['store_array_data_equal_to_fill_value'])
  except (OSError, ValueError, KeyError, TypeError):
    return False  # older than the field
