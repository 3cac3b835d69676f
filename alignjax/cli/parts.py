"""From the sections of a config to the parts of a run.

The composition root shared by the verbs: names become functions here, a
recipe's positional parameters are built from the sections of the same names.
Nothing below this file reads a config.
"""

import inspect
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from alignjax.core import lookup, tree
from alignjax.core.types import Model, Params, Recipe, UserError
from alignjax.data.tokenizer import ByteTokenizer, Tokenizer, fingerprint
from alignjax.interop import open as files_of
from alignjax.interop.opened import Opened
from alignjax.models import decoder
from alignjax.models.config import FREE, Config, to_json
from alignjax.policies import lm
from alignjax.system import model_dir


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

  The name 'start' means the shape of `start.policy`, a model in any format.
  """
  section = config.model
  if section['name'] == 'start':
    origin = config.start.get('policy') if 'start' in config else None
    if not origin:
      raise UserError(
        "model.name is 'start', so start.policy must be a model directory"
      )
    shape = files_of.open(origin).config
  else:
    shape = lookup.build('models', section)
  if shape.vocab_size < tokens.size:
    raise UserError(
      f'model.vocab_size = {shape.vocab_size} is smaller than the '
      f'tokenizer, which has {tokens.size} tokens'
    )
  return shape


def teacher_config(config: ConfigDict, tokens: Any) -> Config:
  """The decoder of the `teacher` section; the policy's where there is none.

  `teacher.path` is a model of any size, family and format. Its tokenizer, its
  own file or `teacher.tokenizer`, must be the run's: ids are compared. Rows of
  its embedding beyond the tokenizer are no tokens.
  """
  section = _teacher(config)
  path = section.get('path')
  if not path:
    return model_config(config, tokens)
  found = files_of.open(path)
  if found.config.vocab_size < tokens.size:
    raise UserError(
      f'teacher.path: {path} has {found.config.vocab_size} ids, fewer than the '
      f'{tokens.size} of the tokenizer'
    )
  # A plan may stand in for a tokenizer that is not here.
  if isinstance(tokens, Tokenizer | ByteTokenizer):
    file = section.get('tokenizer') or found.tokenizer or ''
    if fingerprint(tokenizer(str(file))) != fingerprint(tokens):
      raise UserError(
        f'teacher.path: {path} has another tokenizer '
        f'({file or "no file, so bytes"}) than the run '
        f'({tokens.path or "bytes"}), expected the same; for a teacher '
        'without its tokenizer file set teacher.tokenizer'
      )
  return found.config


def _teacher(config: ConfigDict) -> dict[str, Any]:
  section: Any = config.get('teacher')
  return dict(section or {})


def recipe(config: ConfigDict, model: Model, tokens: Any) -> Recipe:
  """The recipe of a config, with the parts that its signature names."""
  fn = lookup.find('recipes', config.recipe.name)
  parts = []
  for name, parameter in inspect.signature(fn).parameters.items():
    if parameter.kind is parameter.KEYWORD_ONLY:
      continue
    if name == 'model':
      parts.append(model)
    elif name == 'teacher':
      parts.append(language_model(teacher_config(config, tokens), tokens))
    elif name not in config:
      raise UserError(
        f'recipe {config.recipe.name!r} needs a section {name!r} in the config'
      )
    else:
      parts.append(lookup.build(f'{name}s', config[name], tokens))
  return lookup.build('recipes', config.recipe, *parts)


def load_params(found: Opened, what: Config) -> Params:
  """Stacked parameters of an opened model."""
  return decoder.stacked(
    what, tree.nested({name: found.load(name) for name in found.leaves})
  )


def digest(found: Opened) -> str:
  """One name for the weights of an opened model, in any format."""
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
  path: str, config: Config, what: str, weights: Sequence[float] | None = None
) -> Opened:
  """A model on disk, which must be of `config`; `weights` mix a conditioned."""
  found = files_of.open(path, weights=weights)
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


def check_start(config: ConfigDict, recipe: Recipe) -> None:
  """UserError for a fixed role of which nobody said where it comes from.

  Weights that are never trained and come from no file would be noise. '' says
  that this is meant.
  """
  told = {*config.start, *(['teacher'] if _teacher(config).get('path') else [])}
  for role, follow in recipe.follow.items():
    if follow is None and role not in told:
      raise UserError(
        f'start.{role}: the recipe never trains this role, so say what it is: '
        "a model's path, '@policy' for a copy of the start"
      )


def start(
  config: ConfigDict, policy: Config, tokens: Any
) -> tuple[dict[str, Any], dict[str, str]]:
  """(role -> parameters or '@role', role -> digest of what was read).

  From the sections `start` and `teacher`: a role is of the policy's shape,
  but the teacher at `teacher.path` is of its own.
  """
  begin = {role: origin for role, origin in config.start.items() if origin}
  teacher = _teacher(config).get('path')
  if teacher and 'teacher' in begin:
    raise UserError(
      f'start.teacher = {begin["teacher"]!r} and teacher.path = {teacher!r}: '
      'expected one of them'
    )
  if teacher:
    begin['teacher'] = teacher
  origins, digests = {}, {}
  for role, origin in begin.items():
    if origin.startswith('@'):
      origins[role] = origin
      continue
    own = teacher and role == 'teacher'
    shape = teacher_config(config, tokens) if own else policy
    found = opened(origin, shape, 'teacher.path' if own else f'start.{role}')
    origins[role] = load_params(found, shape)
    digests[role] = digest(found)
  return origins, digests


def language_model(config: Config, tokens: Any) -> Model:
  """The model over the tokenizer's legal tokens."""
  return lm.model(config, tokens)
