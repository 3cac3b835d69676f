"""A reward model reads the whole response, and nothing behind it."""

import jax
import jax.numpy as jnp
import numpy as np

from alignjax.models import decoder
from alignjax.rewards import compose
from tests import tiny

MODEL = tiny.model()
REWARD = compose.build(
  {'name': 'model'}, {'tokens': tiny.TOKENS, 'reward_model': MODEL}
)


def params():
  found = jax.jit(MODEL.scalar_init)(jax.random.key(0))
  head = jax.random.normal(jax.random.key(1), found['scalar_head'].shape)
  return found | {'scalar_head': head}


def batch_of():
  rng = np.random.default_rng(0)
  lengths = np.array([[1, 5], [3, 6], [6, 2], [4, 4]])
  mask = np.arange(6) < lengths[..., None]
  response = np.where(mask, rng.integers(6, 262, mask.shape), 0)
  return tiny.batch(4) | {
    'response': jnp.asarray(response, jnp.int32),
    'mask': jnp.asarray(mask),
  }


def test_the_score_is_the_head_on_the_last_token():
  assert set(compose.roles(REWARD)) == {'reward_model'}
  assert REWARD.names == ('reward_model',)
  weights, batch = params(), batch_of()
  found = REWARD({'reward_model': weights}, batch, None)
  assert found.shape == (4, 2, 1) and found.dtype == jnp.float32
  config = tiny.config()
  for b in range(4):
    for n in range(2):
      prompt = [i for i in batch['prompt'][b].tolist() if i]
      ids = batch['response'][b, n][batch['mask'][b, n]].tolist()
      row = jnp.asarray([prompt + ids], jnp.int32)
      position = jnp.arange(row.shape[1])[None]
      x = decoder.features(config, weights, row, position)
      want = decoder.scalar(weights, x)[0, -1]
      np.testing.assert_allclose(found[b, n, 0], want, atol=2e-5)


def test_what_stands_behind_the_end_does_not_count():
  weights, batch = {'reward_model': params()}, batch_of()
  noise = jnp.where(batch['mask'], batch['response'], 99)
  np.testing.assert_allclose(
    REWARD(weights, batch | {'response': noise}, None),
    REWARD(weights, batch, None),
    atol=1e-5,
  )


def test_its_role_is_found_inside_others():
  stacked = compose.build(
    {
      'name': 'compose.stack',
      'parts': {
        'model': {'name': 'compose.affine', 'part': {'name': 'model'}},
        'length': {'name': 'text.length'},
      },
    },
    {'tokens': tiny.TOKENS, 'reward_model': MODEL},
  )
  assert set(compose.roles(stacked)) == {'reward_model'}
