"""Evaluation: estimators against brute force, KL against enumeration."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from alignjax import evaluate
from alignjax.models.tabular import tabular
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
