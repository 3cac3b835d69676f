"""A conditioned model directory at some weights, as a plain model.

Such a directory (`view` is 'conditioned') has a role `shared` for the leaves
that exist once and one more for each copy; `provenance` names what each copy
stands for. Leaves are mixed in float32 as they are read, so that whoever opens
it with weights has a plain model: sampler, evaluation and merges know nothing.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from alignjax.core.errors import UserError
from alignjax.core.spec import Spec
from alignjax.system import model_dir
from alignjax.system.model_dir import ModelDir

SHARED = 'shared'
SLACK = 1e-3  # of a sum of 1: weights are typed by hand


def names(found: ModelDir) -> tuple[str, ...]:
  """What each copy of a conditioned model stands for, in order."""
  return tuple(found.provenance.get('condition', _copies(found)))


def checked(
  found: ModelDir, weights: Sequence[float] | None
) -> tuple[float, ...]:
  """The weights, which sum to 1 within SLACK, with a sum of exactly 1.

  Raises:
    UserError: none for a conditioned model, some for a plain one, another
      number of them, or a point outside the simplex.
  """
  if found.view != 'conditioned':
    raise UserError(
      f'{found.path} is a {found.view} model: it takes no weights, found '
      f'{list(weights or ())}'
    )
  known = list(names(found))
  if weights is None:
    raise UserError(
      f'{found.path} is conditioned on {known}, so it needs {len(known)} '
      f'weights that sum to 1: `alignjax sample PATH --weights '
      f'{",".join(f"{1 / len(known):.3g}" for _ in known)}`, a field weights '
      'of a model in an evaluation, or aj.load(PATH, weights=...)'
    )
  if len(weights) != len(known):
    raise UserError(
      f'weights: found {len(weights)}, expected {len(known)}, one for each of '
      f'{known} of {found.path}'
    )
  total = math.fsum(weights)
  inside = all(w >= 0 for w in weights)  # NaN is not
  if not inside or not abs(total - 1) <= SLACK:
    raise UserError(
      f'weights: {list(weights)} lie outside the simplex (sum {total:g}), '
      'expected numbers of 0 or more that sum to 1'
    )
  return tuple(w / total for w in weights)


def mixed(
  found: ModelDir, weights: Sequence[float]
) -> tuple[dict[str, Spec], Callable[[str], np.ndarray]]:
  """(leaves, load) of the model at `weights`; weights of 0 read nothing."""
  copies = _copies(found)
  shared: Mapping[str, Any] = {}
  if SHARED in found.roles:
    shared = model_dir.leaves(found, SHARED)
  own = model_dir.leaves(found, copies[0])

  def load(name: str) -> np.ndarray:
    if name in shared:
      return model_dir.load_leaf(found, SHARED, name)
    used = [(r, w) for r, w in zip(copies, weights) if w]
    parts = [
      np.float32(w) * model_dir.load_leaf(found, role, name).astype(np.float32)
      for role, w in used
    ]
    return np.sum(parts, axis=0, dtype=np.float32).astype(own[name].dtype)

  return dict(sorted({**shared, **own}.items())), load


def _copies(found: ModelDir) -> list[str]:
  return [role for role in found.roles if role != SHARED]
