"""What `inspect` shows, as plain JSON: models, training runs, differences.

Shapes and records only: no weights are allocated and nothing is compiled, so
that a 27B model takes as long as a small one. `difference` alone reads leaves,
one at a time. No tables: `cli/inspect.py` prints. No verb.
"""

import dataclasses
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

from alignjax.core.errors import UserError
from alignjax.core.lookup import nearest
from alignjax.interop import mixture, orbax
from alignjax.interop.open import open as open_model
from alignjax.merge.geometry import Geometry, geometry
from alignjax.merge.inputs import check_same
from alignjax.models import decoder
from alignjax.models.config import Config, to_json
from alignjax.models.preset import SHAPES, preset
from alignjax.models.shapes import shapes
from alignjax.system import model_dir
from alignjax.system.checkpoint import FORMAT

Facts = dict[str, Any]


def model(
  name: str,
  *,
  lengths: Sequence[int],
  batch: int = 1,
  dtype: str | None = None,
) -> Facts:
  """Facts of a released model, by its name, or of a model on disk.

  `dtype` is of the cache; the model's own if None. Raises UserError if there
  is no such model or it is not sound.
  """
  if os.path.exists(name) or os.sep in name:
    facts, config, leaves = _on_disk(name)
  elif name in SHAPES:
    # As the weights were released.
    config = preset(shape=name, dtype=dtype or 'bfloat16')
    leaves = {
      leaf: _leaf(x.shape, config.dtype) for leaf, x in shapes(config).items()
    }
    facts = {'name': name, 'format': 'released'}
  else:
    raise UserError(
      f'no model at {name} and no released model of that name'
      f'{nearest(name, SHAPES)} (released: {", ".join(SHAPES)})'
    )
  if dtype:
    config = dataclasses.replace(config, dtype=dtype)
  total = sum(leaf['parameters'] for leaf in leaves.values())
  embedding = leaves.get('embedding', {'parameters': 0})['parameters']
  return facts | {
    'parameters': {
      'all': total,
      'embedding': embedding,
      'body': total - embedding,
      'bytes': sum(leaf['bytes'] for leaf in leaves.values()),
    },
    'layers': {
      kind: config.count(kind) for kind in dict.fromkeys(config.pattern)
    },
    'cache': cache(config, batch, lengths),
    'config': to_json(config),
    'leaves': leaves,
  }


def _on_disk(name: str) -> tuple[Facts, Config, dict[str, Facts]]:
  """(facts, config, leaves) of a model directory of any format."""
  ours = (Path(name) / 'model.json').exists()
  found = model_dir.read(name) if ours else None
  weights = None
  if found is not None and found.view == 'conditioned':
    copies = mixture.names(found)  # any weights: all have the same leaves
    weights = [1 / len(copies)] * len(copies)
  opened = open_model(name, weights=weights, head=None)
  facts: Facts = {
    'name': str(opened.path),
    'format': opened.format,
    'tokenizer': str(opened.tokenizer) if opened.tokenizer else None,
    'files': [file.name for file in opened.files],
    'provenance': opened.provenance,
  }
  leaves = {leaf: _leaf(x.shape, x.dtype) for leaf, x in opened.leaves.items()}
  if opened.extra:
    facts['extra'] = {
      leaf: _leaf(x.shape, x.dtype) for leaf, x in opened.extra.items()
    }
  if found is not None:
    facts['roles'] = {
      role: model_dir.digest(found, role) for role in found.roles
    }
  else:
    for leaf, origin in opened.origin.items():
      leaves[leaf]['from'] = list(origin)
  return facts, opened.config, leaves


def _leaf(shape: Sequence[int], dtype: Any) -> Facts:
  count = math.prod(shape)
  dtype = np.dtype(dtype)
  return {
    'shape': [int(n) for n in shape],
    'dtype': dtype.name,
    'parameters': count,
    'bytes': count * dtype.itemsize,
  }


def cache(config: Config, batch: int, lengths: Sequence[int]) -> Facts:
  """Bytes of the decoding cache, from the shapes of `decoder.empty_cache`.

  Beside each length: the bytes if every attention layer had a slot for every
  token. Only the keys and values of global layers grow, and the positions that
  are stored with them.
  """

  def layers(config: Config, length: int):
    shapes = jax.eval_shape(lambda: decoder.empty_cache(config, batch, length))
    return [(config.kind(i), x) for i, x in enumerate(shapes['layers'])]

  def size(layers, *kinds: str) -> int:
    return sum(
      math.prod(x.shape) * x.dtype.itemsize
      for kind, slots in layers
      if kind in kinds or not kinds
      for x in jax.tree.leaves(slots)
    )

  rows = []
  for length in lengths:
    full = dataclasses.replace(config, window=max(length, config.window))
    needed, whole = size(layers(config, length)), size(layers(full, length))
    rows.append(
      {
        'length': length,
        'bytes': needed,
        'full_length_bytes': whole,
        'ratio': needed / whole,
      }
    )
  # Past the window rings are as large as they get. The difference of two
  # lengths is a token, however the slots are laid out.
  one, two = (layers(config, config.span + n) for n in (1, 2))
  short, long = (
    size([(kind, {n: x for n, x in c.items() if n in 'kv'}) for kind, c in of])
    for of in (one, two)
  )
  return {
    'dtype': config.dtype,
    'batch': batch,
    'kv_bytes_per_token': (long - short) // batch,
    'growth_bytes_per_token': (size(two) - size(one)) // batch,
    'ring_bytes': size(one, 'local'),
    'recurrent_bytes': size(one, 'recurrent'),
    'lengths': rows,
  }


def checkpoints(path: Path) -> list[Path]:
  """Checkpoints of a workdir, of its `checkpoints`, or the one that it is.

  Empty if `path` is none of these.
  """
  if (path / 'meta' / 'metadata').is_file():
    return [path]
  folder = path / 'checkpoints' if (path / 'checkpoints').is_dir() else path
  if not folder.is_dir():
    return []
  steps = [p for p in folder.iterdir() if (p / 'meta' / 'metadata').is_file()]
  return sorted(steps, key=lambda p: natural(p.name))


def run(path: Path, steps: Sequence[Path]) -> Facts:
  """Facts of a training run with the checkpoints `steps`.

  Raises UserError for one whose leaves are not those of its record.
  """
  return {
    'name': os.path.abspath(path),
    'format': 'training run',
    'models': [p.parent.name for p in sorted(path.glob('*/model.json'))],
    'checkpoints': [_checkpoint(step) for step in steps],
  }


def _checkpoint(step: Path) -> Facts:
  file = step / 'meta' / 'metadata'
  try:
    meta = json.loads(file.read_text('utf-8'))
    version = meta['format']
    names = set(meta['facts']['leaves']) if version == FORMAT else set()
  except (ValueError, KeyError, TypeError):
    raise UserError(f'{file} is not the record of a checkpoint') from None
  if version != FORMAT:
    raise UserError(f'{file} has format {version!r}, expected {FORMAT}')
  arrays = orbax.arrays(epath.Path(os.path.abspath(step / 'state')))
  if odd := sorted(names ^ set(arrays)):
    raise UserError(
      f'{step} is damaged: of its leaves only one of record and files knows'
      f' {", ".join(odd[:5])}{", ..." if len(odd) > 5 else ""}'
    )
  leaves = {
    name: _leaf(x.shape, x.dtype.numpy_dtype) for name, x in arrays.items()
  }
  files = [p for p in step.rglob('*') if p.is_file()]
  return {
    'step': step.name,
    'bytes_on_disk': sum(p.stat().st_size for p in files),
    'holds': _holds(leaves),
    'leaves': leaves,
  }


def _holds(leaves: Mapping[str, Facts]) -> Facts:
  """'params/policy' -> how many leaves, parameters, bytes."""
  out: Facts = {}
  for name, leaf in leaves.items():
    first, *rest = name.split('/')
    group = f'{first}/{rest[0]}' if first in ('params', 'frozen') else first
    sums = out.setdefault(group, {'leaves': 0, 'parameters': 0, 'bytes': 0})
    sums['leaves'] += 1
    for field in ('parameters', 'bytes'):
      sums[field] += leaf[field]
  return out


def difference(base: str, models: Sequence[str], role: str) -> Facts:
  """How task vectors model - base lie: the content of a geometry.json.

  {"format": 1, "base": {"name", "path"}, "models": [{"name", "path"}, ...] (M),
  "groups": {group: {...}}}. Groups go up the net (embedding, layers, what comes
  after them); the last, `all`, is all of them together. Of each group:

  - weights: norm of the base's weights;
  - norms [M] of the task vectors; relative [M]: by `weights`, null where that
    is 0 (a fresh norm scale);
  - angles_deg: of the pairs 01, 02, 12, 03, ..., null where a norm is 0;
  - sign_conflicts: share of the items moved by two or more models at which
    their signs disagree, null where there are none;
  - distances [M + 1, M + 1] between the weights of base and models;
  - lerp, slerp: norm of the task vector of their merge in equal shares; SLERP
    is by group, in `all` as well, and null where vectors are opposite.

  The models may be of different formats. Raises UserError if their leaves
  differ in names or shapes, or are not finite.
  """
  first, *others = (_of_role(path, role) for path in (base, *models))
  check_same(
    str(first.path), first.leaves, {str(m.path): m.leaves for m in others}
  )
  found = geometry(first, others)
  for name, of in found.items():
    if not np.isfinite([of.weights, *of.norms]).all():
      raise UserError(f'non-finite weights in the group {name!r}')
  whole = found.pop('all')
  groups = {name: _lies(found[name]) for name in sorted(found, key=_depth)}
  groups['all'] = _lies(whole) | {'slerp': _together(groups)}
  names = _names([str(model.path) for model in (first, *others)])
  told = [
    {'name': name, 'path': str(model.path)}
    for name, model in zip(names, (first, *others))
  ]
  return {'format': 1, 'base': told[0], 'models': told[1:], 'groups': groups}


def _lies(of: Geometry) -> Facts:
  return {
    'weights': of.weights,
    'norms': of.norms.tolist(),
    'relative': [x / of.weights if of.weights else None for x in of.norms],
    'angles_deg': of.angles,
    'sign_conflicts': of.conflicts,
    'distances': of.distances.tolist(),
    'lerp': of.lerp,
    'slerp': of.slerp,
  }


def _together(groups: Mapping[str, Facts]) -> float | None:
  """Norm of the SLERP of all groups, each on its own arc."""
  norms = [of['slerp'] for of in groups.values()]
  return None if None in norms else math.hypot(*norms)


def _names(paths: Sequence[str]) -> list[str]:
  """What people call models: their folders; whole paths where two clash."""

  def short(path: str) -> str:
    *above, last = Path(path).parts
    if not last.startswith('model') or not above:
      return last
    return above[-1] if last == 'model' else f'{above[-1]}/{last}'

  names = [short(path) for path in paths]
  clash = len({*names}) < len({*paths})
  return list(paths) if clash else names


def _depth(name: str) -> tuple[int, list[Any]]:
  """A sorting key from the embedding up to what comes after the layers."""
  place = 0 if name == 'embedding' else 1 if 'layer_' in name else 2
  return place, natural(name)


def _of_role(path: str, role: str):
  """The role of one of our directories; other formats have but one model."""
  ours = (Path(path) / 'model.json').exists()
  role = role if ours else 'policy'
  return open_model(path, role=role, head=None)


def natural(name: str) -> list[Any]:
  """A sorting key that puts layer_2 before layer_10."""
  return [
    (0, int(part), '') if part.isdigit() else (1, 0, part)
    for part in re.split(r'(\d+)', name)
  ]
