"""Opens a model on disk, whoever wrote it, by looking at what lies there.

Three formats: our model directories, Hugging Face directories, DeepMind's
Orbax trees. Pickles are refused by name, without a look inside.
"""

import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from alignjax.core.errors import UserError
from alignjax.core.spec import Spec
from alignjax.interop import deepmind, hf, mixture, orbax
from alignjax.interop.hf_files import PICKLES
from alignjax.interop.opened import Opened
from alignjax.models.config import Config, from_json
from alignjax.models.shapes import shapes
from alignjax.system import model_dir

EXTRA = 'extra'  # role of the tensors that are not the decoder's
# Written beside a model by a verification; about one copy of it only.
CERTIFICATES = ('certificate.json', 'certificate.txt')


def open(  # noqa: A001
  path: epath.PathLike,
  *,
  role: str = 'policy',
  window_self: bool | None = None,
  head: str | None = 'tied',
  weights: Sequence[float] | None = None,
) -> Opened:
  """What a model directory of any format holds; no weights are read.

  Args:
    path: the directory; local, or gs:// where the format allows.
    role: which params of one of our directories.
    window_self: overrides how the window counts (see Config).
    head: what the model must have on top: 'tied' makes it a language model,
      'embedding' one of recipe embed; None takes any.
    weights: of a conditioned model of ours, which is then a plain one.

  Raises UserError if there is no model, or one that is not sound.
  """
  path = absolute(path)
  if not path.exists():
    raise UserError(f'no model at {path}: there is no such file or directory')
  if not path.is_dir():
    raise _not_a_directory(path)
  if (path / 'model.json').exists():
    return _ours(path, role, window_self, head, weights)
  if head not in (None, 'tied'):
    raise UserError(f'{path} has no {head} head: only ours have')
  names = sorted(file.name for file in path.iterdir())
  if weights is not None:
    raise UserError(f'{path} takes no weights: only conditioned models of ours')
  if role != 'policy':
    raise UserError(f'{path} has no roles, so no {role!r}: only ours have')
  if any(
    name.endswith(('.safetensors', '.safetensors.index.json')) for name in names
  ):
    return hf.read(path, window_self=window_self)
  if pickles := [name for name in names if name.endswith(PICKLES)]:
    raise UserError(
      f'{path} has its weights in {", ".join(pickles)}, which is a pickle and'
      ' may run code: it is not opened; use a copy with .safetensors files'
    )
  if orbax.find(path) is not None:
    return deepmind.read(path, window_self=window_self)
  if any((path / name).is_dir() for name in ('checkpoints', 'state')):
    raise UserError(
      f'{path} is a training run or one of its checkpoints, not a model; the'
      ' model that training wrote is the directory with a model.json'
    )
  raise UserError(
    f'no model at {path}: looked for model.json (ours), *.safetensors beside'
    ' config.json (Hugging Face) and manifest.ocdbt or _METADATA (Orbax,'
    f' DeepMind), found {", ".join(names[:5]) or "nothing"}'
    f'{", ..." if len(names) > 5 else ""}'
  )


def absolute(path: epath.PathLike) -> epath.Path:
  """A path that does not depend on the working directory."""
  text = os.fspath(path)
  return epath.Path(text if '://' in text else os.path.abspath(text))


def _not_a_directory(path: epath.Path) -> UserError:
  if path.name.endswith('.safetensors'):
    return UserError(
      f'{path} is one file of a model; give its directory, which holds'
      ' config.json as well'
    )
  if path.name.endswith(PICKLES):
    return UserError(
      f'{path} is a pickle, which may run code: it is not opened; use a model'
      ' with .safetensors files'
    )
  return UserError(f'{path} is a file, expected the directory of a model')


def _ours(
  path: epath.Path,
  role: str,
  window_self: bool | None,
  head: str | None,
  weights: Sequence[float] | None,
) -> Opened:
  found = model_dir.read(path)
  mixing: tuple[float, ...] = ()
  if found.view == 'conditioned' or weights is not None:
    mixing = mixture.checked(found, weights)
  kind = found.head.partition('(')[0]
  wanted = 'a plain language' if head == 'tied' else f'an {head}'
  plain = (
    ('view', found.view, 'plain'),
    ('head', kind, head or kind),
  )
  for field, value, expected in () if mixing else plain:
    if value != expected:
      raise UserError(
        f'{path}: {field} is {value!r}, expected {expected!r}: not {wanted}'
        ' model'
      )
  values = dict(found.config)
  if window_self is not None:
    values['window_self'] = window_self
  config = from_json(values)
  leaves, load = _weights_of(found, role, mixing)
  if role == 'policy':
    above = ('unembedding',) if mixing else (f'{kind}_head',)
    _check(path, config, {n: x for n, x in leaves.items() if n not in above})
  # Their names have dots where ours have slashes.
  source = found.provenance.get('source', {})
  joint = '.' if source.get('format') == 'hf' else '/'
  extra: dict[str, str] = {}
  specs: dict[str, Spec] = {}
  if EXTRA in found.roles:
    for name, spec in model_dir.leaves(found, EXTRA).items():
      extra[name.replace('/', joint)] = name
      specs[name.replace('/', joint)] = spec

  def load_extra(name: str) -> np.ndarray:
    return model_dir.load_leaf(found, EXTRA, extra[name])

  return Opened(
    path=path,
    format='alignjax',
    config=config,
    leaves=leaves,
    load=load,
    view=functools.partial(_viewed, found, role, load, bool(mixing)),
    origin={name: (name,) for name in leaves},
    tokenizer=found.tokenizer,
    files=tuple(f for f in found.files if f.name not in CERTIFICATES),
    provenance=found.provenance,
    extra=specs,
    load_extra=load_extra,
    weights=mixing,
    head='tied' if mixing else found.head,
  )


def _viewed(found, role, load, is_mixed, name, allocate=np.empty):
  if is_mixed:
    return load(name)
  return model_dir.load_leaf(found, role, name, allocate)


def _weights_of(found: model_dir.ModelDir, role: str, mixing: Sequence[float]):
  """(leaves, load) of a role, or of the mixture of a conditioned model."""
  if mixing:
    return mixture.mixed(found, mixing)
  return (
    model_dir.leaves(found, role),
    lambda name: model_dir.load_leaf(found, role, name),
  )


def _check(path: epath.Path, config: Config, leaves: Mapping[str, Any]) -> None:
  if wrong := differing(config, leaves):
    raise UserError(
      f'{path}: model.json and the leaves do not agree: {"; ".join(wrong)}'
    )


def differing(config: Config, leaves: Mapping[str, Any]) -> list[str]:
  """Every leaf that is missing, too many, or of a wrong shape."""
  expected = shapes(config)
  wrong = []
  for name in sorted(leaves.keys() | expected.keys()):
    if name not in leaves:
      wrong.append(f'{name} is missing')
    elif name not in expected:
      wrong.append(f'{name} is not expected')
    elif leaves[name].shape != expected[name].shape:
      wrong.append(
        f'{name} is {list(leaves[name].shape)}, expected'
        f' {list(expected[name].shape)}'
      )
  return wrong
