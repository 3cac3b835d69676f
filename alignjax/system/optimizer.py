"""Optimizers from numbers: name, schedule, clipping, decay, a leaf table.

The table maps canonical leaf names (`policy/layer_7/attn/q`) to learning-rate
multipliers; the first match wins, 0 freezes a leaf, and a wholly frozen leaf
keeps no moments. Within a stack of layers a rule may give every layer another
number.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import optax

from alignjax.core import naming, tree
from alignjax.core.errors import UserError

SCHEDULES = ('constant', 'linear', 'cosine')
ALGORITHMS = ('adam', 'sgd')


def optimizer(
  steps: int,
  *,
  algorithm: str = 'adam',
  lr: float = 1e-3,
  schedule: str = 'constant',
  warmup_steps: int = 0,
  final_lr: float = 0.0,
  clip_norm: float = 1.0,
  weight_decay: float = 0.0,
  b1: float = 0.9,
  b2: float = 0.95,
  epsilon: float = 1e-8,
  table: Sequence[tuple[str, float]] = (('.*', 1.0),),
) -> optax.GradientTransformation:
  """The optimizer of a run of `steps` updates.

  Args:
    steps: length of the schedule, warm-up included.
    algorithm: 'adam' (decoupled weight decay, so AdamW) or 'sgd' (momentum b1).
    lr: peak learning rate.
    schedule: after a linear warm-up: 'constant', or 'linear' or 'cosine' down
      to `final_lr`.
    clip_norm: bound on the global gradient norm; 0 = none.
    weight_decay: on matrices, not on norm scales.
    table: (regex, multiplier) over canonical leaf names.
  """
  rate = _schedule(steps, schedule, lr, warmup_steps, final_lr)
  if algorithm == 'adam':
    core = optax.scale_by_adam(b1=b1, b2=b2, eps=epsilon)
  elif algorithm == 'sgd':
    core = optax.trace(b1) if b1 else optax.identity()
  else:
    raise UserError(
      f'optimizer.algorithm: found {algorithm!r}, expected one of '
      f'{list(ALGORITHMS)}'
    )
  parts = [core, optax.scale_by_learning_rate(rate)]
  if weight_decay:
    decay = optax.add_decayed_weights(weight_decay, mask=_matrices)
    parts.insert(1, decay)
  if clip_norm:
    parts.insert(0, optax.clip_by_global_norm(clip_norm))
  trained = optax.chain(*parts, _scale_by_table(table))

  def labels(params):
    return jax.tree.map(
      lambda m: 'trained' if np.any(m) else 'frozen', multipliers(params, table)
    )

  return optax.partition(
    {'trained': trained, 'frozen': optax.set_to_zero()}, labels
  )


def multipliers(params: Any, table: Sequence[tuple[str, float]]) -> Any:
  """Per leaf a number, or for a stack whose layers differ, [G, 1, ...]."""
  canonical = tree.canonical_names(params)

  def leaf(name, x):
    rules = [
      naming.lookup(table, layer, 'optimizer.table')
      for layer in canonical[name]
    ]
    if len(set(rules)) == 1:
      return np.float32(rules[0])
    return np.asarray(rules, np.float32).reshape(-1, *[1] * (x.ndim - 1))

  return tree.map_named(leaf, params)


def _scale_by_table(table) -> optax.GradientTransformation:
  def update(updates, state, params=None):
    del params
    scales = multipliers(updates, table)
    return jax.tree.map(lambda u, m: u * m, updates, scales), state

  return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _matrices(params):
  return tree.map_named(lambda name, x: not name.endswith('norm'), params)


def _schedule(steps, schedule, lr, warmup_steps, final_lr):
  after = max(steps - warmup_steps, 1)
  if schedule == 'constant':
    main = optax.constant_schedule(lr)
  elif schedule == 'linear':
    main = optax.linear_schedule(lr, final_lr, after)
  elif schedule == 'cosine':
    main = optax.cosine_decay_schedule(lr, after, alpha=final_lr / lr)
  else:
    raise UserError(
      f'optimizer.schedule: found {schedule!r}, expected one of '
      f'{list(SCHEDULES)}'
    )
  if not warmup_steps:
    return main
  # Counted from 1: a first step at rate 0 would do nothing.
  warm = optax.linear_schedule(lr / warmup_steps, lr, warmup_steps - 1)
  return optax.join_schedules([warm, main], [warmup_steps])
