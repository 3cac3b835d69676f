"""Sampling checkpoints and scoring what they write, against a reference.

Every model answers the same prompts with the same random keys. Means come
with 95% intervals over prompts (a prompt's responses are not independent).
KL is measured two ways: exactly at every visited prefix and summed over the
response (low variance), and as the sampled log-ratio.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from alignjax.core.errors import UserError
from alignjax.core.types import (
  Batch,
  Model,
  Params,
  Reward,
)
from alignjax.losses.calibration import best_of_n_chance, best_of_n_kl
from alignjax.losses.divergence import kl
from alignjax.losses.logprob import entropy, gather_logp, over_tokens
from alignjax.policies.combine import tempered, under_guidance
from alignjax.policies.sample import sample

DIVERSITY = 'diversity'


class Responses(NamedTuple):
  """What one model wrote. P prompts, N responses, R tokens, K scores.

  Attributes:
    response, mask: [P, N, R].
    rewards: [P, N, K].
    kl: exact KL to the reference along the response, nats, [P, N].
    kl_sampled: log-ratio of the response, nats, [P, N].
    entropy: mean over its tokens, nats per token, [P, N].
    length: tokens, [P, N].
    logprob_gap: largest |sampler - scorer| on any token, scalar.
  """

  response: np.ndarray
  mask: np.ndarray
  rewards: np.ndarray
  kl: np.ndarray
  kl_sampled: np.ndarray
  entropy: np.ndarray
  length: np.ndarray
  logprob_gap: np.ndarray


def writer(
  model: Model,
  *,
  count: int,
  max_new_tokens: int,
  temperature: float,
  guidance_scale: float = 1.0,
  reference_guidance_scale: float = 1.0,
) -> Callable[[Mapping[str, Params], Batch, Any], dict[str, Any]]:
  """A jitted (bundle, batch, key) -> fields of `Responses` but the rewards.

  The bundle has roles 'policy' and 'reference', each under its own guidance.
  """
  policy, reference = (
    tempered(under_guidance(model, role, scale), temperature)
    for role, scale in (
      ('policy', guidance_scale),
      ('reference', reference_guidance_scale),
    )
  )

  @jax.jit
  def write(bundle, batch, key):
    weights = policy.view(bundle, batch)
    drawn = sample(
      policy,
      weights,
      batch,
      key,
      count=count,
      max_new_tokens=max_new_tokens,
      stop=model.stop,
      pad=model.pad,
    )
    batch = batch | drawn
    plain = unsaid(batch)
    ref_weights = reference.view(bundle, plain)
    parts = [
      (policy, weights, policy.features(weights, batch)[0]),
      (reference, ref_weights, reference.features(ref_weights, plain)[0]),
    ]

    def scores(logits, ref_logits, tokens):
      return {
        'logp': gather_logp(logits, tokens),
        'ref_logp': gather_logp(ref_logits, tokens),
        'kl': kl(logits, ref_logits),
        'entropy': entropy(logits),
      }

    mask = drawn['mask']
    found = over_tokens(scores, parts, drawn['response'])
    found = {name: jnp.where(mask, x, 0.0) for name, x in found.items()}
    length = mask.sum(-1)
    gap = jnp.abs(found['logp'] - drawn['sample_logp'])
    return {
      'response': drawn['response'],
      'mask': mask,
      'kl': found['kl'].sum(-1),
      'kl_sampled': (found['logp'] - found['ref_logp']).sum(-1),
      'entropy': found['entropy'].sum(-1) / length,
      'length': length,
      'logprob_gap': jnp.where(mask, gap, 0.0).max(),
    }

  return write


def unsaid(batch: Batch) -> Batch:
  """The batch with the prompts that rewards and references are about."""
  return batch | {'prompt': batch.get('plain_prompt', batch['prompt'])}


def responses(
  write: Callable,
  bundle: Mapping[str, Params],
  batches: Sequence[Batch],
  reward: Reward,
  key,
  advance: Callable[[int, str], None] = lambda done, text: None,
) -> Responses:
  """Everything one model writes to all batches; `advance(prompts done)`."""
  parts, done, tokens, begun = [], 0, 0, time.monotonic()
  for batch in batches:
    out = write(bundle, batch, key)
    scored = unsaid(batch) | {k: out[k] for k in ('response', 'mask')}
    out['rewards'] = reward(bundle, scored, key)
    parts.append({name: np.asarray(x) for name, x in out.items()})
    done += len(batch['id'])
    tokens += int(out['mask'].sum())
    rate = tokens / (time.monotonic() - begun)
    advance(
      done, f'reward {out["rewards"][..., 0].mean():.3f} {rate:,.0f} tok/s'
    )
  joined = {
    name: np.concatenate([part[name] for part in parts])
    for name in parts[0]
    if name != 'logprob_gap'
  }
  gap = np.max([part['logprob_gap'] for part in parts])
  return Responses(logprob_gap=gap, **joined)


def sampler(
  model: Model, *, count: int, max_new_tokens: int, temperature: float
) -> Callable[[Mapping[str, Params], Batch, Any], dict[str, Any]]:
  """A jitted (bundle, batch, key) -> response and mask [B, N, R] of 'policy'.

  A prompt's responses depend on the key and its id, not on its batch.
  """
  policy = tempered(model.policy('policy'), temperature)

  @jax.jit
  def write(bundle, batch, key):
    drawn = sample(
      policy,
      policy.view(bundle, batch),
      batch,
      key,
      count=count,
      max_new_tokens=max_new_tokens,
      stop=model.stop,
      pad=model.pad,
    )
    return {name: drawn[name] for name in ('response', 'mask')}

  return write


def reference_rewards(
  write: Callable,
  bundle: Mapping[str, Params],
  source: Any,
  reward: Reward,
  key,
  *,
  into: np.ndarray,
  advance: Callable[[int, str], None] = lambda done, text: None,
) -> None:
  """Rewards of `write`'s responses to every row of a source, ascending.

  `into` [rows, N] takes them as they come; only its rows of NaN are computed,
  `source.batch_size` prompts at a time. An array on disk therefore goes on
  where it was left.

  Raises UserError for a reward that is no finite number, with its prompt.
  """
  waiting = np.flatnonzero(np.isnan(into).any(axis=1))
  size = source.batch_size
  for begin in range(0, len(waiting), size):
    ids = waiting[begin : begin + size]
    batch = source.rows(np.resize(ids, size))  # of one shape
    batch |= write(bundle, batch, key)
    scores = np.asarray(reward(bundle, batch, key))[: len(ids), :, 0]
    if not np.isfinite(scores).all():
      row = ids[np.flatnonzero(~np.isfinite(scores).all(axis=1))[0]]
      prompt = source.records([row])[0].get('prompt', '')
      raise UserError(
        f'the reward of a response to prompt {row} is not a finite number: '
        f'{prompt[:200]!r}'
      )
    into[ids] = np.sort(scores, axis=1)
    done = len(into) - len(waiting) + begin + len(ids)
    advance(done, f'reward {scores.mean():.3f}')


def interval(values: np.ndarray) -> dict[str, float]:
  """Mean of [P, N] and its normal 95% interval over the P prompts."""
  per_prompt = values.astype(np.float64).mean(axis=1)
  mean = per_prompt.mean()
  half = 1.96 * per_prompt.std(ddof=1) / np.sqrt(len(per_prompt))
  return {'mean': mean, 'low': mean - half, 'high': mean + half}


def compare(
  found: Responses, reference: Responses, names: Sequence[str]
) -> dict[str, Any]:
  """The row of a model in an evaluation: metrics with their intervals.

  The log-quantile of a response counts it among the reference's responses to
  the same prompt, (1 + not above) / (1 + count); ties win by half. Where one of
  the scores is named `DIVERSITY`, it is a metric of the row as well. The
  reference's own responses are compared with its other ones.
  """
  reward, ref = found.rewards[..., 0], reference.rewards[..., 0]
  mine, theirs = reward[:, :, None], ref[:, None, :]
  others = np.ones((reward.shape[1], ref.shape[1]))
  if found is reference:
    np.fill_diagonal(others, 0)
  count = others.sum(-1)
  quantile = (1 + ((theirs <= mine) * others).sum(-1)) / (1 + count)
  wins = ((mine > theirs) + 0.5 * (mine == theirs)) * others
  distances = [
    interval(found.rewards[..., i])
    for i, name in enumerate(names)
    if name == DIVERSITY
  ]
  return {
    'reward': interval(reward),
    **({DIVERSITY: distances[0]} if distances else {}),
    'scores': {
      name: interval(found.rewards[..., i]) for i, name in enumerate(names)
    },
    'kl': interval(found.kl),
    'kl_sampled': interval(found.kl_sampled),
    'length': interval(found.length),
    'entropy': interval(found.entropy),
    'log_quantile': interval(np.log(quantile)),
    'win_rate': interval(wins.sum(-1) / count),
    **inference_win_rates(found, reference),
    'logprob_gap': float(found.logprob_gap),
    'indicators': {
      name: float(found.rewards[..., i].mean())
      for i, name in enumerate(names)
      if i > 0 and name != DIVERSITY
    },
  }


def inference_win_rates(
  found: Responses, reference: Responses
) -> dict[str, dict[str, float]]:
  """How often the best (worst) of n beats the best (worst) of n reference's.

  'best_of_2', 'worst_of_2', ... for n = 2, 4, ... as far as both models' N
  reach: InfAlign's inference-time win rate (arXiv 2412.19792, equation 2),
  unbiased over subsets where the models differ; ties win by half.
  """
  mine = np.sort(found.rewards[..., 0].astype(np.float64), axis=1)
  theirs = np.sort(reference.rewards[..., 0].astype(np.float64), axis=1)
  left, right = mine[:, :, None], theirs[:, None, :]
  wins = (left > right) + 0.5 * (left == right)  # [P, N, N of the reference]
  out, n = {}, 2
  while n <= min(mine.shape[1], theirs.shape[1]):
    a, b = (best_of_n_chance(x.shape[1], n) for x in (mine, theirs))
    for name, p, q in (('best', a, b), ('worst', a[::-1], b[::-1])):
      rate = np.einsum('pij,i,j->p', wins, p, q)
      out[f'{name}_of_{n}'] = interval(rate[:, None])
    n *= 2
  return out


def best_of_n(reference: Responses) -> list[dict[str, Any]]:
  """Reward of the best of n reference responses, n = 1, 2, 4, ...

  The unbiased estimate over all subsets of a prompt's responses; KL is
  log n - (n - 1) / n.
  """
  ordered = np.sort(reference.rewards[..., 0].astype(np.float64), axis=1)
  count = ordered.shape[1]
  rows, n = [], 1
  while n <= count:
    chance = best_of_n_chance(count, n)
    best = (ordered * chance).sum(axis=1, keepdims=True)
    rows.append({'n': n, 'kl': best_of_n_kl(n), 'reward': interval(best)})
    n *= 2
  return rows
