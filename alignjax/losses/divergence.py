"""Divergences between next-token distributions, in nats.

`p` is the teacher or reference, `q` what is trained; both come as logits, and
log-probabilities are logits too. Every one is exact over the outcomes that it
is given: the whole vocabulary, or the k ids of `sparse`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from alignjax.core.errors import UserError

ABSENT = -1e9  # logit of an outcome without probability; finite, as 0 * inf
NAMES = ('forward', 'reverse', 'jensen_shannon')
_TINY = 1e-30


def kl(
  p_logits: Float[Array, '... V'], q_logits: Float[Array, '... V']
) -> Float[Array, '...']:
  """KL(p || q), exact over the vocabulary, float32."""
  p = jax.nn.log_softmax(p_logits.astype(jnp.float32), axis=-1)
  q = jax.nn.log_softmax(q_logits.astype(jnp.float32), axis=-1)
  return jnp.sum(jnp.exp(p) * (p - q), axis=-1)


def reverse(
  p_logits: Float[Array, '... V'], q_logits: Float[Array, '... V']
) -> Float[Array, '...']:
  """KL(q || p)."""
  return kl(q_logits, p_logits)


def jensen_shannon(
  p_logits: Float[Array, '... V'],
  q_logits: Float[Array, '... V'],
  mix: float = 0.5,
) -> Float[Array, '...']:
  """mix KL(p || m) + (1 - mix) KL(q || m), m = mix p + (1 - mix) q.

  0 < mix < 1. Divided by mix (1 - mix) it tends to the forward KL as mix goes
  to 0 and to the reverse KL as mix goes to 1 (GKD, arXiv 2306.13649, section
  2.1 and equation 1).
  """
  p = jax.nn.log_softmax(p_logits.astype(jnp.float32), axis=-1)
  q = jax.nn.log_softmax(q_logits.astype(jnp.float32), axis=-1)
  m = jnp.logaddexp(p + jnp.log(mix), q + jnp.log1p(-mix))
  to_p = jnp.sum(jnp.exp(p) * (p - m), axis=-1)
  to_q = jnp.sum(jnp.exp(q) * (q - m), axis=-1)
  return mix * to_p + (1 - mix) * to_q


def named(name: str, mix: float) -> Callable[[Array, Array], Array]:
  """The divergence (p_logits, q_logits) -> [...] of a name in `NAMES`.

  Raises UserError for another name, or a `mix` that is no share.
  """
  if name not in NAMES:
    raise UserError(
      f'recipe.divergence: found {name!r}, expected one of {list(NAMES)}'
    )
  if name != 'jensen_shannon':
    return kl if name == 'forward' else reverse
  if not 0 < mix < 1:
    raise UserError(
      f'recipe.mix: found {mix}, expected a number between 0 and 1; its limits '
      "are the divergences 'forward' and 'reverse'"
    )
  return lambda p, q: jensen_shannon(p, q, mix)


def sparse(
  ids: Int[Array, '... k'],
  p_logits: Float[Array, '... k'],
  q_logits: Float[Array, '... V'],
  *,
  restricted: bool,
) -> tuple[Float[Array, '... j'], Float[Array, '... j']]:
  """(p, q) as logits over few outcomes: the k ids, where alone p is not 0.

  `restricted` leaves q nothing but these ids (j = k). Otherwise all other ids
  are one more outcome (j = k + 1), of which p has nothing: forward KL and
  Jensen-Shannon of the lumped are those of the whole, and the reverse KL is
  infinite. A slot with p logit `ABSENT` is no outcome.
  """
  present = p_logits > ABSENT / 2
  q_logits = q_logits.astype(jnp.float32)
  picked = jnp.take_along_axis(q_logits, ids, axis=-1)
  if restricted:
    return p_logits, jnp.where(present, picked, ABSENT)
  total = jax.nn.logsumexp(q_logits, axis=-1, keepdims=True)
  logq = jnp.where(present, picked - total, ABSENT)
  inside = jnp.sum(jnp.exp(logq), axis=-1, keepdims=True)
  # What rounding leaves of 1 - 1 may be negative.
  rest = jnp.log(jnp.maximum(1 - inside, _TINY))
  none = jnp.full_like(rest, ABSENT)
  p_logits = jnp.concatenate([p_logits, none], axis=-1)
  return p_logits, jnp.concatenate([logq, rest], axis=-1)
