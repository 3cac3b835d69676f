"""Does this machine compute the same thing twice?

A chip that errs in silence spoils a run long before a loss shows it. Every so
often one microbatch's gradients are computed twice by one program and their
fingerprints compared bit for bit, before the step, so that nothing is saved
after a difference. It finds errors that do not repeat; one that does is found
by `train --replay` on other hardware.
"""

from collections.abc import Callable

import jax

from alignjax.core import tree
from alignjax.core.errors import UserError
from alignjax.core.types import Batch, Recipe, TrainState
from alignjax.system import fingerprint

Check = Callable[[TrainState, Batch], None]


def check(recipe: Recipe, *, seed: int, microbatches: int) -> Check:
  """check(state, staged batch), to be called before a step by all processes.

  The microbatch, of `microbatches`, changes from step to step. Raises UserError
  if the two differ.
  """
  parts = microbatches * recipe.updates

  def loss(params, frozen, rows, key):
    for i, stage in enumerate(recipe.prepare):
      rows = stage(frozen, rows, jax.random.fold_in(key, i))
    terms, _ = recipe.objective({**params, **frozen}, rows, key)
    return sum(coefficient * mean.value for coefficient, mean in terms.values())

  @jax.jit
  def prints(state, batch):
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    rows = jax.tree.map(
      lambda x: x.reshape(-1, parts, *x.shape[1:])[:, state.step % parts],
      batch,
    )
    grads = jax.grad(loss)(state.params, state.frozen, rows, key)
    return {n: fingerprint.words(x) for n, x in tree.named(grads).items()}

  def run(state: TrainState, batch: Batch) -> None:
    first, second = jax.device_get([prints(state, batch) for _ in range(2)])
    differ = [name for name in first if first[name] != second[name]]
    if differ:
      raise UserError(
        f'step {int(state.step) + 1}: the gradients of one microbatch came out '
        f'different the second time, in {len(differ)} of {len(first)} leaves '
        f'(first {differ[0]}): this machine computes wrongly; nothing was '
        'saved since, so the same command on another continues from the last '
        'checkpoint'
      )

  return run
