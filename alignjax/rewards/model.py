"""A reward model: a net with a scalar head, under a frozen role of its own.

Its number for a response is read behind the response's last token, so that it
has seen all of it. Of any size and family with the run's tokenizer, at
`reward_model.path`; such a net is what recipes train beside the policy, as
PPO's `model_value`. A merge may stand for the path: {'method': 'linear',
'models': [...]} is the mean of several, heads included (WARM, 2401.12187).
"""

from typing import Any

import jax

from alignjax.core.types import Model, Reward
from alignjax.losses.value import of_response

ROLE = 'reward_model'


def model(tokens: Any, reward_model: Model) -> Reward:
  """The reward [B, N, 1] of the role `reward_model`."""
  del tokens
  scalar = reward_model.scalar(ROLE)

  @jax.jit
  def scored(params, batch):
    return of_response(scalar, {ROLE: params}, batch)[..., None]

  def reward(bundle, batch, key):
    del key
    fields = {name: batch[name] for name in ('prompt', 'response', 'mask')}
    return scored(bundle[ROLE], fields)

  reward.roles = {ROLE: reward_model.scalar_init}
  reward.names = ('reward_model',)
  return reward
