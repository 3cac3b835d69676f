"""A bandit through the real recipe: fixtures, stages and natural gradients.

F1 of the method specifications: five arms with strictly increasing rewards.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy.special import lambertw

from alignjax import train
from alignjax.models.tabular import tabular
from alignjax.step import init_state, make_step

REF = np.array([0.10, 0.20, 0.30, 0.25, 0.15])
REWARD = np.array([0.0, 1.0, 2.0, 3.0, 4.0])


# Other numbers: arms that are not sorted, rewards that are not a ladder.
OTHER_REF = np.array([0.4, 0.05, 0.3, 0.25])
OTHER_REWARD = np.array([0.3, 9.0, -2.0, 0.7])


def quantiles(p, rewards=REWARD):
  """(p_<, p_<=) of every arm."""
  below = np.array([p[rewards < r].sum() for r in rewards])
  return below, np.array([p[rewards <= r].sum() for r in rewards])


def best_of(p, n, rewards=REWARD):
  """Distribution of the best of n draws; a draw among ties is uniform."""
  below, upto = quantiles(p, rewards)
  return p * (upto**n - below**n) / (upto - below)


def mixed(pull, *, backward, forward):
  """argmin of a mean of two KLs, per arm by Lambert W, in float64.

  Arms p solve backward log p - forward / p = lam + pull, where `pull` is the
  weighted sum of the logs of what backward KLs go to, `backward` the sum of
  their weights, and `forward` the weighted target of the forward KL.
  """

  def policy(lam):
    s = lam + pull
    if np.all(forward == 0):
      return np.exp(s / backward)
    x = np.log(forward / backward) - s / backward
    return forward / (backward * lambertw(np.exp(x)).real)

  low, high = -60.0, 60.0
  for _ in range(200):
    middle = (low + high) / 2
    low, high = (middle, high) if policy(middle).sum() < 1 else (low, middle)
  return policy(low)


def model(p=REF):
  return tabular(np.log(p)[None])


def reward(rewards=REWARD):
  table = jnp.asarray(rewards, jnp.float32)

  def fn(bundle, batch, key):
    return table[batch['response'][..., :1]]

  return fn


def prompts(rows):
  return {
    'id': jnp.arange(rows, dtype=jnp.int32),
    'prompt': jnp.zeros((rows, 1), jnp.int32),
  }


def natural_gradient(lr, weight=None):
  """Gradient over probability: the Fisher inverse of a softmax table.

  A step of 1 / strength lands on the optimum of E[r] - strength KL at once.
  """

  def update(updates, state, params):
    step = lr(state) if callable(lr) else lr

    def leaf(g, z):
      return -step * g / jax.nn.softmax(z, axis=-1)

    return jax.tree.map(leaf, updates, params), state + 1

  return optax.GradientTransformation(
    lambda params: jnp.zeros((), jnp.int32), update
  )


def run(
  recipe,
  tx,
  *,
  rows,
  steps,
  seed=0,
  microbatches=1,
  watch=None,
  fields=None,
):
  """The loop without its files: final policy probabilities and state.

  `fields` are further fields of every prompt, without the axis B.
  """
  fields = fields or {}
  state = init_state(recipe, tx, seed)
  step = jax.jit(make_step(recipe, tx, seed=seed, microbatches=microbatches))

  @jax.jit
  def whole(state, k):
    batch = prompts(rows)
    for name, x in fields.items():
      batch[name] = jnp.broadcast_to(x, (rows, *np.shape(x)))
    batch['id'] = batch['id'] + k * rows
    batch = train.stage_batch(recipe, state, batch, seed)
    return step(state, batch)

  for k in range(steps):
    state, metrics = whole(state, k)
    if watch is not None:
      watch(state, metrics)
  return probabilities(state.params['policy']), state


def probabilities(params):
  z = np.asarray(params['logits'][0], np.float64)
  return np.exp(z - z.max()) / np.exp(z - z.max()).sum()
