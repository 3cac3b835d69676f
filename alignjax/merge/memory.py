"""Merges trees of arrays in memory, also under jit; no files here.

The streaming driver does the same leaf by leaf, through the same functions.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from alignjax.core import tree
from alignjax.core.types import Params, UserError
from alignjax.merge import methods


def merge(
  method: str,
  *,
  base: Params,
  models: Sequence[Params],
  group: str = 'layer',
  **numbers: Any,
) -> Params:
  """The merge of canonical trees, in the structure and dtypes of `base`.

  Args:
    method: linear (or lerp), slerp, liti.
    base: the init of the task vectors.
    models: trees of the same names and shapes.
    group: what shares an angle: layer, tensor or all.
    **numbers: t, weights, liti_rate: see the method.

  Raises UserError for names, shapes or numbers that do not fit, and for
  opposite task vectors; under jit, where values are unknown, those give NaN.
  """
  how = methods.method(method)
  methods.check_numbers(how, numbers, len(models))
  bases = tree.named(base)
  others = [tree.named(model) for model in models]
  check_same('base', bases, {f'model {i}': o for i, o in enumerate(others)})
  if any(name.startswith('groups/') for name in bases):
    raise UserError('merge takes canonical trees: call tree.unstack first')
  leaves = {name: tuple(o[name] for o in others) for name in bases}
  stats = {}
  if how.stats is not None:
    for name in sorted(filter(lambda n: is_float(bases[n]), bases)):
      part = methods.leaf_stats(how, bases[name], leaves[name])
      key = methods.group_of(name, group)
      stats[key] = stats[key] + part if key in stats else part
    for key, total in stats.items():
      if not isinstance(total, Tracer):
        methods.check_stats(how, key, total)

  def leaf(name, x):
    if not is_float(x):
      return same_integers(name, x, leaves[name])
    group_stats = stats.get(methods.group_of(name, group))
    return methods.combine(how, x, leaves[name], group_stats, numbers)

  return tree.map_named(leaf, base)


def is_float(leaf: Any) -> bool:
  return jnp.issubdtype(leaf.dtype, jnp.floating)


def same_integers(name: str, base: Any, leaves: Sequence[Any]) -> Any:
  """`base`, if the models agree with it: other numbers have no mean."""
  traced = any(isinstance(x, Tracer) for x in (base, *leaves))
  if not traced and not all(np.array_equal(base, x) for x in leaves):
    raise UserError(f'leaf {name!r} is {base.dtype} and differs between models')
  return base


def check_same(
  first: str, base: dict[str, Any], models: dict[str, dict[str, Any]]
) -> None:
  """Raises one UserError with every leaf whose name or shape differs.

  `base` and `models` map leaf names to anything with a shape; the keys of
  `models` and `first` name them in the message.
  """
  wrong = []
  for where, leaves in models.items():
    for name in sorted(base.keys() | leaves.keys()):
      if name not in leaves:
        wrong.append(f'{name} is missing in {where}')
      elif name not in base:
        wrong.append(f'{name} of {where} is missing in {first}')
      elif leaves[name].shape != base[name].shape:
        wrong.append(
          f'{name} is {list(base[name].shape)} in {first} and'
          f' {list(leaves[name].shape)} in {where}'
        )
  if wrong:
    raise UserError(
      f'merge of models with different shapes: {"; ".join(wrong)}'
    )
