"""What a merging method is, and how it is called on one leaf.

A method is a pure function `method(base, leaves, *, numbers)` in a file of its
own: float32 arrays of one shape in and out. If it takes the keyword `stats`,
the function `stats(base, leaves)` beside it gives an array per leaf; their sum
over the leaves of a group is what the method gets, so that every leaf of a
layer shares one angle. `problem(stats)` beside it says why a sum cannot be
used, or None; `report(stats)` says in JSON what is worth recording. No table of
methods: a name is a file, as everywhere.
"""

import functools
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from alignjax.core import lookup
from alignjax.core.types import UserError

GROUPS = ('layer', 'tensor', 'all')


class Method(NamedTuple):
  """A method's function, its companions and the names of its numbers."""

  name: str
  fn: Callable[..., jax.Array]
  stats: Callable[..., jax.Array] | None
  problem: Callable[[Any], str | None] | None
  report: Callable[[Any], Any] | None
  numbers: tuple[str, ...]


def method(name: str) -> Method:
  """The method of that name; 'lerp' is 'linear'. Raises UserError."""
  fn = lookup.find('merge.methods', 'linear' if name == 'lerp' else name)
  words = [
    word
    for word, parameter in inspect.signature(fn).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY
  ]
  beside = functools.partial(_beside, fn)
  return Method(
    name=name,
    fn=fn,
    stats=beside('stats') if 'stats' in words else None,
    problem=beside('problem') if 'stats' in words else None,
    report=beside('report') if 'stats' in words else None,
    numbers=tuple(word for word in words if word != 'stats'),
  )


def _beside(fn: Callable[..., Any], name: str) -> Callable[..., Any]:
  return lookup.find('merge.methods', f'{fn.__module__}.{name}')


def check_numbers(how: Method, numbers: Mapping[str, Any], models: int) -> None:
  """Raises UserError for numbers that the method cannot take.

  Every number is a share in [0, 1]; `weights` is a list, one per model.
  """
  for name, value in numbers.items():
    if name not in how.numbers:
      raise UserError(
        f'the method {how.name!r} has no number {name!r}'
        f'{lookup.nearest(name, how.numbers)} (it has {", ".join(how.numbers)})'
      )
    if value is None:
      continue
    if name == 'weights':
      _check_weights(value)
    else:
      check_share(name, value)
  leaf = jax.ShapeDtypeStruct((1,), jnp.float32)
  # Tracing runs the method's own checks, such as the number of models.
  combine.eval_shape(how, leaf, (leaf,) * models, None, dict(numbers))


def check_share(name: str, share: Any) -> None:
  """Raises UserError for a number outside [0, 1]; arrays pass (jit)."""
  if isinstance(share, jax.Array | np.ndarray | np.generic):
    return
  number = isinstance(share, int | float) and not isinstance(share, bool)
  if not number or not 0 <= share <= 1:
    raise UserError(f'{name} must be a number from 0 to 1, found {share!r}')


def _check_weights(weights: Any) -> None:
  if not isinstance(weights, list | tuple):
    raise UserError(f'weights must be a list of numbers, found {weights!r}')
  for weight in weights:
    check_share('a weight', weight)
  if not any(isinstance(w, jax.Array) or w > 0 for w in weights):
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


@functools.partial(jax.jit, static_argnums=0)
def combine(
  how: Method,
  base: jax.Array,
  leaves: tuple[jax.Array, ...],
  stats: jax.Array | None,
  numbers: dict[str, Any],
) -> jax.Array:
  """The method on one leaf: float32 inside, the dtype of `base` outside.

  `stats` None means those of this leaf. The streaming driver and the merge of
  trees in memory both run this compiled function, hence agree to the bit.
  """
  base32, leaves32 = base.astype(jnp.float32), _f32(leaves)
  extra = {}
  if how.stats is not None:
    extra['stats'] = how.stats(base32, leaves32) if stats is None else stats
  return how.fn(base32, leaves32, **numbers, **extra).astype(base.dtype)


@functools.partial(jax.jit, static_argnums=0)
def leaf_stats(
  how: Method, base: jax.Array, leaves: tuple[jax.Array, ...]
) -> jax.Array:
  """The method's stats of one leaf, in float32."""
  assert how.stats is not None
  return how.stats(base.astype(jnp.float32), _f32(leaves))


def check_stats(how: Method, group: str, stats: Any) -> None:
  """Raises UserError, naming the group, if a group's stats are unusable."""
  if how.stats is None or how.problem is None:
    return
  if not np.isfinite(np.asarray(stats)).all():
    raise UserError(f'{how.name}: non-finite weights in the group {group!r}')
  if why := how.problem(stats):
    raise UserError(f'{how.name}: {why} in the group {group!r}')


def _f32(leaves: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
  return tuple(leaf.astype(jnp.float32) for leaf in leaves)
