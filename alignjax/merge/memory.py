"""Merges trees of arrays in memory, also under jit and on a mesh; no files.

Weights that lie in this process's memory are merged by NumPy, in the blocks of
the streaming driver: the same bits. Others, traced or on devices, are merged
where they are, sharded as they are.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from alignjax.core import tree
from alignjax.core.errors import UserError
from alignjax.core.types import Params
from alignjax.merge import arrays, blocks, inputs, method, rules
from alignjax.merge.method import Method


def merge(
  name: str,
  *,
  base: Params | None = None,
  models: Sequence[Params],
  group: str = 'layer',
  where: Sequence[str] = (),
  extrapolate: bool = False,
  **numbers: Any,
) -> Params:
  """The merge of canonical trees, in the structure and dtypes of `base`.

  Args:
    name: of the method; see `alignjax merge --help`.
    base: the init of the task vectors; the first model for methods without.
    models: trees of the same names and shapes.
    group: what shares an angle: layer, tensor or all.
    where: rules 'REGEX:name=value[,name=value]' of some leaves; see `rules`.
    extrapolate: numbers that interpolate may lie beyond their ends.
    **numbers: t, weights, liti_rate, density, ...: see the method.

  Raises UserError for names, shapes or numbers that do not fit, for weights
  that are not finite, and for opposite task vectors; under jit, where values
  are unknown, those give NaN.
  """
  how = method.method(name)
  numbers = {k: v for k, v in numbers.items() if v is not None}
  given = rules.parsed(where, how, [numbers], len(models), extrapolate)
  method.group_of('', group)
  if base is None:
    if how.uses_base:
      raise UserError(f'{name} needs a base, from which the task vectors are')
    base = models[0]
  first, *others = map(tree.named, (base, *models))
  inputs.check_same(
    'base', first, {f'model {i}': o for i, o in enumerate(others)}
  )
  if any(leaf.startswith('groups/') for leaf in first):
    raise UserError('merge takes canonical trees: call tree.unstack first')
  rules.check(given, first)
  layers = rules.depth(first)
  near = all(map(_near, (x for of in (first, *others) for x in of.values())))
  near &= all(map(arrays.known, jax.tree.leaves(numbers)))
  total_of = near_total if near else far_total
  leaf_of = near_leaf if near else far_leaf
  leaves = {leaf: tuple(o[leaf] for o in others) for leaf in first}
  totals: dict[str, Any] = {}
  if how.grouped:
    for leaf in sorted(filter(lambda n: is_float(first[n]), first)):
      part = total_of(how, leaf, first[leaf], leaves[leaf])
      key = method.group_of(leaf, group)
      totals[key] = totals[key] + part if key in totals else part
    for key, total in totals.items():
      if arrays.known(total):
        method.check_total(how, key, total)

  def one(leaf, x):
    if not is_float(x):
      return blocks.same_integers(leaf, x, leaves[leaf])
    total = totals.get(method.group_of(leaf, group))
    own = rules.numbers(given, leaf, numbers, layers)
    return leaf_of(how, leaf, x, leaves[leaf], own, total)

  return tree.map_named(one, base)


def is_float(leaf: Any) -> bool:
  return arrays.floating(leaf.dtype)


def _near(x: Any) -> bool:
  """Whether NumPy can look at an array without moving it."""
  if not isinstance(x, jax.Array):
    return True
  if not arrays.known(x):
    return False
  return [device.platform for device in x.devices()] == ['cpu']


def near_total(how: Method, name: str, base: Any, models: Any) -> Any:
  """What a leaf adds to the total of its group, by NumPy."""
  return blocks.total(how, 0, _leaf(how, name, base, models), None)


def near_leaf(
  how: Method,
  name: str,
  base: Any,
  models: Any,
  numbers: Any,
  total: Any,
  dtype: Any = None,
) -> Any:
  """A leaf merged as the driver does it; `dtype` is the base's by default."""
  one = _leaf(how, name, base, models)
  setting = blocks.settled(how, one, numbers, total)
  kind = np.asarray(base).dtype if dtype is None else dtype
  out = np.empty((one.rows, one.columns), kind)
  for start, stop in one.blocks(how):
    (x,) = blocks.merged(how, one, [setting], (start, stop), [out.dtype])
    out[start:stop] = x
  if how.by_rows:
    out = inputs.stored_again(name, out, base.shape)
  out = np.ascontiguousarray(out).reshape(base.shape)
  return jnp.asarray(out) if isinstance(base, jax.Array) else out


def far_total(how: Method, name: str, base: Any, models: Any) -> Any:
  """What a leaf adds to the total of its group, where the leaf is."""
  first, *others = _wide(how, name, base, models)
  return how.passes[0].measure(first, tuple(others), None)


def far_leaf(
  how: Method,
  name: str,
  base: Any,
  models: Any,
  numbers: Any,
  total: Any,
  dtype: Any = None,
) -> Any:
  """A whole leaf merged where it is; `dtype` is the base's by default."""
  first, *others = _wide(how, name, base, models)
  given, stats = dict(numbers), None
  if how.prepare is not None:
    given = how.prepare(first.size, **given)
  told = {k: v for k, v in given.items() if k != 'seed'}
  for i, one in enumerate(how.passes):
    found = total if i == 0 else None
    if found is None:
      found = one.measure(first, tuple(others), stats)
    stats = one.settle(found, stats, **told)
  index = None
  if how.random:
    index = jax.lax.iota(jnp.uint32, first.size).reshape(first.shape)
  out = method.combine(how, first, others, stats, given, name=name, index=index)
  if how.by_rows:
    out = inputs.stored_again(name, out, base.shape)
  return out.reshape(base.shape).astype(base.dtype if dtype is None else dtype)


def _leaf(
  how: Method, name: str, base: Any, models: Sequence[Any]
) -> blocks.Leaf:
  matrices = [
    inputs.as_matrix(name, np.asarray(x), how.by_rows) for x in (base, *models)
  ]

  def read(start: int, stop: int) -> list[np.ndarray]:
    return [x[start:stop] for x in matrices]

  rows, columns = matrices[0].shape
  return blocks.Leaf(name, rows, columns, read)


def _wide(
  how: Method, name: str, base: Any, models: Sequence[Any]
) -> list[Any]:
  """float32, outputs first where rows count, each a JAX array."""
  return [
    arrays.float32(
      inputs.as_matrix(name, jnp.asarray(x), True)
      if how.by_rows
      else jnp.asarray(x)
    )
    for x in (base, *models)
  ]
