"""What the roles of a run begin with: the sections `start` and those of guests.

Checked before anything is read, named in start.json, then read or merged. The
composition of everything else is `parts`.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from alignjax import step
from alignjax.cli import parts
from alignjax.core.errors import UserError
from alignjax.core.types import Params, Recipe
from alignjax.interop.opened import Opened
from alignjax.merge import inputs
from alignjax.models.config import Config
from alignjax.system import checkpoint


class Origin(NamedTuple):
  """A model that a role begins with, and the decoder that it must be."""

  found: Opened
  shape: Config


def check(config: ConfigDict, recipe: Recipe) -> None:
  """UserError for a fixed role of which nobody said where it comes from.

  Weights that are never trained and come from no file would be noise, and so
  would be the head of one that starts as a copy of a role without it. '' says
  that this is meant.
  """
  told = {*config.start, *parts.guest_paths(config)}
  for role, follow in recipe.follow.items():
    if follow is not None or role in told:
      continue
    if parts.GUESTS.get(role, 'tied') != 'tied':
      raise UserError(
        f'{role}.path: no model is named; expected one with a head of the kind '
        f'{parts.GUESTS[role]!r}'
      )
    raise UserError(
      f'start.{role}: the recipe never trains this role, so say what it is: '
      "a model's path, a merge, '@policy' for a copy of the start"
    )
  copies = {
    role: origin
    for role, origin in config.start.items()
    if _copied(origin) in recipe.init
  }
  for role, head in step.headless(recipe, copies).items():
    where = f'{role}.path' if role in parts.GUESTS else f'start.{role}'
    raise UserError(
      f'start.{role} = {copies[role]!r}: that role has no {head}, and the '
      f'recipe never trains {role}; expected {where} = the directory of a '
      f'model whose head is of the kind {head.removesuffix("_head")!r}'
    )


def _copied(origin: Any) -> str | None:
  """The role that '@role' names; None for a path or a merge."""
  if isinstance(origin, str) and origin.startswith('@'):
    return origin[1:]
  return None


def origins(
  config: ConfigDict, policy: Config, tokens: Any, recipe: Recipe
) -> dict[str, str | Origin]:
  """Role -> '@role', or the model on disk or to be merged; reads no weights.

  A role is of the policy's shape, but one at `<role>.path` is of its own. The
  recipe may have no use for a guest. A role that is not here is drawn.
  """
  begin = {role: origin for role, origin in config.start.items() if origin}
  guests = parts.guest_paths(config)
  for role, path in guests.items():
    if role in begin:
      raise UserError(
        f'start.{role} = {begin[role]!r} and {role}.path = {path!r}: '
        'expected one of them'
      )
    if role in recipe.init:
      begin[role] = path
  found: dict[str, str | Origin] = {}
  for role, origin in begin.items():
    if _copied(origin) is not None:
      found[role] = origin
      continue
    own = role in guests
    shape = parts.guest_config(config, role, tokens) if own else policy
    what = f'{role}.path' if own else f'start.{role}'
    if role not in recipe.init:
      roles = sorted(recipe.init)
      raise UserError(f'{what}: no role {role!r}; the recipe has {roles}')
    found[role] = Origin(_for_role(recipe, role, origin, shape, what), shape)
  return found


def _for_role(
  recipe: Recipe, role: str, origin: Any, shape: Config, what: str
) -> Opened:
  """The model that a role starts from.

  A trained role with a head of its own may start from a net without one.
  """
  heads = step.own_head(recipe.init[role])
  kind = next((name.removesuffix('_head') for name in heads), 'tied')
  fixed = role in recipe.follow and recipe.follow[role] is None
  if fixed or not heads:
    return parts.opened(origin, shape, what, head=kind)
  found = parts.opened(origin, shape, what, head=None)
  for name in step.HEADS:
    has = found.leaves.get(name)
    if has is not None and (
      name not in heads or has.shape != heads[name].shape
    ):
      expected = ', '.join(f'{n} {list(x.shape)}' for n, x in heads.items())
      raise UserError(
        f'{what}: {found.path} has {name} {list(has.shape)}, expected a '
        f'language model or one with {expected}'
      )
  return found


def facts(found: Mapping[str, str | Origin]) -> dict[str, dict[str, Any]]:
  """Role -> what it begins with: the name of its weights, and of what merged.

  For each role that is no copy: {'checksum': digest}, with 'merge', the sources
  and numbers, if it is merged where it is used.
  """
  out = {}
  for role, origin in found.items():
    if isinstance(origin, str):
      continue
    out[role] = {'checksum': parts.digest(origin.found)}
    if origin.found.merge is not None:
      out[role]['merge'] = inputs.record(origin.found.merge, foreign=True)
  return out


def load(
  found: Mapping[str, str | Origin], mesh: jax.sharding.Mesh | None = None
) -> dict[str, Params | str]:
  """What `init_state` starts from: merges on the mesh, others on the host."""
  return {
    role: origin
    if isinstance(origin, str)
    else parts.load_params(origin.found, origin.shape, mesh)
    for role, origin in found.items()
  }


def resumed(
  found: Mapping[str, str | Origin], recipe: Recipe, workdir: Path
) -> dict[str, str | Origin]:
  """What of `found` a run needs that continues in `workdir`.

  Checkpoints hold all but the fixed roles: what only begins the others is
  neither read nor merged again.
  """
  folder = workdir / 'checkpoints'
  if not folder.is_dir() or not checkpoint.reader(folder).all_steps():
    return dict(found)
  fixed = {role for role, follow in recipe.follow.items() if follow is None}
  return _kept(found, fixed)


def _kept(
  found: Mapping[str, str | Origin], fixed: Iterable[str]
) -> dict[str, str | Origin]:
  """The origins of fixed roles, and of those that they copy."""
  needed = set(fixed)
  needed |= {str(_copied(found.get(role))) for role in fixed}
  return {role: origin for role, origin in found.items() if role in needed}
