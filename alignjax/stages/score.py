"""Numbers about responses: rewards, reference log-probabilities, summaries."""

import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from alignjax.core.errors import UserError
from alignjax.core.types import (
  Batch,
  Mean,
  Metrics,
  Peak,
  Policy,
  Reward,
  Scalar,
  Stage,
)
from alignjax.losses.logprob import token_logp
from alignjax.system import rows

FLAT = 5  # batches of one and the same reward before a word on it
HOST_FIELDS = ('id', 'prompt', 'response', 'mask')


def score(reward: Reward) -> Stage:
  """A stage that writes rewards [B, N, K] and reward = rewards[..., 0].

  A reward that says `host = True` gets NumPy arrays of the rows that this
  process owns, and answers for those; its answers become a global array. Of a
  reward made of `parts` each runs where it belongs, and its `join` puts them
  together.

  Raises:
    UserError: one that does not say so reads what other hosts hold.
  """
  scored = _placed(reward)

  def stage(bundle, batch, key):
    try:
      rewards = _checked(scored(bundle, batch, key), batch)
    except RuntimeError as error:
      if 'non-addressable' not in str(error):
        raise
      raise UserError(
        'the reward reads arrays that other hosts hold; if it runs on the host,'
        ' let it say so: `reward.host = True`'
      ) from error
    return batch | {'rewards': rewards, 'reward': rewards[..., 0]}

  return stage


def _placed(reward: Reward) -> Reward:
  parts = getattr(reward, 'parts', ())
  if parts:
    inner = [_placed(part) for part in parts]
    return lambda *about: reward.join(*[part(*about) for part in inner])
  return _on_host(reward) if getattr(reward, 'host', False) else reward


def _checked(rewards, batch: Batch):
  expected = batch['response'].shape[:2]
  if rewards.ndim != 3 or rewards.shape[:2] != expected:
    raise UserError(
      f'the reward returned shape {rewards.shape}, expected [B, N, K] with '
      f'B = {expected[0]} and N = {expected[1]}'
    )
  return rewards


def _on_host(reward: Reward) -> Reward:
  """`reward` of the rows that this process owns, as an array of all rows."""

  alike = 0  # batches in a row

  def scored(bundle, batch, key):
    nonlocal alike
    mine: Any = rows.to_host(batch, HOST_FIELDS)
    values = np.asarray(reward(bundle, mine, key))
    _check_numbers(values, mine)
    alike = alike + 1 if values.size > 1 and np.ptp(values[..., 0]) == 0 else 0
    if alike == FLAT:
      print(
        f'every response of the last {FLAT} batches has the reward '
        f'{values.flat[0]:g}: where all are alike nothing is preferred, and '
        'only a pull to a reference or anchor moves the policy',
        file=sys.stderr,
        flush=True,
      )
    return rows.from_host(values, batch['response'])

  return scored


def _check_numbers(values: np.ndarray, batch: Any) -> None:
  bad = np.argwhere(~np.isfinite(values))
  if bad.size:
    row, response, which = bad[0]
    raise UserError(
      f'the reward of response {response} to the prompt of row '
      f'{int(batch["id"][row])} of the source is {values[row, response, which]}'
      f" (score {which}), expected a finite number; 'compose.bounded' puts one "
      'in its place'
    )


def reference(policy: Policy, *, first: int | None = None) -> Stage:
  """A stage that writes ref_logp [B, N, R] under `policy`.

  With `first`, only that many leading responses are scored; others get 0.
  """

  @jax.jit
  def stage(bundle, batch, key):
    del key
    part = batch | {
      name: batch[name][:, :first] for name in ('response', 'mask')
    }
    logp = token_logp(policy, policy.view(bundle, batch), part)
    rest = batch['response'].shape[1] - logp.shape[1]
    return batch | {'ref_logp': jnp.pad(logp, ((0, 0), (0, rest), (0, 0)))}

  return stage


def summary(
  batch: Batch,
  logp,
  entropy,
  *,
  names: Sequence[str] = (),
  kl: str = 'anchor_kl',
  updates: int = 1,
) -> Metrics:
  """What every online run logs about the policy's own responses.

  `batch` holds those responses only; `logp` and `entropy` [B, N, R] are the
  scorer's. `names` are those of the rewards. Entropy is nats per token,
  length is tokens per response, `kl` (its name) nats per sequence: the sampled
  estimate against ref_logp, if there is one. `logprob_gap` is the largest
  disagreement between sampler and scorer on any token; over several `updates`
  the policy moves between the two, and the number is called `logp_drift`.
  """
  weight, mask = batch['weight'], batch['mask']
  gap = jnp.max(jnp.where(mask, jnp.abs(logp - batch['sample_logp']), 0.0))
  # Weights are given per response, entropy per token.
  per_token = mask * weight[..., None]
  out: dict[str, Mean | Peak] = {
    'reward': Mean.of(batch['reward'], weight),
    'length': Mean.of(jnp.sum(mask, axis=-1), weight),
    'entropy': Mean.of(entropy, per_token),
    'logprob_gap' if updates == 1 else 'logp_drift': Peak(gap),
  }
  if 'ref_logp' in batch:
    log_ratio = jnp.sum(batch['sample_logp'] - batch['ref_logp'], axis=-1)
    out[kl] = Mean.of(log_ratio, weight)
  for i, name in enumerate(names[1:], start=1):
    out[f'reward/{name}'] = Mean.of(batch['rewards'][..., i], weight)
  return jax.lax.stop_gradient(out)


def values(scalar: Scalar) -> Stage:
  """A stage that writes value [B, N, R], 0 where the mask is False."""

  @jax.jit
  def stage(bundle, batch, key):
    del key
    value = scalar(bundle, batch)
    return batch | {'value': jnp.where(batch['mask'], value, 0.0)}

  return stage


def names(reward: Reward) -> tuple[str, ...]:
  """The names of a reward's scores, () if it does not tell."""
  return tuple(getattr(reward, 'names', ()))
