"""A name in a config -> a function, and its numbers -> a config section.

Names, not registries: 'bond' in room 'recipes' is the function `bond` of
`alignjax/recipes/bond.py`, 'verify.python_code' in room 'rewards' is
`python_code` of `alignjax/rewards/verify.py`, and a dotted name that matches
no file of the room ('my_pkg.rewards.polite') is imported. Numbers live once:
a section is filled from the keyword-only defaults of the function it names.
This file is the only one that imports by name, and it builds nothing itself.
"""

import ast
import difflib
import importlib
import inspect
import numbers
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from alignjax.core.errors import UserError

if typing.TYPE_CHECKING:
  from ml_collections import ConfigDict

_PACKAGE = Path(__file__).parent.parent
_KINDS = {
  float: 'a number',
  int: 'a whole number',
  bool: 'true or false',
  str: 'a string',
  tuple: 'a list of values',
  list: 'a list of values',
  dict: 'a section',
}


def nearest(word: str, words: Iterable[str]) -> str:
  """'; did you mean X?' with the closest of `words`, or ''."""
  close = difflib.get_close_matches(word, list(words), n=1)
  return f'; did you mean {close[0]!r}?' if close else ''


def names(room: str) -> list[str]:
  """What `find(room, ...)` accepts, read from the sources, not imported.

  A file with a function of its own name goes by that name; in other files
  every public function counts, as 'file.function'.
  """
  found = []
  for path in sorted((_PACKAGE / room.replace('.', '/')).glob('[!_]*.py')):
    tree = ast.parse(path.read_text('utf-8'))
    functions = [
      node.name
      for node in tree.body
      if isinstance(node, ast.FunctionDef) and not node.name.startswith('_')
    ]
    if path.stem in functions:
      found.append(path.stem)
    else:
      found += [f'{path.stem}.{function}' for function in functions]
  return found


def find(room: str, name: str) -> Callable[..., Any]:
  """The function that `name` means in a room.

  Raises UserError, with the nearest name and the list, if there is none.
  """
  stem, _, function = name.partition('.')
  folder = _PACKAGE / room.replace('.', '/')
  if stem.isidentifier() and (folder / f'{stem}.py').is_file():
    module, function = f'alignjax.{room}.{stem}', function or stem
  else:
    module, _, function = name.rpartition('.')
  found = getattr(_imported(module), function, None) if module else None
  if not callable(found):
    known = names(room)
    raise UserError(
      f'no {name!r} in {room}{nearest(name, known)}'
      f' (known: {", ".join(known) or "none"}; a name from another package'
      ' is written module.function)'
    )
  return found


def _imported(module: str) -> types.ModuleType | None:
  """The module, or None if it does not exist; its own errors pass through."""
  if not all(part.isidentifier() for part in module.split('.')):
    return None
  try:
    return importlib.import_module(module)
  except ModuleNotFoundError as error:
    if error.name and f'{module}.'.startswith(f'{error.name}.'):
      return None
    raise


def fit(field: str, value: Any, kind: type) -> Any:
  """`value` as a `kind`: whole numbers fit a float, lists fit a tuple.

  Raises UserError, naming the field, if it is of another kind.
  """
  whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
  if kind is int and whole:
    return int(value)
  if kind is float and (whole or isinstance(value, float)):
    return float(value)
  if kind in (tuple, list) and isinstance(value, tuple | list):
    return kind(value)
  if kind is dict and (isinstance(value, Mapping) or _section(value)):
    return value
  if kind in (bool, str) and isinstance(value, kind):
    return value
  if kind not in _KINDS:
    return value
  raise UserError(f'field {field!r} takes {_KINDS[kind]}, found {value!r}')


def _section(value: Any) -> bool:
  """Whether it is a ConfigDict, which is no Mapping."""
  # By its looks: whoever reads files only should not wait for the import.
  return hasattr(value, 'to_dict')


def _plain(value: Any) -> Any:
  return value.to_dict() if _section(value) else value


def _kind(parameter: inspect.Parameter) -> tuple[type | None, bool]:
  """(kind of value, may it be None) of a keyword; (None, True): anything."""
  annotation, default = parameter.annotation, parameter.default
  if annotation is inspect.Parameter.empty:
    number = isinstance(default, int | float) and not isinstance(default, bool)
    if default is None or default is inspect.Parameter.empty:
      return None, True
    return (float if number else type(default)), False
  union = isinstance(annotation, types.UnionType) or (
    typing.get_origin(annotation) is typing.Union
  )
  options = typing.get_args(annotation) if union else (annotation,)
  optional = types.NoneType in options
  kinds = {_plain_kind(option) for option in options} - {types.NoneType}
  if kinds == {int, float}:
    return float, optional
  return (kinds.pop(), optional) if len(kinds) == 1 else (None, True)


def _plain_kind(annotation: Any) -> type | None:
  """tuple[int, ...] -> tuple, Literal['a'] -> str, Sequence -> tuple."""
  origin = typing.get_origin(annotation) or annotation
  if origin is typing.Literal:
    return type(typing.get_args(annotation)[0])
  if not isinstance(origin, type):
    return None
  if origin in _KINDS or origin is types.NoneType:
    return origin
  if issubclass(origin, Mapping):
    return dict
  return tuple if issubclass(origin, Iterable) else None


def _keywords(fn: Callable[..., Any]) -> dict[str, inspect.Parameter]:
  """Keyword-only parameters that a config can hold: numbers and names."""
  signature = inspect.signature(fn, eval_str=True)
  plain = (*_KINDS, types.NoneType)
  return {
    name: parameter
    for name, parameter in signature.parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY
    and (
      parameter.default is parameter.empty
      or isinstance(parameter.default, plain)
    )
  }


def _known(what: str, fields: Iterable[str], known: Iterable[str]) -> None:
  for field in fields:
    if field not in known:
      raise UserError(
        f'{what} has no field {field!r}{nearest(field, known)}'
        f' (fields: {", ".join(known) or "none"})'
      )


def defaults(room: str, name: str, **changed: Any) -> 'ConfigDict':
  """The section of a function: its keyword-only defaults, `name`, changes.

  Numbers are floats unless annotated `int`. An optional number that defaults
  to None is a typed placeholder, so that it can be set later.
  """
  from ml_collections import ConfigDict, config_dict

  what = f'{room} {name!r}'
  parameters = _keywords(find(room, name))
  _known(what, changed, parameters)
  section = ConfigDict({'name': name})
  for field, parameter in parameters.items():
    kind, optional = _kind(parameter)
    value = changed.get(field, parameter.default)
    if value is parameter.empty:
      raise UserError(f'{what} needs a value for {field!r}')
    if value is None and not optional:
      raise UserError(f'{what}: field {field!r} cannot be None')
    if value is None:
      section[field] = config_dict.placeholder(kind or object)
    else:
      section[field] = fit(field, value, kind) if kind else value
  return section


def build(room: str, section: Any, *parts: Any) -> Any:
  """Calls the function that the section names: parts, then its numbers.

  Raises UserError for a field that the function does not have, or a value
  of another kind (a section may come from a file).
  """
  name = section['name']
  fn = find(room, name)
  parameters = _keywords(fn)
  what = f'{room} {name!r}'
  values: dict[str, Any] = {
    field: section[field] for field in section if field != 'name'
  }
  _known(what, values, parameters)
  for field, value in values.items():
    kind, optional = _kind(parameters[field])
    if value is None and not optional:
      raise UserError(f'{what}: field {field!r} cannot be None')
    if value is not None and kind:
      value = fit(field, value, kind)
    values[field] = _plain(value)
  for field, parameter in parameters.items():
    if parameter.default is parameter.empty and field not in values:
      raise UserError(f'{what} needs a value for {field!r}')
  return fn(*parts, **values)
