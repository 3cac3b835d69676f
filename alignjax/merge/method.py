"""What a merging method is, and how it is called on one leaf.

A method is a pure function `method(base, leaves, *, numbers)` in a file of
`methods/`, of NumPy's arrays or of JAX's: float32 of one shape in and out. It
sees a leaf whole or in blocks of whole rows, and treats every item (with
`by_rows`, every row) alike. What it must know of the leaf or of its group
beyond that are its `passes`: sums over blocks, made before. Names are files, as
everywhere: no table of methods. Numbers are declared where the method is.
"""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from alignjax.core import lookup
from alignjax.core.errors import UserError
from alignjax.merge import arrays

GROUPS = ('layer', 'tensor', 'all')


class Range(NamedTuple):
  """The values that a number can have; with `outside`, beyond on request."""

  low: float
  high: float
  whole: bool = False
  outside: bool = False


SHARE = Range(0, 1)
RATE = Range(0, 1, outside=True)  # interpolates; beyond 1 it extrapolates
FACTOR = Range(-np.inf, np.inf)
COUNT = Range(0, 2**63, whole=True)


class Pass(NamedTuple):
  """One reading of the inputs before the merge itself.

  Attributes:
    measure: (base, leaves, stats) -> array(s); their sum over all blocks is
      the total. `stats` is what the pass before left, None for the first.
    settle: (total, stats, **numbers) -> the stats from here on.
  """

  measure: Callable[..., Any]
  settle: Callable[..., Any]


class Method(NamedTuple):
  """A method's function and what the callers must know of it.

  Attributes:
    name: as it was asked for.
    fn: (base, leaves, *, numbers[, stats][, uniform]) -> merged.
    about: one line of help.
    numbers: Range by keyword; `weights` (one per model) is not among them.
    weighted: it takes `weights`.
    models: fewest and most models, None for any.
    uses_base: what it gives depends on the base.
    passes: made in order before `fn`, which gets `stats` of the last.
    grouped: totals are those of a group of leaves; such a method has one pass.
    as_stored: arrays of NumPy's come in their dtypes, as `weighted_sum` and the
      inner products of `gram`, which are all that it does with them, take them.
    by_rows: a row, the weights of one output of a linear map, belongs together.
    random: `fn` gets `uniform(m)`, in [0, 1) for every item of model m.
    counted: numbers that `prepare` makes of a leaf's size, host side.
    problem: why the total of a group cannot be used, or None.
    report: what of it is worth recording: JSON by name.
  """

  name: str
  fn: Callable[..., Any]
  about: str
  numbers: Mapping[str, Range]
  weighted: bool = False
  models: tuple[int, int | None] = (1, None)
  uses_base: bool = True
  passes: tuple[Pass, ...] = ()
  grouped: bool = False
  as_stored: bool = False
  by_rows: bool = False
  random: bool = False
  prepare: Callable[..., dict[str, Any]] | None = None
  problem: Callable[[Any], str | None] | None = None
  report: Callable[[Any], dict[str, Any]] | None = None


def merging(about: str, **facts: Any) -> Callable[[Any], Any]:
  """Declares a function as a method; the rest is `Method`'s fields."""

  def declare(fn):
    facts.setdefault('numbers', {})
    fn.merging = Method(name=fn.__name__, fn=fn, about=about, **facts)
    return fn

  return declare


def method(name: str) -> Method:
  """The method of that name; 'lerp' is 'linear'. Raises UserError."""
  fn = lookup.find('merge.methods', 'linear' if name == 'lerp' else name)
  found = getattr(fn, 'merging', None)
  if found is None:
    raise UserError(f'{name!r} is no merging method')
  return found._replace(name=name)


def checked(name: str, base: Any, group: str) -> Method:
  """`method`, once it has a base if it needs one and the group is one."""
  how, _ = method(name), group_of('', group)
  if base is None and how.uses_base:
    raise UserError(f'{name} needs --base, from which the task vectors are')
  return how


def check_numbers(
  how: Method, numbers: Mapping[str, Any], models: int, extrapolate: bool
) -> None:
  """Raises UserError for numbers, or a count of models, that it cannot take.

  With `extrapolate`, numbers that interpolate may lie beyond their ends.
  """
  fewest, most = how.models
  if models < fewest or (most is not None and models > most):
    wanted = f'{fewest}' if most == fewest else f'{fewest} or more'
    raise UserError(f'{how.name} takes {wanted} model(s), not {models}')
  names = [*how.numbers, *(['weights'] if how.weighted else [])]
  for name, value in numbers.items():
    if name not in names:
      raise UserError(
        f'the method {how.name!r} has no number {name!r}'
        f'{lookup.nearest(name, names)} (it has {", ".join(names) or "none"})'
      )
    if name == 'weights':
      _check_weights(how, value, models)
    else:
      check_number(name, value, how.numbers[name], extrapolate)


def check_number(
  name: str, value: Any, allowed: Range, extrapolate: bool = False
) -> None:
  """Raises UserError for a number out of range; traced ones pass."""
  if value is None or not arrays.known(value):
    return
  kinds = (int, np.integer) if allowed.whole else (int, float, np.generic)
  if hasattr(value, 'item') and not isinstance(value, np.generic):
    value = value.item()
  good = isinstance(value, kinds) and not isinstance(value, bool)
  good = good and value == value and value not in (np.inf, -np.inf)
  free = extrapolate and allowed.outside
  if not good or not (free or allowed.low <= float(value) <= allowed.high):
    raise UserError(
      f'{name} must be a {"whole " if allowed.whole else ""}number from'
      f' {allowed.low:g} to {allowed.high:g}, found {value!r}'
      + (' (--extrapolate allows it)' if good and allowed.outside else '')
    )


def _check_weights(how: Method, weights: Any, models: int) -> None:
  if weights is None:
    return
  if not isinstance(weights, list | tuple):
    raise UserError(f'weights must be a list of numbers, found {weights!r}')
  if len(weights) != models:
    raise UserError(
      f'{how.name} takes a weight per model: {len(weights)} weights for'
      f' {models} models'
    )
  for weight in weights:
    check_number('a weight', weight, Range(-np.inf, np.inf))
  if all(arrays.known(w) and w == 0 for w in weights):
    raise UserError('weights must not all be 0')


def group_of(name: str, group: str) -> str:
  """The group of a leaf: leaves of a group share their stats.

  'layer': a block is one group, over all its linear maps; what is outside of
  blocks (embedding, final norm) is a group by its first name. 'tensor': each
  leaf. 'all': one group.
  """
  if group == 'all':
    return 'all'
  if group == 'tensor':
    return name
  if group != 'layer':
    raise UserError(f'group must be one of {", ".join(GROUPS)}, not {group!r}')
  if match := re.match(r'(?:.*?/)?layer_\d+(?=/)', name):
    return match[0]
  return name.split('/')[0]


def combine(
  how: Method,
  base: Any,
  leaves: Sequence[Any],
  stats: Any,
  numbers: Mapping[str, Any],
  *,
  name: str,
  index: Any = None,
) -> Any:
  """The method on a block: float32 in and out.

  Args:
    how: the method.
    base: float32 [rows, columns], or a whole leaf.
    leaves: likewise, one per model.
    stats: of its last pass.
    numbers: those of `prepare` among them.
    name: the leaf's; with the number `seed` it names what is drawn.
    index: uint32, the place of each item in its leaf; for random methods.
  """
  extra: dict[str, Any] = {}
  numbers = dict(numbers)
  if how.passes:
    extra['stats'] = stats
  if how.random:
    seed = numbers.pop('seed', None) or 0

    def uniform(model: int) -> Any:
      return arrays.uniform(index, stream(seed, name, model))

    extra['uniform'] = uniform
  return how.fn(base, tuple(leaves), **numbers, **extra)


def stream(seed: int, name: str, model: int) -> int:
  """64 bits that name what is drawn for one leaf of one model."""
  text = f'{seed}/{name}/{model}'.encode()
  return int.from_bytes(hashlib.sha256(text).digest()[:8], 'little')


def check_total(how: Method, group: str, total: Any) -> None:
  """Raises UserError, naming the group, if a total is unusable."""
  if how.problem is None:
    return
  if not np.isfinite(np.asarray(total)).all():
    raise UserError(f'{how.name}: non-finite weights in the group {group!r}')
  if why := how.problem(total):
    raise UserError(f'{how.name}: {why} in the group {group!r}')
