"""GKD: distillation on what the student itself writes (arXiv 2306.13649).

The policy answers prompts, and at every token of its answers the loss is a
divergence to a frozen teacher's distribution over the whole vocabulary: forward
KL, reverse KL, or the generalised Jensen-Shannon divergence that lies between
them (equation 1). It is averaged over the tokens of an answer, then over
answers (equation 2, algorithm 1). Nothing flows back through the drawing. A
share 1 - `on_policy` of the rows keeps the answer that the source gives.

Deviations from the paper: its algorithm tosses one coin per batch for whether
answers are drawn, here each row has its own. Answers may be drawn at a
`temperature` and truncated; the divergence stays that of whole distributions at
temperature 1.
"""

import jax
import jax.numpy as jnp

from alignjax.core.errors import UserError
from alignjax.core.types import (
  Mean,
  Model,
  Peak,
  Recipe,
)
from alignjax.losses import divergence as divergences
from alignjax.losses import teacher as teachers
from alignjax.losses.logprob import entropy, gather_logp, over_tokens
from alignjax.policies.combine import sampled
from alignjax.stages.rollout import given_or_drawn, rollout


def gkd(
  model: Model,
  teacher: Model,
  *,
  divergence: str = 'jensen_shannon',
  mix: float = 0.5,
  on_policy: float = 1.0,
  max_new_tokens: int = 64,
  temperature: float = 1.0,
  top_k: int = 0,
  top_p: float = 1.0,
) -> Recipe:
  """Algorithm 1. `mix` is the teacher's weight in the Jensen-Shannon mean."""
  compare = divergences.named(divergence, mix)
  if not 0 <= on_policy <= 1:
    raise UserError(
      f'recipe.on_policy: found {on_policy}, expected a share from 0 to 1'
    )
  policy, frozen = model.policy('policy'), teacher.policy('teacher')
  drawn_from = sampled(
    policy, temperature=temperature, top_k=top_k, top_p=top_p
  )
  draw = rollout(
    [(drawn_from, 1)],
    max_new_tokens=max_new_tokens,
    stop=model.stop,
    pad=model.pad,
  )

  def objective(bundle, batch, key):
    del key
    weights = policy.view(bundle, batch)
    own_part = (policy, weights, policy.features(weights, batch)[0])
    given_part = teachers.online(
      frozen, bundle, batch, kind='full', k=1, draw_seed=0
    )

    def scores(own, given, tokens):
      p, q = teachers.outcomes(given, own, normaliser='full')
      return {
        'loss': compare(p, q),
        'forward': divergences.kl(p, q),
        'reverse': divergences.reverse(p, q),
        'entropy': entropy(own),
        'logp': gather_logp(
          drawn_from.limit(own / temperature, tokens), tokens
        ),
      }

    mask, weight = batch['mask'], batch['weight']
    found = over_tokens(scores, [own_part, given_part], batch['response'])
    length = jnp.maximum(jnp.sum(mask, axis=-1), 1)
    per_response = jnp.sum(jnp.where(mask, found['loss'], 0), axis=-1) / length
    # A response that the source gave has no sampler to agree with.
    drawn = mask & jnp.any(batch['sample_logp'] != 0, axis=-1, keepdims=True)
    gap = jnp.abs(found['logp'] - batch['sample_logp'])
    per_token = mask * weight[..., None]
    metrics = {
      **{
        name: Mean.of(found[name], per_token)
        for name in ('forward', 'reverse', 'entropy')
      },
      'length': Mean.of(jnp.sum(mask, axis=-1), weight),
      'drawn': Mean.of(jnp.any(drawn, axis=-1), weight),
      'logprob_gap': Peak(jnp.max(jnp.where(drawn, gap, 0.0))),
    }
    loss = {divergence: (1.0, Mean.of(per_response, weight))}
    return loss, jax.lax.stop_gradient(metrics)

  return Recipe(
    objective=objective,
    init={'policy': model.init, 'teacher': teacher.init},
    follow={'teacher': None},
    stages=(given_or_drawn(draw, share=on_policy),),
  )
