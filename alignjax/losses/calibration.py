"""Where a reward stands among reference rewards: quantiles, best-of-n."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from alignjax.core import lookup
from alignjax.core.errors import UserError

TRANSFORMS = ('identity', 'log', 'exp')


def quantile(
  reward: Float[Array, '... N'],
  reference: Float[Array, '... k'],
  weight: Float[Array, '... k'] | None = None,
) -> tuple[Float[Array, '... N'], Float[Array, '... N']]:
  """(p_<, p_<=): mass of the reference strictly below, and not above.

  `weight` are the reference's (unnormalised) probabilities; default uniform.
  BOND (arXiv 2407.14622, section 3.1).
  """
  if weight is None:
    weight = jnp.ones_like(reference)
  weight = weight / jnp.sum(weight, axis=-1, keepdims=True)
  r, ref = reward[..., :, None], reference[..., None, :]
  below = jnp.sum(weight[..., None, :] * (ref < r), axis=-1)
  upto = jnp.sum(weight[..., None, :] * (ref <= r), axis=-1)
  return below, upto


def calibrated(
  reward: Float[Array, '... N'],
  reference: Float[Array, '... k'],
  weight: Float[Array, '... k'] | None = None,
) -> Float[Array, '... N']:
  """C: the chance to beat a reference response, a tie counting half.

  In [0, 1] with mean 1/2 under the reference, and the same for every strictly
  increasing function of the reward. InfAlign (arXiv 2412.19792, section 4.1).
  """
  below, upto = quantile(reward, reference, weight)
  return (below + upto) / 2


def transform(
  name: str, scale: float, floor: float
) -> Callable[[Float[Array, '...']], Float[Array, '...']]:
  """An increasing function of a calibrated reward u in [0, 1].

  Args:
    name: 'identity'; 'log', of u or `floor`, which distils best-of-n; 'exp',
      (exp(scale u) - 1) / (exp(scale) - 1), which maps [0, 1] onto itself: a
      positive scale is for best-of-n, a negative one for worst-of-n, 0 is
      identity; or the dotted name of a function of the user's.
    scale: of 'exp'.
    floor: of 'log': the least that the reference draws resolve.

  Raises UserError for a name that there is not. InfAlign, section 4.2.
  """
  if '.' in name:
    return lookup.find('losses', name)
  if name not in TRANSFORMS:
    raise UserError(
      f'transform: found {name!r}{lookup.nearest(name, TRANSFORMS)}; '
      f'expected one of {list(TRANSFORMS)} or module.function'
    )
  if name == 'log':
    return lambda u: jnp.log(jnp.maximum(u, floor))
  if name == 'identity' or scale == 0:
    return lambda u: u
  return lambda u: jnp.expm1(scale * u) / math.expm1(scale)


def best_of_n_chance(count: int, n: int) -> np.ndarray:
  """P(rank i of `count` draws, ascending, is the best of n of them), [count].

  A mean under it is the unbiased estimate over all subsets; reversed, it is
  that of the worst of n. Zeros where n exceeds count.
  """
  chance = [math.comb(i, n - 1) for i in range(count)]
  return np.array(chance, np.float64) / max(math.comb(count, n), 1)


def best_of_n_kl(n: float) -> float:
  """log n - (n - 1) / n: KL of best-of-n to its base, without ties."""
  return math.log(n) - (n - 1) / n


def quantile_nll(
  logit: Float[Array, '...'], upto: Float[Array, '...']
) -> Float[Array, '...']:
  """Cross-entropy of sigmoid(logit) against p_<=; least where they are equal.

  `upto` is 0 or 1 for one reference draw, a share of several. BOND (arXiv
  2407.14622, section 3.1).
  """
  return jax.nn.softplus(logit) - upto * logit
