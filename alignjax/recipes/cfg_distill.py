"""Diversity-rewarded distillation of guidance into weights (arXiv 2410.06084).

The teacher is the policy's start under classifier-free guidance, scale
l(. | prompt) + (1 - scale) l(. | uncond) (equation 1), frozen, on the negative
prompts that the source gives as `uncond`. The policy answers without guidance
and pays, at every token of its answers, the reverse KL to the teacher over the
whole vocabulary, summed over the L tokens of an answer (equation 2): a sum, so
that `diversity_coef` weighs nats per answer against r_D per pair of answers.
With `diversity_coef` answers to one prompt are rewarded for their distance
1 - cos to one another under a frozen role `embedding` (equations 3 to 5), by
REINFORCE with the factor 2 of equation 5. Runs with 0 and with a large
coefficient, from one start, are then interpolated by `alignjax merge lerp`.

As in GKD nothing flows through the drawing of prefixes, which drops what an
early token does to later KLs; `grad_through_sampling` adds that term,
sum_n log pi(y_n) sum_{m > n} KL_m, and the gradient is that of equation 2.

Deviations from the paper: it does not give the baseline; here it is the mean
distance among the prompt's other answers, and for two answers that of the
batch's other prompts. Where answers are drawn at a `temperature` or truncated,
equations 2 and 4 are expectations over answers drawn so, and equation 5 (and
`grad_through_sampling`) uses the log-probability that they are drawn with. The
KL of a token stays that of whole distributions at temperature 1: over what
truncation keeps alone, a token that fell out could not come back, however
likely it is under the teacher. The embedding is of text.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from alignjax.core.types import Mean, Model, Peak, Recipe
from alignjax.losses import divergence as divergences
from alignjax.losses import teacher as teachers
from alignjax.losses.logprob import entropy, gather_logp, over_tokens
from alignjax.losses.policy_gradient import leave_pairs_out, reinforce
from alignjax.policies.combine import sampled, under_guidance
from alignjax.rewards.diversity import diversity
from alignjax.stages import arrange
from alignjax.stages.rollout import rollout
from alignjax.stages.score import score


def cfg_distill(
  model: Model,
  embedding: Model,
  *,
  guidance_scale: float = 3.0,
  diversity_coef: float = 0.0,
  grad_through_sampling: bool = False,
  response_count: int = 2,
  max_new_tokens: int = 64,
  temperature: float = 1.0,
  top_k: int = 0,
  top_p: float = 1.0,
) -> Recipe:
  """Equations 1 to 5; the paper's diversity_coef are 0, 5, 10 and 15.

  Without one there is no role `embedding`. Raises UserError for numbers out of
  range, and where the source gives no `uncond`.
  """
  arrange.check_numbers(
    guidance_scale=(guidance_scale, -math.inf, math.inf),
    diversity_coef=(diversity_coef, 0, math.inf),
    response_count=(response_count, 2 if diversity_coef else 1, math.inf),
  )
  drawn_from = sampled(
    model.policy('policy'), temperature=temperature, top_k=top_k, top_p=top_p
  )
  draw = rollout(
    [(drawn_from, response_count)],
    max_new_tokens=max_new_tokens,
    stop=model.stop,
    pad=model.pad,
  )
  later = _later if grad_through_sampling else jnp.zeros_like

  def drawn_logp(logits, tokens):
    return gather_logp(drawn_from.limit(logits / temperature, tokens), tokens)

  quality = _quality(model, guidance_scale, drawn_logp, later)

  def plain(bundle, batch, key):
    del key
    return quality(bundle, batch)[:2]

  def diverse(bundle, batch, key):
    del key
    loss, metrics, logp = quality(bundle, batch)
    gain = reinforce(logp, batch['advantage'])
    weight = batch['weight']
    # Equation 5: both answers of a pair are the policy's.
    term = (2 * diversity_coef, Mean.of(gain, weight))
    return loss | {'diversity': term}, {
      **metrics,
      'diversity': Mean.of(batch['reward'], weight),
    }

  @jax.jit
  def compare(bundle, batch, key):
    del bundle, key
    baseline = leave_pairs_out(batch['reward'], batch['weight'], batch['id'])
    advantage = (batch['reward'] - baseline)[..., None]
    return batch | {'advantage': advantage * batch['mask']}

  kept = {'teacher': model.init}
  if not diversity_coef:
    return Recipe(
      objective=plain,
      init={'policy': model.init} | kept,
      follow={role: None for role in kept},
      stages=(draw,),
    )
  kept |= {'embedding': embedding.embed_init}
  distance = diversity(embedding)
  return Recipe(
    objective=diverse,
    init={'policy': model.init} | kept,
    follow={role: None for role in kept},
    stages=(draw, score(distance), compare),
  )


def _quality(
  model: Model,
  guidance_scale: float,
  drawn_logp: Callable[[Any, Any], Any],
  later: Callable[[Any], Any],
):
  """(bundle, batch) -> (loss of equation 2, metrics, log p of the tokens).

  `drawn_logp` is (logits, tokens) -> log p under what answers are drawn from.
  """
  policy = model.policy('policy')
  teacher = under_guidance(model, 'teacher', guidance_scale)

  def quality(bundle, batch):
    weights = policy.view(bundle, batch)
    own_part = (policy, weights, policy.features(weights, batch)[0])
    given_part = teachers.online(
      teacher, bundle, batch, kind='full', k=1, draw_seed=0
    )

    def scores(own, given, tokens):
      return {
        'kl': divergences.reverse(given.logits, own),
        'entropy': entropy(own),
        'logp': drawn_logp(own, tokens),
      }

    mask, weight = batch['mask'], batch['weight']
    found = over_tokens(scores, [own_part, given_part], batch['response'])
    found = {name: jnp.where(mask, x, 0.0) for name, x in found.items()}
    seq_kl = jnp.sum(found['kl'], axis=-1)
    through = -reinforce(found['logp'], later(found['kl']))
    gap = jnp.abs(found['logp'] - batch['sample_logp'])
    metrics = {
      'kl': Mean.of(seq_kl, weight),
      'entropy': Mean.of(found['entropy'], mask * weight[..., None]),
      'length': Mean.of(jnp.sum(mask, axis=-1), weight),
      'logprob_gap': Peak(jnp.max(jnp.where(mask, gap, 0.0))),
    }
    loss = {'distillation': (1.0, Mean.of(seq_kl + through, weight))}
    return loss, jax.lax.stop_gradient(metrics), found['logp']

  return quality


def _later(x):
  """Sum of what follows each position, [..., R]."""
  upto = jnp.cumsum(x[..., ::-1], axis=-1)[..., ::-1]
  return upto - x
