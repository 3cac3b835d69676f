"""Evaluation: estimators against brute force, KL against enumeration."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax import evaluate
from alignjax.models.tabular import tabular
from alignjax.rewards import compose
from alignjax.rewards.diversity import diversity
from tests.oracles import bandit


def responses(rewards, **changes):
  rewards = np.asarray(rewards, np.float32)
  shape = rewards.shape
  numbers = dict(
    response=np.zeros((*shape, 1), np.int32),
    mask=np.ones((*shape, 1), bool),
    rewards=rewards[..., None],
    kl=np.zeros(shape),
    kl_sampled=np.zeros(shape),
    entropy=np.zeros(shape),
    length=np.ones(shape),
    logprob_gap=np.float32(0),
  )
  return evaluate.Responses(**numbers | changes)


def test_best_of_n_is_the_mean_over_all_subsets():
  rng = np.random.default_rng(0)
  rewards = rng.normal(size=(5, 8))
  rows = evaluate.best_of_n(responses(rewards))
  assert [row['n'] for row in rows] == [1, 2, 4, 8]
  for row in rows:
    brute = np.mean(
      [
        rewards[:, list(subset)].max(axis=1)
        for subset in itertools.combinations(range(8), row['n'])
      ]
    )
    np.testing.assert_allclose(row['reward']['mean'], brute, rtol=1e-6)
  assert rows[0]['kl'] == 0
  np.testing.assert_allclose(rows[2]['kl'], np.log(4) - 0.75)


def test_intervals_are_over_prompts():
  # Responses to one prompt that agree are one observation, not many.
  values = np.repeat([[0.0], [1.0], [2.0]], 100, axis=1)
  found = evaluate.interval(values)
  half = 1.96 * np.std([0, 1, 2], ddof=1) / np.sqrt(3)
  np.testing.assert_allclose(
    [found['mean'], found['low'], found['high']], [1, 1 - half, 1 + half]
  )


def test_comparison_counts_ties_by_half_and_leaves_oneself_out():
  reference = responses([[0.0, 1.0, 1.0, 2.0]])
  reference = reference._replace(
    **{
      name: np.repeat(getattr(reference, name), 2, axis=0)
      for name in reference._fields
      if name != 'logprob_gap'
    }
  )
  better = reference._replace(rewards=reference.rewards + 1)
  row = evaluate.compare(better, reference, ('score',))
  wins = [(1 + 1) / 4, 3.5 / 4, 3.5 / 4, 1.0]
  wins[0] = (1 + 2 * 0.5) / 4  # 1 against 0, 1, 1, 2
  wins[1] = wins[2] = (3 + 0.5) / 4  # 2 against them
  np.testing.assert_allclose(row['win_rate']['mean'], np.mean(wins))
  same = evaluate.compare(reference, reference, ('score',))
  np.testing.assert_allclose(same['win_rate']['mean'], 0.5)
  quantiles = [1 / 4, 3 / 4, 3 / 4, 4 / 4]
  np.testing.assert_allclose(
    same['log_quantile']['mean'], np.mean(np.log(quantiles))
  )


def test_inference_time_win_rates_average_over_subsets():
  rng = np.random.default_rng(0)
  mine = rng.integers(0, 5, (3, 6)).astype(np.float32)
  theirs = rng.integers(0, 5, (3, 5)).astype(np.float32)
  rates = evaluate.inference_win_rates(responses(mine), responses(theirs))
  assert sorted(rates) == ['best_of_2', 'best_of_4', 'worst_of_2', 'worst_of_4']
  for name, found in rates.items():
    pick = max if name.startswith('best') else min
    n = int(name[-1])
    wins = [
      (pick(a) > pick(b)) + 0.5 * (pick(a) == pick(b))
      for x, y in zip(mine, theirs)
      for a in itertools.combinations(x, n)
      for b in itertools.combinations(y, n)
    ]
    np.testing.assert_allclose(found['mean'], np.mean(wins))
  same = evaluate.inference_win_rates(responses(mine), responses(mine))
  np.testing.assert_allclose([x['mean'] for x in same.values()], 0.5)


def test_kl_of_a_tabular_policy_is_exact():
  ref, policy = bandit.REF, bandit.best_of(bandit.REF, 4)
  model = tabular(np.log(ref)[None])
  bundle = {
    'policy': {'logits': jnp.log(policy)[None]},
    'reference': {'logits': jnp.log(ref)[None]},
  }
  write = evaluate.writer(model, count=500, max_new_tokens=1, temperature=1.0)
  found = evaluate.responses(
    write,
    bundle,
    [bandit.prompts(8), bandit.prompts(8)],
    bandit.reward(),
    jax.random.key(0),
  )
  np.testing.assert_allclose(found.kl, 0.594626, atol=1e-5)
  np.testing.assert_allclose(found.kl_sampled.mean(), 0.594626, atol=0.05)
  np.testing.assert_allclose(
    found.rewards.mean(), policy @ bandit.REWARD, atol=0.05
  )
  assert found.logprob_gap < 1e-5


def test_models_and_their_reference_under_guidance():
  logits = np.array([[1.0, 0.3, -0.2, 0.1, 0.5], [0.2, 0.4, 0.1, -0.3, 0.0]])
  model = tabular(logits)
  weights = {'logits': jnp.asarray(logits, jnp.float32)}
  bundle = {'policy': weights, 'reference': weights}
  batch = bandit.prompts(4) | {'uncond': jnp.ones((4, 1), jnp.int32)}
  p, q = (
    np.exp(x) / np.exp(x).sum()
    for x in (logits[0], 3 * logits[0] - 2 * logits[1])
  )
  for scale, kl, drawn in ((1.0, (p * np.log(p / q)).sum(), p), (3.0, 0.0, q)):
    write = evaluate.writer(
      model,
      count=2000,
      max_new_tokens=1,
      temperature=1.0,
      guidance_scale=scale,
      reference_guidance_scale=3.0,
    )
    out = write(bundle, batch, jax.random.key(0))
    np.testing.assert_allclose(out['kl'], kl, atol=1e-5)
    share = np.bincount(np.ravel(out['response']), minlength=5) / 8000
    np.testing.assert_allclose(share, drawn, atol=0.02)


def test_diversity_is_the_mean_over_pairs_of_a_prompt():
  rng = np.random.default_rng(0)
  vectors = rng.normal(size=(5, 3)).astype(np.float32)
  model = tabular(np.zeros((1, 5)))
  bundle = {'embedding': {'vectors': jnp.asarray(vectors)}}
  response = rng.integers(0, 5, (4, 3, 1))
  batch = {
    'prompt': np.zeros((4, 1), np.int32),
    'response': response,
    'mask': np.ones((4, 3, 1), bool),
  }
  reward = compose.beside(bandit.reward(), diversity(model))
  scores = reward(bundle, batch, None)
  assert scores.shape == (4, 3, 2) and reward.names == ('reward', 'diversity')
  unit = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
  x = unit[response[..., 0]]
  far = 1 - np.einsum('pie,pje->pij', x, x)
  pairs = [far[:, i, j] for i, j in ((0, 1), (0, 2), (1, 2))]
  found = responses(scores[..., 0])._replace(rewards=scores)
  row = evaluate.compare(found, found, reward.names)
  assert row['diversity']['mean'] == pytest.approx(np.mean(pairs), abs=1e-5)
  assert row['indicators'] == {}
