"""Weights as words of the prompt, and one step of a policy that reads them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax import train
from alignjax.core.errors import UserError
from alignjax.data import weighted
from alignjax.recipes.clp import told
from alignjax.step import init_state, make_step
from alignjax.system.optimizer import optimizer
from tests import tiny


def source(batch_size=4, seed=0):
  plain = tiny.prompt_source(batch_size, seed=seed)
  fields = {f.name: getattr(plain, f.name) for f in dataclasses.fields(plain)}
  return weighted.Weighted(
    **fields, tokenizer=tiny.TOKENS, count=2, concentration=1.0
  )


def test_prompts_say_their_weights():
  batch, again = source().batch(3), source().batch(3)
  for name, x in batch.items():
    np.testing.assert_array_equal(x, again[name])
  plain = tiny.prompt_source(4).batch(3)
  np.testing.assert_array_equal(batch['plain_prompt'], plain['prompt'])
  np.testing.assert_allclose(batch['condition'].sum(1), 1, atol=1e-6)
  assert len({tuple(w) for w in batch['condition']}) > 1
  for row, ids, w in zip(batch['prompt'], plain['prompt'], batch['condition']):
    said = row[row != tiny.TOKENS.pad]
    own = ids[ids != tiny.TOKENS.pad]
    words = tiny.TOKENS.encode(f'weights {w[0]:.2f} {w[1]:.2f}\n')
    np.testing.assert_array_equal(said, [own[0], *words, *own[1:]])
  # One width whatever the weights are: decimals are fixed.
  assert source().batch(4)['prompt'].shape == batch['prompt'].shape


def recipe():
  return told(
    tiny.model(), tiny.two, objectives=('even', 'small'), max_new_tokens=4
  )


def test_told_rewards_and_reference_read_the_plain_prompt(monkeypatch):
  made = recipe()
  state = init_state(made, optimizer(1), 0, start={'reference': '@policy'})
  batch = jax.tree.map(jnp.asarray, source().batch(0))
  staged = train.stage_batch(made, state, batch, 0)
  np.testing.assert_array_equal(staged['prompt'], batch['prompt'])
  w, rewards = np.asarray(batch['condition']), np.asarray(staged['rewards'])
  expected = np.einsum('bnk,bk->bn', rewards, w)
  np.testing.assert_allclose(staged['reward'], expected, atol=1e-6)
  # One model, two prompts: the reference does not see the words.
  gap = np.abs(staged['ref_logp'] - staged['sample_logp']).max()
  assert gap > 1e-3
  _, metrics = jax.jit(make_step(made, optimizer(1)))(state, staged)
  assert metrics['logprob_gap'].number < 1e-4
  assert np.isfinite(metrics['own/small'].number)


def test_told_needs_weights():
  made = recipe()
  state = init_state(made, optimizer(1), 0, start={'reference': '@policy'})
  with pytest.raises(UserError, match='rows without a weight for each'):
    train.stage_batch(made, state, tiny.batch(4), 0)
