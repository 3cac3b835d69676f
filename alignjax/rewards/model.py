"""A reward model: a net with a scalar head, under a frozen role of its own.

Its number for a response is read behind the response's last token, so that it
has seen all of it. Of any size and family with the run's tokenizer, at
`reward_model.path`; such a net is what recipes train beside the policy (PPO's
`model_value`), and what a reward recipe trains.
"""

from typing import Any

import jax
import jax.numpy as jnp

from alignjax.core.types import Model, Reward

ROLE = 'reward_model'


def model(tokens: Any, reward_model: Model) -> Reward:
  """The reward [B, N, 1] of the role `reward_model`."""
  del tokens
  scalar = reward_model.scalar(ROLE)

  @jax.jit
  def scored(bundle, batch):
    # Token i gets the number of what precedes it: one more token, of padding,
    # gets that of the whole response.
    wide = ((0, 0), (0, 0), (0, 1))
    fields = {
      'prompt': batch['prompt'],
      'response': jnp.pad(
        batch['response'], wide, constant_values=reward_model.pad
      ),
      'mask': jnp.pad(batch['mask'], wide, constant_values=True),
    }
    length = jnp.sum(batch['mask'], axis=-1, keepdims=True)
    values = scalar({ROLE: bundle[ROLE]}, fields)
    return jnp.take_along_axis(values, length, axis=-1)

  def reward(bundle, batch, key):
    del key
    return scored(bundle, batch)

  reward.roles = {ROLE: reward_model.scalar_init}
  reward.names = ('reward_model',)
  return reward
