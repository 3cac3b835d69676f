"""Distillation: the policy imitates a teacher's distribution (Gemma 2, 3).

At every position of given text the loss is the divergence between the teacher,
a frozen role of any size and family with the same tokenizer, and the policy;
forward KL, KL(teacher || policy), unless told otherwise, at temperature 1, mean
over tokens with a loss (Gemma 2, arXiv 2408.00118, section 3; Gemma 3, arXiv
2503.19786, section 2.2). `targets` says how much of the teacher is used and
`losses/teacher.py` with which bias; `recorded` reads what `alignjax teach` has
written, in place of a teacher in the step. Both heads are applied chunk by
chunk, so that neither model's logits of a whole batch ever exist.

Deviations from the papers: the loss is the KL, not the cross-entropy, which
differs by the target's entropy and has the same gradient. Gemma 3 leaves open
whether ids are drawn with replacement, the values of the target and the
policy's normaliser: all of them are choices here.
"""

from collections.abc import Callable

import jax.numpy as jnp

from alignjax.core.errors import UserError
from alignjax.core.types import (
  Batch,
  Bundle,
  Mean,
  Model,
  Recipe,
)
from alignjax.losses import divergence as divergences
from alignjax.losses import teacher as teachers
from alignjax.losses.logprob import gather_logp, over_tokens
from alignjax.losses.logprob import targets as predicted


def distill(
  model: Model,
  teacher: Model,
  *,
  targets: str = 'full',
  k: int = 256,
  normaliser: str = 'full',
  divergence: str = 'forward',
  mix: float = 0.5,
  draw_seed: int = 0,
) -> Recipe:
  """Imitates a teacher that runs in the step.

  `targets`: full, top_k, counts or distinct; all but the first use `k` ids.
  `normaliser` of the policy over these ids: full or ids. `divergence`: forward,
  reverse or jensen_shannon (with `mix`).
  """
  teachers.check(targets, k, normaliser)
  sparse = targets != 'full'
  policy = teacher.policy('teacher')

  def read(bundle, batch):
    return teachers.online(
      policy, bundle, batch, kind=targets, k=k, draw_seed=draw_seed
    )

  return Recipe(
    objective=_objective(model, read, normaliser, divergence, mix, sparse),
    init={'policy': model.init, 'teacher': teacher.init},
    follow={'teacher': None},
  )


def recorded(
  model: Model,
  *,
  normaliser: str = 'full',
  divergence: str = 'forward',
  mix: float = 0.5,
) -> Recipe:
  """Imitates a teacher from disk: ids and probabilities come with the rows."""
  teachers.check('top_k', 1, normaliser)

  def read(bundle, batch):
    del bundle
    if 'teacher_ids' not in batch:
      raise UserError(
        "recipe 'distill.recorded' needs a source with a teacher's records "
        "('teacher.recorded')"
      )
    return teachers.recorded(batch)

  return Recipe(
    objective=_objective(model, read, normaliser, divergence, mix, True),
    init={'policy': model.init},
  )


def _objective(
  model: Model,
  read: Callable[[Bundle, Batch], teachers.Part],
  normaliser: str,
  divergence: str,
  mix: float,
  sparse: bool,
):
  """The objective of every target: what `read` gives against the policy."""
  policy = model.policy('policy')
  compare = divergences.named(divergence, mix)
  if divergence == 'reverse' and sparse and normaliser == 'full':
    raise UserError(
      "recipe.divergence = 'reverse' to a few ids is infinite; set "
      "recipe.normaliser = 'ids'"
    )

  def objective(bundle, batch, key):
    del key
    weights = policy.view(bundle, batch)
    own_part = (policy, weights, policy.features(weights, batch)[0])
    tokens, mask = predicted(batch)
    if 'weight' in batch:
      mask = mask * batch['weight'][..., None]

    def scores(own, given, tokens):
      p, q = teachers.outcomes(given, own, normaliser=normaliser)
      same = jnp.argmax(own, axis=-1) == teachers.likeliest(given)
      return compare(p, q), gather_logp(own, tokens), same

    found, logp, same = over_tokens(
      scores, [own_part, read(bundle, batch)], tokens
    )
    loss = Mean.of(found, mask)
    term = 'kl' if divergence == 'forward' else divergence
    return {term: (1.0, loss)}, {
      'nll': Mean.of(-logp, mask),
      'agreement': Mean.of(same, mask),
    }

  return objective
