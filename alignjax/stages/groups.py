"""Groups of rows that share one condition, and work done group by group.

Group g is the g-th block of B / G neighbouring rows. A microbatch is rows m::M
and a chunk of a rollout likewise, so as long as G divides their rows the g-th
block of either is rows of group g, however a batch was split. Blocks lie on
few devices of a sharded batch; mapping over them spreads each over all, which
moves ids of tokens and no more.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from alignjax.core import placement
from alignjax.core.errors import UserError
from alignjax.core.types import Batch, Stage


def write(draw: Callable[[Any], Any], groups: int) -> Stage:
  """A stage that writes condition [B, K]: draw(key) [K], once per group.

  The key is that of the step and the group, so that nothing else matters.
  """

  @jax.jit
  def stage(bundle, batch, key):
    del bundle
    rows = _each(len(batch['id']), groups)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(groups))
    condition = jnp.repeat(jax.vmap(draw)(keys), rows, axis=0)
    return batch | {'condition': placement.constrain(condition, placement.ROWS)}

  return stage


def grouped(stage: Stage, groups: int) -> Stage:
  """`stage` on one group after the other, as if each were the batch."""

  @jax.jit
  def mapped(bundle, batch, key):
    return over(lambda part: stage(bundle, part, key), batch, groups)

  return mapped


def over(fn: Callable[[Batch], Any], batch: Batch, groups: int) -> Any:
  """fn(rows of a group) -> pytree of [rows, ...], joined in order of rows.

  The backward pass computes each group again: kept, the mixed weights of all
  of them would take G times the memory of the model.
  """
  rows = _each(len(next(iter(batch.values()))), groups)

  def cut(x):
    x = x.reshape(groups, rows, *x.shape[1:])
    return placement.constrain(x, None, placement.ROWS)

  def join(x):
    return placement.constrain(x.reshape(-1, *x.shape[2:]), placement.ROWS)

  parts = jax.tree.map(cut, batch)
  return jax.tree.map(join, jax.lax.map(jax.checkpoint(fn), parts))


def _each(rows: int, groups: int) -> int:
  if groups < 1 or rows % groups:
    raise UserError(
      f'recipe.groups = {groups} does not divide the {rows} rows of a batch, '
      'a microbatch or a chunk of a rollout'
    )
  return rows // groups
