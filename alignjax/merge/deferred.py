"""A merge that nobody writes: an opened model whose leaves are made as read.

Where a config names a model it may say how one is merged instead, in the words
of `alignjax merge`:

  {'method': 'slerp', 'base': P, 'models': [A, B], 't': 0.5}

and each of P, A and B may be such a merge again. Read leaf by leaf, totals of a
group of leaves first, in this process's memory: as the driver does it, with its
bits. Not the place for merging on a mesh, `placed`, or for writing results.
"""

import functools
import json
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from etils import epath

from alignjax.core.errors import UserError
from alignjax.core.spec import Spec
from alignjax.interop.open import absolute
from alignjax.interop.opened import Opened
from alignjax.merge import arrays, blocks, inputs, method, rules
from alignjax.merge.made import Merge

OPTIONS: dict[str, Any] = {
  'group': 'layer',
  'where': (),
  'dtype': 'keep',
  'extrapolate': False,
  'allow_different_bases': False,
}
DTYPES = ('keep', 'bfloat16', 'float32')

Read = Callable[[str], Any]  # leaf name -> leaf


def is_spec(origin: Any) -> bool:
  """Whether it says how a model is merged; other origins are paths."""
  return hasattr(origin, 'keys') or (
    isinstance(origin, str) and origin.lstrip().startswith('{')
  )


def opened(spec: Any, *, head: str | None = None) -> Opened:
  """The merge that `spec` says, checked; no weights are read.

  Args:
    spec: a mapping, or its text as JSON: method, base, models, the method's
      numbers, and of `alignjax merge` the options group, where, dtype,
      extrapolate and allow_different_bases. The result has the dtypes of the
      base unless `dtype` says another.
    head: what it must have on top; None takes any.

  Raises UserError for what `alignjax merge` refuses.
  """
  found = _opened(spec, {})
  kind = found.head.partition('(')[0]
  if head not in (None, kind):
    raise UserError(f'{found.path}: head is {found.head!r}, expected {head!r}')
  return found


def given(origins: Sequence[Any]) -> list[Any]:
  """Origins of one merge, those that are merges themselves opened."""
  known: dict[str, Opened] = {}
  return [_opened(x, known) if is_spec(x) else x for x in origins]


def _opened(origin: Any, known: dict[str, Opened]) -> Opened:
  """The same model for the same words, so that its leaves are read once."""
  if not is_spec(origin):
    if not isinstance(origin, str | os.PathLike) or not str(origin):
      raise UserError(f'merge: {origin!r} is no path of a model and no merge')
    key = str(absolute(origin))
    if key not in known:
      (known[key],) = inputs.opened([origin], 'policy')
    return known[key]
  fields = _fields(origin)
  key = json.dumps(fields, sort_keys=True, default=str)
  if key not in known:
    known[key] = _model(_merge(fields, known))
  return known[key]


def _fields(origin: Any) -> dict[str, Any]:
  if isinstance(origin, str):
    try:
      origin = json.loads(origin)
    except json.JSONDecodeError as error:
      raise UserError(f'a merge as text is JSON: {error}: {origin}') from None
  return _plain(origin)


def _plain(value: Any) -> Any:
  if hasattr(value, 'keys'):  # a ConfigDict is no Mapping
    return {name: _plain(value[name]) for name in value.keys()}
  if isinstance(value, list | tuple):
    return [_plain(item) for item in value]
  return value


def _merge(fields: dict[str, Any], known: dict[str, Opened]) -> Merge:
  numbers = dict(fields)
  name, base = numbers.pop('method', None), numbers.pop('base', None) or None
  paths = numbers.pop('models', None)
  options = {k: numbers.pop(k, default) for k, default in OPTIONS.items()}
  numbers = {k: v for k, v in numbers.items() if v is not None}
  if not isinstance(name, str):
    raise UserError(f'a merge names its method, found {fields}')
  if not isinstance(paths, list) or not paths:
    raise UserError(f'{name}: models is a list of models, found {paths!r}')
  if options['dtype'] not in DTYPES:
    raise UserError(f'{name}: dtype {options["dtype"]!r} is none of {DTYPES}')
  how = method.checked(name, base, options['group'])
  where = tuple(options['where'])
  given = rules.parsed(
    where, how, [numbers], len(paths), options['extrapolate']
  )
  models = [_opened(path, known) for path in paths]
  first = models[0] if base is None else _opened(base, known)
  inputs.fitting((first, *models), 'policy', dtype=options['dtype'])
  rules.check(given, first.leaves)
  if not options['allow_different_bases']:
    inputs.check_bases(first, models, inputs.digest(first, 'policy'))
  return Merge(
    method=how,
    base=first,
    models=tuple(models),
    role='policy',
    group=options['group'],
    rules=given,
    numbers=numbers,
    options={
      'dtype': options['dtype'],
      'pad': False,
      'extrapolate': options['extrapolate'],
      'checksums': False,
      'allow_different_bases': options['allow_different_bases'],
    },
  )


def _model(what: Merge) -> Opened:
  """What a directory of the result would be."""
  to = what.options['dtype']

  def kind(spec):
    keep = to == 'keep' or not arrays.floating(spec.dtype)
    return Spec(spec.shape, spec.dtype if keep else arrays.named(to))

  source = what.base.provenance.get('source')
  found = what.base._replace(
    path=epath.Path(_label(what)),
    leaves={name: kind(spec) for name, spec in what.base.leaves.items()},
    provenance={} if source is None else {'source': source},
    weights=(),
    merge=what,
  )
  read = reader(found)

  def view(name, allocate=np.empty):
    del allocate
    return read(name)

  return found._replace(load=read, view=view)


def _label(what: Merge) -> str:
  """'liti(P; slerp(P; A, B; t=0.5); liti_rate=0.3)': for messages, and unique.

  What is not said has its default.
  """
  words = [f'{name}={value}' for name, value in what.numbers.items()]
  words += [f'where {rule.text}' for rule in what.rules]
  words += [
    f'{name}={value}'
    for name, value in (('group', what.group), *what.options.items())
    if value not in (OPTIONS.get(name), False)
  ]
  parts = [', '.join(str(model.path) for model in what.models), *words]
  if what.method.uses_base:
    parts.insert(0, str(what.base.path))
  return f'{what.method.name}({"; ".join(parts)})'


def reader(
  model: Opened,
  put: Callable[[str, np.ndarray], Any] | None = None,
  merged: Callable[[], tuple[Callable[..., Any], Callable[..., Any]]]
  | None = None,
  known: dict[int, Read] | None = None,
) -> Read:
  """Leaf name -> leaf of a merge: NumPy's, or what `put` and `merged` make.

  `put` takes a leaf of a file to where it is merged; `merged` gives, for each
  merge, what takes the total of a leaf there and what merges one.

  Holds the leaf that was read last, of every model that it is made of: a model
  that is named twice is read once. Not for several threads.

  Raises UserError, as it reads, for weights that are not finite and for totals
  that give no merge.
  """
  known = {} if known is None else known
  if id(model) not in known:
    if model.merge is None:
      read = _stored(model, put)
    else:
      what = model.merge
      first = what.base if what.method.uses_base else what.models[0]
      parts = [reader(m, put, merged, known) for m in (first, *what.models)]
      how = (merged or _near)()
      read = functools.partial(_leaf, what, model.leaves, parts, how, {})
    known[id(model)] = _last(read)
  return known[id(model)]


def _stored(model: Opened, put: Any) -> Read:
  if put is None:
    return model.load
  return lambda name: put(name, model.load(name))


def _last(read: Read) -> Read:
  held: dict[str, Any] = {}

  def again(name: str) -> Any:
    if name not in held:
      held.clear()  # before the next one is read
      held[name] = read(name)
    return held[name]

  return again


def _leaf(what, leaves, parts, merged, totals, name) -> Any:
  """A leaf of a merge, by `merged` = (total of a leaf, merge of a leaf)."""
  spec, how = leaves[name], what.method
  if not arrays.floating(spec.dtype):
    first, *others = (read(name) for read in parts)
    return blocks.same_integers(name, first, others)
  total = None
  if how.grouped:
    key = method.group_of(name, what.group)
    if key not in totals:
      totals[key] = _total(what, leaves, parts, merged[0], key)
    total = totals[key]
  numbers = rules.numbers(
    what.rules, name, what.numbers, what.base.config.layers
  )
  first, *others = (read(name) for read in parts)
  return merged[1](how, name, first, tuple(others), numbers, total, spec.dtype)


def _total(what, leaves, parts, measure, key: str) -> Any:
  total: Any = None
  for name, spec in leaves.items():
    if not arrays.floating(spec.dtype):
      continue
    if method.group_of(name, what.group) == key:
      first, *others = (read(name) for read in parts)
      part = measure(what.method, name, first, tuple(others))
      total = part if total is None else total + part
  method.check_total(what.method, key, total)
  return total


def _near() -> tuple[Callable[..., Any], Callable[..., Any]]:
  # Here, as it imports JAX, which merging files does not need.
  from alignjax.merge import memory

  return memory.near_total, memory.near_leaf
