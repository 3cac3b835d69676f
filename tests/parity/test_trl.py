"""GRPO and RLOO against TRL: advantages, losses and gradients on its arrays.

Through the recipes' own stages and objectives, with a policy that is given the
probability of every token; `tests/golden/make_trl.py` made the file.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.core.types import Policy
from alignjax.models.tabular import tabular
from alignjax.recipes.grpo import grpo
from alignjax.recipes.reinforce import reinforce

GOLDEN = np.load(Path(__file__).parents[1] / 'golden' / 'trl.npz')
DAPO = dict(mean_over='token', clip_high=0.28, kl_coef=0.0)
CASES = {
  'grpo': (grpo, dict(kl_coef=0.04)),
  'bnpo': (grpo, dict(kl_coef=0.04, mean_over='token')),
  'dapo': (grpo, DAPO),
  'dr_grpo': (
    grpo,
    dict(kl_coef=0.1, mean_over='constant', divide_by_std=False),
  ),
  'gspo': (grpo, dict(kl_coef=0.0, ratio_of='sequence')),
  'rloo': (reinforce, dict(kl_coef=0.05)),
  'rloo_free': (reinforce, dict(kl_coef=0.0)),
}


def given(role):
  """A policy over two tokens; the first has the log-probability of the role."""

  def head(weights, x):
    logp = x[..., 0]
    return jnp.stack([logp, jnp.log1p(-jnp.exp(logp))], axis=-1)

  def never(*_):
    raise AssertionError

  return Policy(
    view=lambda bundle, batch: bundle[role],
    features=lambda weights, batch: (weights[..., None], {}),
    head=head,
    start=never,
    step=never,
    take=never,
  )


def batch_of(x):
  shape = x['mask'].shape
  return {
    'id': jnp.arange(shape[0]),
    'response': jnp.zeros(shape, jnp.int32),
    'mask': jnp.asarray(x['mask']),
    'sample_logp': jnp.asarray(x['sample_logp'], jnp.float32),
    'ref_logp': jnp.asarray(x['ref_logp'], jnp.float32),
    'reward': jnp.asarray(x['reward'], jnp.float32),
    'rewards': jnp.asarray(x['reward'], jnp.float32)[..., None],
    'weight': jnp.ones(shape[:2]),
  }


def ours(name):
  recipe_fn, numbers = CASES[name]
  parts = tabular([[0.0]])._replace(
    policy=given,
    scalar=lambda role: lambda bundle, batch: bundle[role],
  )
  count, length = GOLDEN['mask'].shape[1:]
  recipe = recipe_fn(
    parts,
    lambda *_: None,
    response_count=count,
    max_new_tokens=length,
    **numbers,
  )
  key = jax.random.key(0)
  batch = recipe.stages[-1]({}, batch_of(GOLDEN), key)
  # Behind the end TRL has log-probability 0, which no token of two has.
  logp = jnp.where(batch['mask'], GOLDEN['logp'], -1.0).astype(jnp.float32)

  def total(logp):
    loss, _ = recipe.objective({'policy': logp}, batch, key)
    return sum(coef * mean.value for coef, mean in loss.values())

  loss, grad = jax.value_and_grad(total)(logp)
  return {'advantage': batch['advantage'][..., 0], 'loss': loss, 'grad': grad}


@pytest.mark.parametrize('name', CASES)
@pytest.mark.parametrize('field', ['advantage', 'loss', 'grad'])
def test_as_trl(name, field):
  want = GOLDEN[f'{name}/{field}']
  np.testing.assert_allclose(ours(name)[field], want, atol=2e-6)


def test_the_arrays_reach_every_branch():
  ratio = np.exp(GOLDEN['logp'] - GOLDEN['sample_logp'])[GOLDEN['mask']]
  assert (ratio < 0.8).sum() > 3 and (ratio > 1.28).sum() > 3
  assert ((ratio > 1.2) & (ratio < 1.28)).any()
  assert not GOLDEN['grpo/advantage'][1].any()  # equal rewards
  lengths = GOLDEN['mask'].sum(-1)
  assert lengths.min() < lengths.max() == GOLDEN['mask'].shape[-1]
  for name in CASES:
    assert np.abs(GOLDEN[f'{name}/grad']).max() > 1e-3


@pytest.mark.parametrize(
  'numbers', [dict(clip_high=0.2), dict(mean_over='response')]
)
def test_another_setting_is_seen(numbers, monkeypatch):
  monkeypatch.setitem(CASES, 'dapo', (grpo, DAPO | numbers))
  want = GOLDEN['dapo/grad']
  assert np.abs(ours('dapo')['grad'] - want).max() > 1e-3
