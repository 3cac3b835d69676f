"""Of what a merge is made: facts, what is written down of them, and a name.

The same for a merge that is written and for one that is made where it is used.
Nothing here reads weights.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from alignjax.interop.opened import Opened
from alignjax.merge import rules
from alignjax.merge.method import Method


class Merge(NamedTuple):
  """A checked merge of one result.

  Attributes:
    method: how.
    base: gives config, tokenizer and files, and the task vectors' origin.
    models: what is merged.
    role: which params of theirs.
    group: layer, tensor or all.
    rules: numbers of some leaves.
    numbers: of the others.
    options: dtype, pad, extrapolate and checksums as they were given.
  """

  method: Method
  base: Opened
  models: tuple[Opened, ...]
  role: str
  group: str
  rules: tuple[rules.Rule, ...]
  numbers: dict[str, Any]
  options: dict[str, Any]


def record(
  what: Merge, digest_of: Callable[[Opened], str | None]
) -> dict[str, Any]:
  """What provenance says of a merge; `digest_of` gives those that are known."""

  def source(model: Opened) -> dict[str, Any]:
    known = digest_of(model)
    said: dict[str, Any] = {'path': str(model.path)}
    if known is not None:
      said['digest'] = known
    if model.merge is not None:
      said['merge'] = record(model.merge, digest_of)
    return said

  return {
    'method': what.method.name,
    'numbers': dict(what.numbers),
    'group': what.group,
    'where': [rule.text for rule in what.rules],
    'role': what.role,
    **what.options,
    'base': source(what.base),
    'models': [source(model) for model in what.models],
  }


def digest(said: Mapping[str, Any]) -> str | None:
  """One name for the result that a record speaks of, None if it cannot say.

  It follows from the names of the sources' weights and from how they are
  merged: nobody has to make the result, whose last bits may depend on where it
  is made.
  """
  fields = ('group', 'where', 'dtype', 'pad')
  if not {'base', 'models', 'numbers', *fields} <= {*said}:
    return None  # of a stack, or of adapters
  inputs = [source.get('digest') for source in (said['base'], *said['models'])]
  if None in inputs:
    return None
  how = {name: said[name] for name in fields}
  how['method'] = 'linear' if said['method'] == 'lerp' else said['method']
  how['numbers'] = _floats(said['numbers'])
  text = json.dumps({'merge': how, 'inputs': inputs}, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def _floats(value: Any) -> Any:
  """1 and 1.0 are the same number, read from a flag or from JSON."""
  if isinstance(value, Mapping):
    return {name: _floats(item) for name, item in value.items()}
  if isinstance(value, list | tuple):
    return [_floats(item) for item in value]
  return float(value)


def spec(said: Mapping[str, Any]) -> dict[str, Any]:
  """What `deferred.opened` takes, of a record."""

  def again(source: Mapping[str, Any]) -> Any:
    return spec(source['merge']) if 'merge' in source else source['path']

  return {
    'method': said['method'],
    'base': again(said['base']),
    'models': [again(source) for source in said['models']],
    **{name: said[name] for name in ('group', 'where', 'dtype', 'extrapolate')},
    'allow_different_bases': said.get('allow_different_bases', False),
    **said['numbers'],
  }


def within(models: Sequence[Opened]) -> Iterator[Opened]:
  """These models and all that they are merged of, each once."""
  seen: set[int] = set()
  waiting = list(models)
  while waiting:
    model = waiting.pop(0)
    if id(model) in seen:
      continue
    seen.add(id(model))
    yield model
    if model.merge is not None:
      waiting += [model.merge.base, *model.merge.models]


def on_disk(models: Sequence[Opened]) -> list[Opened]:
  """The models of files that are read for these."""
  return [model for model in within(models) if model.merge is None]
