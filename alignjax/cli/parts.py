"""From the sections of a config to the parts of a run.

The composition root shared by the verbs: names become functions here, a
recipe's positional parameters are built from the sections of the same names.
Nothing below this file reads a config.
"""

import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from alignjax.core import lookup
from alignjax.core.types import Model, Params, Recipe, UserError
from alignjax.data.tokenizer import ByteTokenizer, Tokenizer
from alignjax.models import decoder
from alignjax.models.config import FREE, Config, from_json, to_json
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

  The name 'start' means the shape of the model directory `start.policy`.
  """
  section = config.model
  if section['name'] == 'start':
    origin = config.start.get('policy') if 'start' in config else None
    if not origin:
      raise UserError(
        "model.name is 'start', so start.policy must be a model directory"
      )
    shape = from_json(model_dir.read(origin).config)
  else:
    shape = lookup.build('models', section)
  if shape.vocab_size < tokens.size:
    raise UserError(
      f'model.vocab_size = {shape.vocab_size} is smaller than the '
      f'tokenizer, which has {tokens.size} tokens'
    )
  return shape


def recipe(config: ConfigDict, model: Model, tokens: Any) -> Recipe:
  """The recipe of a config, with the parts that its signature names."""
  fn = lookup.find('recipes', config.recipe.name)
  parts = []
  for name, parameter in inspect.signature(fn).parameters.items():
    if parameter.kind is parameter.KEYWORD_ONLY:
      continue
    if name == 'model':
      parts.append(model)
    elif name not in config:
      raise UserError(
        f'recipe {config.recipe.name!r} needs a section {name!r} in the config'
      )
    else:
      parts.append(lookup.build(f'{name}s', config[name], tokens))
  return lookup.build('recipes', config.recipe, *parts)


def load_params(
  path: str, config: Config, what: str
) -> tuple[Params, model_dir.ModelDir]:
  """(stacked parameters, directory) of a model that must be of `config`."""
  found = model_dir.read(path)
  check_config(found, config, what)
  return decoder.stacked(config, model_dir.load(found)), found


def check_config(found: model_dir.ModelDir, config: Config, what: str) -> None:
  """UserError naming every field of a model that is not as expected."""
  expected = to_json(config)
  differ = [
    f'{field} is {found.config.get(field)!r}, expected {value!r}'
    for field, value in expected.items()
    if field not in FREE and found.config.get(field) != value
  ]
  if differ:
    raise UserError(f'{what}: {found.path} is another model: {differ}')


def start(
  config: Mapping[str, str], decoder_config: Config
) -> tuple[dict[str, Any], dict[str, str]]:
  """(role -> parameters or '@role', role -> digest of what was read)."""
  origins, digests = {}, {}
  for role, origin in config.items():
    if not origin:
      continue
    if origin.startswith('@'):
      origins[role] = origin
      continue
    origins[role], found = load_params(origin, decoder_config, f'start.{role}')
    digests[role] = model_dir.digest(found)
  return origins, digests


def language_model(config: Config, tokens: Any) -> Model:
  """The model over the tokenizer's legal tokens."""
  return lm.model(config, tokens)
