"""Configs: a program or a JSON file, plus overrides from the command line.

`--config=F.py[:variant]` runs `get_config(variant)` of a file, a file F.json
is a resolved config, and `--config.a.b=value` sets a field that exists, read
as the type it has. Numbers and names only: functions are found by
`core.lookup`, wiring is the program's `jobs(config)`.
"""

import ast
import inspect
import json
import os
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from alignjax.core import lookup
from alignjax.core.errors import UserError

_FLAG = '--config'


def load(
  argv: Sequence[str],
) -> tuple[ConfigDict, types.ModuleType | None, list[str]]:
  """(config, its program or None for JSON, arguments that are not config's).

  Takes `--config=F` and `--config F`, and overrides in the same two forms.
  Raises UserError for a missing or broken file, a field that does not exist,
  or a value of another type.
  """
  file, overrides, rest = None, [], []
  arguments = iter(argv)
  for argument in arguments:
    flag, equals, value = argument.partition('=')
    if flag != _FLAG and not flag.startswith(f'{_FLAG}.'):
      rest.append(argument)
      continue
    if not equals:
      value = next(arguments, None)
    if value is None:
      raise UserError(f'{flag} needs a value: {flag}=...')
    if flag == _FLAG:
      file = value
    else:
      overrides.append((flag.removeprefix(f'{_FLAG}.'), value))
  if file is None:
    raise UserError('--config=F is missing (a .py program or a .json file)')
  config, program = _read(file)
  for field, text in overrides:
    override(config, field, text)
  return config, program, rest


def _read(file: str) -> tuple[ConfigDict, types.ModuleType | None]:
  if file.endswith('.json'):
    return from_json(_text(file), file), None
  path, colon, variant = file.rpartition(':')
  if not colon or not path.endswith('.py'):
    path, variant = file, ''
  if not path.endswith('.py'):
    raise UserError(f'{file}: a config is F.py, F.py:variant or F.json')
  program = _program(path)
  get_config = getattr(program, 'get_config', None)
  if get_config is None:
    raise UserError(f'{path}: a config program defines get_config(variant)')
  takes = inspect.signature(get_config).parameters
  if variant and not takes:
    raise UserError(f'{path}: has no variants, found {variant!r}')
  known = list(getattr(program, 'VARIANTS', [variant]))
  if variant not in known:
    raise UserError(f'{path}: no variant {variant!r}, expected one of {known}')
  config = get_config(variant) if takes else get_config()
  if not isinstance(config, ConfigDict):
    raise UserError(
      f'{path}: get_config returns a ConfigDict, found {type(config).__name__}'
    )
  return config, program


def _text(path: str) -> str:
  try:
    return Path(path).read_text('utf-8')
  except UnicodeDecodeError:
    raise UserError(f'{path}: not UTF-8 text') from None
  except OSError as error:
    raise UserError(f'{path}: {error.strerror}') from None


def _program(path: str) -> types.ModuleType:
  """The file as a module that is not in sys.modules; leaves no bytecode."""
  text = _text(path)
  try:
    code = compile(text, path, 'exec')
  except SyntaxError as error:
    raise UserError(f'{path}, line {error.lineno}: {error.msg}') from None
  except ValueError as error:
    raise UserError(f'{path}: {error}') from None
  module = types.ModuleType(Path(path).stem)
  module.__file__ = os.path.abspath(path)
  try:
    exec(code, module.__dict__)
  except ModuleNotFoundError as error:
    raise UserError(
      f'{path} imports {error.name!r}, which is not found from this folder'
    ) from None
  return module


def _fields(config: Any, prefix: str = '') -> Iterator[str]:
  for key in config:
    yield f'{prefix}{key}'
    if isinstance(config[key], ConfigDict):
      yield from _fields(config[key], f'{prefix}{key}.')


def override(config: ConfigDict, field: str, text: str) -> None:
  """Sets 'a.b' in place, reading the text as the type that the field has."""
  *parents, last = field.split('.')
  section = config
  for parent in parents:
    section = section.get(parent) if isinstance(section, ConfigDict) else None
  if not isinstance(section, ConfigDict) or last not in section:
    known = list(_fields(config))
    close = lookup.nearest(field, known)
    raise UserError(
      f'no field {field!r} in the config'
      + (close or f' (fields: {", ".join(config)})')
    )
  old = section[last]
  if isinstance(old, ConfigDict):
    raise UserError(
      f'{field!r} is a section of the config; set one of its fields:'
      f' {", ".join(f"{field}.{key}" for key in old)}'
    )
  kind = section.get_type(last) if old is None else type(old)
  section[last] = _parse(field, text, kind, old)


def _parse(field: str, text: str, kind: type, old: Any) -> Any:
  if old is None and text.lower() == 'none':
    return None
  if kind is str:
    return text
  if kind is bool:
    value = {'true': True, 'false': False}.get(text.lower(), text)
  else:
    value = _literal(text)
  if kind is float and isinstance(value, str):
    try:
      value = float(value)  # inf, nan
    except ValueError:
      pass
  value = lookup.fit(field, value, kind)
  if kind in (tuple, list) and old and len({type(item) for item in old}) == 1:
    item_kind = type(old[0])
    value = kind(lookup.fit(field, item, item_kind) for item in value)
  return value


def _literal(text: str) -> Any:
  """A Python literal, else the text itself."""
  try:
    return ast.literal_eval(text)
  except (ValueError, TypeError, SyntaxError):
    return text


def check(
  config: ConfigDict, file: str, names: Sequence[str], **least: float
) -> None:
  """UserError unless all `names` are there and numbers are large enough.

  `least` is a field's smallest value: where that is an int, so is the field.
  """
  for name in (*names, *least):
    if name not in config:
      raise UserError(f'{file}: no {name!r}; it is needed here')
  for name, smallest in least.items():
    found, whole = config[name], isinstance(smallest, int)
    number = isinstance(found, int if whole else int | float)
    if not number or isinstance(found, bool) or not found >= smallest:
      kind = 'a whole number, ' if whole else ''
      raise UserError(
        f'{name} = {found!r}: expected {kind}{smallest:g} or more'
      )


def plain(value: Any, field: str = 'config') -> Any:
  """Nested dicts and lists of JSON values; raises UserError for others."""
  if isinstance(value, ConfigDict):
    value = {key: value[key] for key in value}
  if isinstance(value, Mapping):
    return {
      str(key): plain(item, f'{field}.{key}') for key, item in value.items()
    }
  if isinstance(value, tuple | list):
    return [plain(item, f'{field}[{i}]') for i, item in enumerate(value)]
  if isinstance(value, np.generic):
    return value.item()
  if isinstance(value, os.PathLike):
    return os.fspath(value)
  if value is None or isinstance(value, bool | int | float | str):
    return value
  raise UserError(
    f'{field}: a config holds numbers and names, found {type(value).__name__}'
  )


def to_json(config: Any) -> str:
  """Text that depends on the config's values only (keys are sorted)."""
  text = json.dumps(plain(config), indent=2, sort_keys=True, ensure_ascii=False)
  return text + '\n'


def from_json(text: str, file: str = 'config') -> ConfigDict:
  """The config of `to_json`; lists come back as tuples."""
  try:
    value = json.loads(text)
  except json.JSONDecodeError as error:
    raise UserError(f'{file}, line {error.lineno}: {error.msg}') from None
  if not isinstance(value, dict):
    raise UserError(f'{file}: a config is a JSON object')
  return ConfigDict(_frozen(value))


def _frozen(value: Any) -> Any:
  if isinstance(value, dict):
    return {key: _frozen(item) for key, item in value.items()}
  if isinstance(value, list):
    return tuple(_frozen(item) for item in value)
  return value


def difference(old: Any, new: Any) -> list[str]:
  """What changed, one line a field: 'optimizer.lr: 0.001 -> 0.002'."""
  before, after = _flat(plain(old)), _flat(plain(new))
  return [
    f'{field}: {before.get(field, "nothing")} -> {after.get(field, "nothing")}'
    for field in sorted({*before, *after})
    if before.get(field) != after.get(field)
  ]


def _flat(config: Mapping[str, Any], prefix: str = '') -> dict[str, str]:
  flat = {}
  for key, value in config.items():
    if isinstance(value, dict) and value:
      flat |= _flat(value, f'{prefix}{key}.')
    else:
      # Sections in a list: the order of their fields means nothing.
      text = json.dumps(value, ensure_ascii=False, sort_keys=True)
      flat[f'{prefix}{key}'] = text
  return flat
