"""Supervised fine-tuning, and pretraining: next-token cross-entropy.

The mean is over tokens of the whole batch whose `loss_mask` is set, so chat
data with the loss on model turns and plain text are the same recipe.
"""

import jax.numpy as jnp

from alignjax.core.types import Mean, Model, Recipe
from alignjax.losses.logprob import gather_logp, over_tokens, targets


def sft(model: Model) -> Recipe:
  """Maximises log p(token | prefix) on sequences."""
  policy = model.policy('policy')

  def objective(bundle, batch, key):
    del key
    weights = policy.view(bundle, batch)
    features, _ = policy.features(weights, batch)
    tokens, mask = targets(batch)

    def scores(logits, tokens):
      picked = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
      return gather_logp(logits, tokens), picked >= jnp.max(logits, axis=-1)

    logp, hit = over_tokens(scores, [(policy, weights, features)], tokens)
    nll = Mean.of(-logp, mask)
    return {'nll': (1.0, nll)}, {'nll': nll, 'accuracy': Mean.of(hit, mask)}

  return Recipe(objective=objective, init={'policy': model.init})
