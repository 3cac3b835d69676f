"""From the sections of a config to the parts of a run.

The composition root shared by the verbs: names become functions here, a
recipe's positional parameters are built from the sections of the same names.
Nothing below this file reads a config.
"""

import functools
import inspect
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from alignjax.core import lookup, naming
from alignjax.core.errors import UserError
from alignjax.core.types import (
  Model,
  Params,
  Recipe,
  Reward,
)
from alignjax.data.tokenizer import ByteTokenizer, Tokenizer, fingerprint
from alignjax.interop import open as files_of
from alignjax.interop.opened import Opened
from alignjax.merge import deferred, inputs, placed
from alignjax.models import decoder, sharding
from alignjax.models.config import FREE, Config, to_json
from alignjax.policies import lm
from alignjax.rewards import compose
from alignjax.rewards.diversity import diversity
from alignjax.system import model_dir

# Roles that may be models of their own, in sections of their own, and the head
# that they have.
GUESTS = {
  'teacher': 'tied',
  'embedding': 'embedding',
  'reward_model': 'scalar',
}


def compilation_cache(workdir: Path) -> None:
  """Compiled programs are kept below `workdir`, unless JAX is told where."""
  if not os.environ.get('JAX_COMPILATION_CACHE_DIR'):
    path = str(workdir / '.jax_cache')
    jax.config.update('jax_compilation_cache_dir', path)
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)


def tokenizer(path: str) -> Tokenizer | ByteTokenizer:
  """The tokenizer of a file; '' is the byte tokenizer."""
  return Tokenizer.load(path) if path else ByteTokenizer()


def model_config(config: ConfigDict, tokens: Any) -> Config:
  """The decoder of the `model` section; it must have room for all tokens.

  The name 'start' means the shape of `start.policy`, a model in any format or
  a merge.
  """
  section = config.model
  if section['name'] == 'start':
    origin = config.start.get('policy') if 'start' in config else None
    if not origin:
      raise UserError(
        "model.name is 'start', so start.policy must be a model directory or a"
        ' merge of some'
      )
    shape = opened_at(origin).config
  else:
    shape = lookup.build('models', section)
  if shape.vocab_size < tokens.size:
    raise UserError(
      f'model.vocab_size = {shape.vocab_size} is smaller than the '
      f'tokenizer, which has {tokens.size} tokens'
    )
  return shape


def teacher_config(config: ConfigDict, tokens: Any) -> Config:
  """The decoder of the `teacher` section; see `guest_config`."""
  return guest_config(config, 'teacher', tokens)


def guest_config(config: ConfigDict, role: str, tokens: Any) -> Config:
  """The decoder of a guest's section; the policy's where there is none.

  A guest is a frozen role of any size, family and format, at `<role>.path`,
  which may also be a merge, such as the mean of several reward models. Its
  tokenizer, its own file or `<role>.tokenizer`, must be the run's: ids are
  shared. Rows of its embedding beyond the tokenizer are no tokens.
  """
  section = _guest(config, role)
  path = section.get('path')
  if not path:
    return model_config(config, tokens)
  found = of_tokenizer(
    path,
    tokens,
    f'{role}.path',
    head=GUESTS[role],
    file=section.get('tokenizer') or '',
    remedy=f'; for a model without its tokenizer file set {role}.tokenizer',
  )
  return found.config


def of_tokenizer(
  path: Any,
  tokens: Any,
  what: str,
  *,
  head: str | None = 'tied',
  file: str = '',
  remedy: str = '',
) -> Opened:
  """A model of any size, family and format whose ids are those of `tokens`.

  Its tokenizer is its own or `file`. Rows of its embedding beyond the tokenizer
  are no tokens.
  """
  found = opened_at(path, head=head)
  if found.config.vocab_size < tokens.size:
    raise UserError(
      f'{what}: {found.path} has {found.config.vocab_size} ids, fewer than the '
      f'{tokens.size} of the tokenizer'
    )
  # A plan may stand in for a tokenizer that is not here.
  if isinstance(tokens, Tokenizer | ByteTokenizer):
    file = file or str(found.tokenizer or '')
    if fingerprint(tokenizer(file)) != fingerprint(tokens):
      raise UserError(
        f'{what}: {found.path} has another tokenizer '
        f'({file or "no file, so bytes"}) than the run '
        f'({tokens.path or "bytes"}), expected the same{remedy}'
      )
  return found


def _guest(config: ConfigDict, role: str) -> dict[str, Any]:
  section: Any = config.get(role)
  return dict(section or {})


def reward(config: ConfigDict, tokens: Any, source: Any) -> Reward:
  """The reward of a config, of as many parts as it likes."""
  return compose.build(
    config.reward,
    {
      'tokens': tokens,
      'source': source,
      'reward_model': language_model(
        guest_config(config, 'reward_model', tokens), tokens
      ),
    },
  )


def with_diversity(reward: Reward, config: ConfigDict, tokens: Any) -> Reward:
  """`reward` and a last score, diversity, where `embedding.path` is a model."""
  if 'embedding' not in guest_paths(config):
    return reward
  encoder = language_model(guest_config(config, 'embedding', tokens), tokens)
  return compose.beside(reward, diversity(encoder))


def recipe(
  config: ConfigDict, model: Model, tokens: Any, reward: Reward | None = None
) -> Recipe:
  """The recipe of a config, with the parts that its signature names.

  Roles that only the reward reads are among its own.
  """
  fn = lookup.find('recipes', config.recipe.name)
  parts = []
  for name, parameter in inspect.signature(fn).parameters.items():
    if parameter.kind is parameter.KEYWORD_ONLY:
      continue
    if name == 'model':
      parts.append(model)
    elif name in GUESTS:
      parts.append(language_model(guest_config(config, name, tokens), tokens))
    elif name not in config:
      raise UserError(
        f'recipe {config.recipe.name!r} needs a section {name!r} in the config'
      )
    elif name == 'reward':
      parts.append(reward)
    else:
      parts.append(lookup.build(f'{name}s', config[name], tokens))
  made = lookup.build('recipes', config.recipe, *parts)
  read = compose.roles(reward) if reward and reward in parts else {}
  return made._replace(
    init={**made.init, **read}, follow={**made.follow, **dict.fromkeys(read)}
  )


def opened_at(
  origin: Any,
  *,
  head: str | None = 'tied',
  weights: Sequence[float] | None = None,
) -> Opened:
  """The model that a config names: a directory, or a merge of some.

  A merge, `merge.deferred`, is a section (or its JSON) in place of the path.
  """
  if not deferred.is_spec(origin):
    return files_of.open(origin, head=head, weights=weights)
  if weights is not None:
    raise UserError(
      f'weights = {list(weights)} are for a conditioned model, not for a merge'
    )
  return deferred.opened(origin, head=head)


def load_params(
  found: Opened, what: Config, mesh: jax.sharding.Mesh | None = None
) -> Params:
  """Stacked parameters of an opened model.

  With a mesh a merge is made there and stays there, a leaf at a time; a model
  on disk is held by the host.
  """
  if mesh is not None and found.merge is not None:
    layout = functools.partial(decoder.stacked, what)
    return placed.onto(found, layout, sharding.TABLE, mesh)
  return decoder.stacked(
    what, naming.nested({name: found.load(name) for name in found.leaves})
  )


def digest(found: Opened) -> str:
  """One name for the weights of an opened model, in any format.

  Of a merge it names its sources and how they are merged.
  """
  if found.merge is not None:
    name = inputs.digest(found, 'policy', foreign=True)
    assert name is not None
    return name
  if found.weights:
    parts = model_dir.read(found.path)
    of = {role: model_dir.digest(parts, role) for role in parts.roles}
    return model_dir.digest_of({**of, 'weights': str(found.weights)})
  if found.format == 'alignjax':
    return model_dir.digest(model_dir.read(found.path))
  sums: dict[str, str] = {}
  for name in found.leaves:
    sums |= model_dir.checksums({name: found.load(name)})
  return model_dir.digest_of(sums)


def opened(
  origin: Any,
  config: Config,
  what: str,
  *,
  head: str | None = 'tied',
  weights: Sequence[float] | None = None,
) -> Opened:
  """`opened_at`, which must be of `config`; `weights` mix a conditioned."""
  try:
    found = opened_at(origin, head=head, weights=weights)
  except UserError as error:
    if not deferred.is_spec(origin):
      raise
    raise UserError(f'{what}: {error}') from error
  # How it is computed is free; what is computed is not.
  expected = to_json(config)
  differ = [
    f'{field} is {value!r}, expected {expected[field]!r}'
    for field, value in to_json(found.config).items()
    if field not in FREE and value != expected[field]
  ]
  if differ:
    raise UserError(f'{what}: {found.path} is another model: {differ}')
  return found


def guests(
  config: ConfigDict, tokens: Any, roles: Iterable[str]
) -> tuple[dict[str, Params], dict[str, str]]:
  """(parameters, digests) of roles that are models of their own."""
  paths, params, digests = guest_paths(config), {}, {}
  for role in roles:
    if role not in paths:
      raise UserError(f'{role}.path: no model is named, and one is needed')
    shape = guest_config(config, role, tokens)
    found = opened(paths[role], shape, f'{role}.path', head=GUESTS[role])
    params[role], digests[role] = load_params(found, shape), digest(found)
  return params, digests


def guest_paths(config: ConfigDict) -> dict[str, Any]:
  """Guest -> path or merge, of those that have one."""
  found = {role: _guest(config, role).get('path') for role in GUESTS}
  return {role: path for role, path in found.items() if path}


def language_model(config: Config, tokens: Any) -> Model:
  """The model over the tokenizer's legal tokens."""
  return lm.model(config, tokens)
