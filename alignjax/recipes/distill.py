"""Distillation: the policy imitates a teacher's whole distribution.

The teacher is a frozen role (`start.teacher`) that sees the same sequences; the
loss is the forward KL, KL(teacher || policy), over the full vocabulary at every
position with a loss, mean over those tokens (Hinton et al., arXiv 1503.02531,
section 2, at temperature 1). Both heads are applied chunk by chunk, so that
neither model's logits of a whole batch ever exist.
"""

import jax
import jax.numpy as jnp

from alignjax.core.types import Mean, Model, Recipe
from alignjax.losses.divergence import kl
from alignjax.losses.logprob import gather_logp, over_tokens, targets


def distill(model: Model) -> Recipe:
  """Minimises KL(teacher || policy) per token on given sequences."""
  policy, teacher = model.policy('policy'), model.policy('teacher')

  def objective(bundle, batch, key):
    del key

    def read(part):
      weights = part.view(bundle, batch)
      return weights, part.features(weights, batch)[0]

    parts = [
      (policy, *read(policy)),
      (teacher, *jax.lax.stop_gradient(read(teacher))),
    ]
    tokens, mask = targets(batch)

    def scores(own, given, tokens):
      same = jnp.argmax(own, axis=-1) == jnp.argmax(given, axis=-1)
      return kl(given, own), gather_logp(own, tokens), same

    divergence, logp, same = over_tokens(scores, parts, tokens)
    loss = Mean.of(divergence, mask)
    return {'kl': (1.0, loss)}, {
      'nll': Mean.of(-logp, mask),
      'agreement': Mean.of(same, mask),
    }

  return Recipe(
    objective=objective,
    init={'policy': model.init, 'teacher': model.init},
    follow={'teacher': None},
  )
