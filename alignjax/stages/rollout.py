"""Responses for a batch of prompts, from one policy or several.

`rollout` samples; with `given_or_drawn` for a share of the rows only, and the
others keep what the source gives. `enumerate_arms` writes every outcome with
its probability as `weight` instead, for policies small enough: the exact
expectation of the same objective.
"""

import itertools
import math
from collections import Counter
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from alignjax.core.errors import UserError
from alignjax.core.types import Policy, Stage
from alignjax.policies.sample import sample

Draws = Sequence[tuple[Policy, int]]


def rollout(
  draws: Draws, *, max_new_tokens: int, stop: Sequence[int], pad: int
) -> Stage:
  """A stage that samples count responses from each (policy, count), in order.

  Writes response, mask, sample_logp [B, N, R] and weight [B, N] = 1, where N
  is the sum of counts. UserError if there is no room for a token.
  """
  if max_new_tokens < 1:
    raise UserError(
      f'recipe.max_new_tokens: found {max_new_tokens}, expected room for a '
      'response: 1 or more'
    )

  @jax.jit
  def stage(bundle, batch, key):
    parts = []
    for i, (policy, count) in enumerate(draws):
      parts.append(
        sample(
          policy,
          policy.view(bundle, batch),
          batch,
          jax.random.fold_in(key, i),
          count=count,
          max_new_tokens=max_new_tokens,
          stop=stop,
          pad=pad,
        )
      )
    joined = {
      name: jnp.concatenate([part[name] for part in parts], axis=1)
      for name in parts[0]
    }
    weight = jnp.ones(joined['response'].shape[:2], jnp.float32)
    return batch | joined | {'weight': weight}

  return stage


def given_or_drawn(draw: Stage, *, share: float) -> Stage:
  """`draw` for a share of the rows; the source's `response` for the others.

  Which rows is a draw of fold_in(key, id). Writes what `rollout` of one
  response does; sample_logp is 0 where the response was given. R is the longer
  of both.

  Raises:
    UserError: the source gives no response and share < 1.
  """
  if share == 1:
    return draw

  @jax.jit
  def stage(bundle, batch, key):
    if 'response' not in batch:
      raise UserError(
        f'recipe.on_policy = {share}: the other rows need a response, and the '
        "source gives none (source 'sources.prompts': set response_tokens)"
      )
    given = {name: batch[name] for name in ('response', 'mask')}
    given['sample_logp'] = jnp.zeros(given['mask'].shape, jnp.float32)
    weight = jnp.ones(given['response'].shape[:2], jnp.float32)
    if share == 0:
      return batch | given | {'weight': weight}
    prompts = {k: v for k, v in batch.items() if k not in given}
    drawn = draw(bundle, prompts, jax.random.fold_in(key, 0))
    keys = jax.vmap(jax.random.fold_in, (None, 0))(
      jax.random.fold_in(key, 1), batch['id']
    )
    own = jax.vmap(jax.random.uniform)(keys) < share
    length = max(x['mask'].shape[-1] for x in (given, drawn))

    def wide(x):
      return jnp.pad(x, ((0, 0), (0, 0), (0, length - x.shape[-1])))

    chosen = {
      name: jnp.where(own[:, None, None], wide(drawn[name]), wide(given[name]))
      for name in given
    }
    return batch | chosen | {'weight': weight}

  return stage


def enumerate_arms(draws: Draws, *, arms: int, support: int = 0) -> Stage:
  """A stage that writes all outcomes of one-token draws, with probabilities.

  Every prompt row becomes one row per joint outcome: for each (policy, count)
  all multisets of `count` arms with their multinomial probability (order
  within one policy's draws must not matter to the recipe). `weight` of the
  drawn columns is the joint probability. With `support` = k > 0 the last
  policy's draws are followed by one column per arm whose weight is that arm's
  probability (times the row's): an exact reference instead of k samples;
  draws whose count is 0 have only that.

  Args:
    draws: as for `rollout`; responses are single tokens 0..arms-1.
    arms: how many tokens there are.
    support: 0, or any positive number to append the last policy's support.
  """
  choices = [
    list(itertools.combinations_with_replacement(range(arms), count))
    for _, count in draws
  ]
  joint = list(itertools.product(*choices))
  columns = np.array([sum(outcome, ()) for outcome in joint], np.int32)
  orderings = np.array(
    [
      math.prod(
        math.factorial(len(part))
        / math.prod(math.factorial(n) for n in Counter(part).values())
        for part in outcome
      )
      for outcome in joint
    ],
    np.float32,
  )
  owner = np.repeat(np.arange(len(draws)), [count for _, count in draws])

  @jax.jit
  def stage(bundle, batch, key):
    del key
    rows = batch['prompt'].shape[0]
    logps = jnp.stack(
      [_arm_logp(policy, bundle, batch) for policy, _ in draws]
    )  # [policies, B, arms]
    logp = logps[owner, :, columns]  # [outcomes, N, B]
    logp = jnp.moveaxis(logp, -1, 0)  # [B, outcomes, N]
    probability = jnp.exp(jnp.sum(logp, axis=-1)) * orderings
    weight = jnp.broadcast_to(probability[..., None], logp.shape)
    tokens = jnp.broadcast_to(columns, logp.shape)
    if support:
      every = jnp.arange(arms, dtype=jnp.int32)
      shape = (*logp.shape[:2], arms)
      last = jnp.broadcast_to(logps[-1][:, None], shape)
      tokens = jnp.concatenate(
        [tokens, jnp.broadcast_to(every, shape)], axis=-1
      )
      logp = jnp.concatenate([logp, last], axis=-1)
      weight = jnp.concatenate(
        [weight, probability[..., None] * jnp.exp(last)], axis=-1
      )
    repeated = jnp.repeat(jnp.arange(rows), len(joint))
    batch = {name: x[repeated] for name, x in batch.items()}

    def flat(x):
      return x.reshape(rows * len(joint), -1)

    return batch | {
      'response': flat(tokens)[..., None],
      'mask': jnp.ones_like(flat(tokens)[..., None], bool),
      'sample_logp': flat(logp)[..., None],
      'weight': flat(weight),
    }

  return stage


def _arm_logp(policy, bundle, batch):
  logits, _ = policy.start(policy.view(bundle, batch), batch, 1)
  return jax.nn.log_softmax(policy.limit(logits, None), axis=-1)
