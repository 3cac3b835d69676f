"""What one step computes: the state before the first, and the update.

Pure functions of (recipe, optimizer, state, batch). Microbatch gradients are
weighted exactly, the optimizer moves trained roles, followers follow. Loop,
files and signals are `alignjax.train`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from alignjax.core import tree
from alignjax.core.errors import UserError
from alignjax.core.types import (
  Batch,
  Mean,
  Metrics,
  Params,
  Peak,
  Recipe,
  TrainState,
)
from alignjax.system import mesh as meshes

HEADS = ('scalar_head', 'embedding_head')


def init_state(
  recipe: Recipe,
  tx: optax.GradientTransformation,
  seed: int,
  *,
  start: Mapping[str, Params | str] | None = None,
  mesh: Mesh | None = None,
  table: meshes.Table = meshes.REPLICATED,
  abstract: bool = False,
) -> TrainState:
  """The state before the first step.

  Args:
    recipe: its `init` gives every role that `start` does not.
    tx: the optimizer.
    seed: parameters are drawn from it, per role.
    start: role -> parameters, or '@role' for a copy of another role.
      Followers default to their leader. A role with a head of its own may
      start from weights without one: its head is drawn, and so has to be
      trained.
    mesh, table: where leaves live; initialisation runs sharded.
    abstract: with a mesh: shapes and places only, nothing is allocated.
  """
  start = dict(start or {})
  for role, follow in recipe.follow.items():
    if follow is not None:
      start.setdefault(role, f'@{follow.leader}')
  check_start(recipe, start)
  given = {k: v for k, v in start.items() if not isinstance(v, str)}

  def build(given):
    key = jax.random.key(seed)
    bundle = {}
    for i, (role, init) in enumerate(sorted(recipe.init.items())):
      if role in given:
        bundle[role] = given[role]
      elif role not in start:
        bundle[role] = init(jax.random.fold_in(key, i))
    for role, origin in start.items():
      if isinstance(origin, str):
        bundle[role] = bundle[origin[1:]]
      bundle[role] = _with_head(bundle[role], recipe.init[role], key)
    # Last, so that '@policy' is a copy of the plain model.
    for role, mixed in recipe.mixed.items():
      bundle[role] = mixed.make(bundle[role])
    params = {k: v for k, v in bundle.items() if k not in recipe.follow}
    params = tree.cast(params, jnp.float32)  # master weights
    # A follower in bfloat16 would never move; a fixed role may stay as it is.
    frozen = {
      k: bundle[k] if follow is None else tree.cast(bundle[k], jnp.float32)
      for k, follow in recipe.follow.items()
    }
    return TrainState(
      step=jnp.zeros((), jnp.int32),
      params=params,
      frozen=frozen,
      opt_state=tx.init(params),
      skipped=jnp.zeros((), jnp.int32),
    )

  if mesh is None:
    return jax.jit(build)(given)
  shapes = jax.eval_shape(build, given)
  places = meshes.shardings(shapes, table, mesh)
  if abstract:
    return jax.tree.map(
      lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
      shapes,
      places,
    )
  # Each chip gets its part of what the host holds, never the whole.
  given = meshes.put(given, meshes.shardings(given, table, mesh))
  with meshes.current(mesh):
    return jax.jit(build, out_shardings=places)(given)


def own_head(init: Callable) -> dict[str, Any]:
  """{'scalar_head' or 'embedding_head': its shape}; {} for a plain net."""
  shapes = jax.eval_shape(init, jax.random.key(0))
  return {name: shapes[name] for name in HEADS if name in shapes}


def _with_head(params: Params, init: Callable, key) -> Params:
  for head in own_head(init):
    if head not in params:
      params = params | {head: init(key)[head]}
  return params


def headless(recipe: Recipe, start: Mapping[str, Any]) -> dict[str, str]:
  """Fixed roles whose head nobody gives -> its name.

  It would stay as it is drawn: 0 for a scalar, so that all numbers are alike.
  """
  out = {}
  for role, origin in start.items():
    if role not in recipe.follow or recipe.follow[role] is not None:
      continue
    for head in own_head(recipe.init[role]):
      copied = isinstance(origin, str)
      if head not in (own_head(recipe.init[origin[1:]]) if copied else origin):
        out[role] = head
  return out


def check_start(recipe: Recipe, start: Mapping[str, Any]) -> None:
  """UserError unless `start` of `init_state` makes sense."""
  roles = sorted(recipe.init)
  for role, origin in start.items():
    if role not in roles:
      raise UserError(f'start: no role {role!r}; the recipe has {roles}')
    if isinstance(origin, str) and (
      origin[1:] not in roles or isinstance(start.get(origin[1:]), str)
    ):
      raise UserError(
        f'start.{role}: {origin!r} is no role with weights of its own; '
        f'the recipe has {roles}'
      )
  for role, head in headless(recipe, start).items():
    raise UserError(
      f'start.{role}: its weights have no {head}, and the recipe never trains '
      'this role; expected those of a net that has one'
    )


def make_step(
  recipe: Recipe,
  tx: optax.GradientTransformation,
  *,
  seed: int = 0,
  microbatches: int = 1,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
  """step(state, staged batch) -> (state, metrics); pure, to be jitted.

  Every term of the loss is a mean over the whole minibatch, however many
  microbatches it is computed in: weights are summed first.
  """

  def evaluate(params, frozen, rows, key):
    for i, stage in enumerate(recipe.prepare):
      rows = stage(frozen, rows, jax.random.fold_in(key, i))
    return recipe.objective({**params, **frozen}, rows, key)

  def loss_of(params, frozen, rows, key, weights):
    loss, metrics = evaluate(params, frozen, rows, key)
    total = sum(
      coefficient * mean.total / jnp.maximum(weights[term], 1e-30)
      for term, (coefficient, mean) in loss.items()
    )
    terms = {f'loss/{term}': mean for term, (_, mean) in loss.items()}
    return total, {**terms, **metrics}

  def weights_of(params, frozen, rows, key):
    loss, _ = evaluate(params, frozen, rows, key)
    return {term: mean.weight for term, (_, mean) in loss.items()}

  def gradients(state, rows, key):
    # Microbatch m is rows m::M; a contiguous split would move sharded data.
    parts = jax.tree.map(
      lambda x: x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1), rows
    )
    first = jax.tree.map(lambda x: x[0], parts)

    def weigh(total, part):
      weights = weights_of(state.params, state.frozen, part, key)
      return jax.tree.map(jnp.add, total, weights), None

    zero = jax.tree.map(
      lambda x: jnp.zeros(x.shape, x.dtype),
      jax.eval_shape(weights_of, state.params, state.frozen, first, key),
    )
    weights, _ = jax.lax.scan(weigh, zero, parts)
    grad = jax.grad(loss_of, has_aux=True)

    def accumulate(total, part):
      grads, metrics = grad(state.params, state.frozen, part, key, weights)
      return jax.tree.map(jnp.add, total, grads), metrics

    total = jax.tree.map(jnp.zeros_like, state.params)
    grads, metrics = jax.lax.scan(accumulate, total, parts)
    return grads, _fold(metrics)

  def update(state, minibatch):
    rows, key = minibatch
    grads, metrics = gradients(state, rows, key)
    norm = tree.norm(grads)
    losses = [m.value for name, m in metrics.items() if name[:5] == 'loss/']
    ok = jnp.all(jnp.isfinite(jnp.stack([norm, *losses])))
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    params, opt_state = jax.tree.map(
      lambda new, old: jnp.where(ok, new, old),
      (params, opt_state),
      (state.params, state.opt_state),
    )
    state = state.replace(
      params=params,
      opt_state=opt_state,
      skipped=jnp.where(ok, 0, state.skipped + 1),
    )
    return state, {
      **metrics,
      'grad_norm': Mean.of(jnp.where(ok, norm, 0), ok),
      'skipped': Peak(state.skipped),
    }

  def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    key = jax.random.fold_in(key, len(recipe.stages))
    if recipe.updates == 1:
      state, metrics = update(state, (batch, key))
    else:
      _check_updates(recipe.updates, len(batch['id']), microbatches)
      order = jax.random.permutation(key, batch['id'].shape[0])
      minibatches = jax.tree.map(
        lambda x: x[order].reshape(recipe.updates, -1, *x.shape[1:]), batch
      )
      keys = jax.random.split(key, recipe.updates)
      state, metrics = jax.lax.scan(update, state, (minibatches, keys))
      metrics = _fold(metrics)
    state = state.replace(step=state.step + 1)
    frozen = dict(state.frozen)
    for role, follow in recipe.follow.items():
      if follow is not None:
        leader = state.params[follow.leader]
        frozen[role] = follow.fn(state.step, leader, frozen[role])
    return state.replace(frozen=frozen), metrics

  return step


def _check_updates(updates: int, rows: int, microbatches: int) -> None:
  if rows % (updates * microbatches):
    raise UserError(
      f'a staged batch of {rows} rows does not split into recipe.updates = '
      f'{updates} minibatches of microbatches = {microbatches} parts'
    )


def _fold(metrics: Metrics) -> Metrics:
  return {name: metric.fold() for name, metric in metrics.items()}
