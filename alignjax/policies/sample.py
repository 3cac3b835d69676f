"""The only decoding loop: prefill once, then one token at a time.

N responses share the prefill of their prompt. The loop ends when every row
has met a stop token, and what it returns can be scored exactly: the
log-probabilities are those that it sampled with. `begin` and `advance` are the
same loop in pieces, for whoever shows the text while it grows.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from alignjax.core.types import Batch, Cache, Policy, Weights


class State(NamedTuple):
  """Responses under way. Rows are the B prompts times their N responses.

  Attributes:
    length: tokens that every row that still goes on has.
    token: int32 [B * N], the newest.
    done: bool [B * N], whether a stop token has come.
    keys: one for each row.
    out: response, mask and sample_logp, [B * N, R].
  """

  length: Array
  token: Array
  done: Array
  keys: Array
  cache: Cache
  out: dict[str, Array]


def sample(
  policy: Policy,
  weights: Weights,
  batch: Batch,
  key,
  *,
  count: int,
  max_new_tokens: int,
  stop: Sequence[int] = (),
  pad: int = 0,
  greedy: bool = False,
) -> dict[str, Array]:
  """Draws `count` responses to each prompt.

  Row b draws from `fold_in(key, id[b])`, so a prompt's responses do not depend
  on which batch it is in. The stop token belongs to the response.

  Returns:
    response int32 [B, N, R], mask bool [B, N, R], sample_logp f32 [B, N, R].
  """
  ending: dict[str, Any] = dict(stop=stop, pad=pad, greedy=greedy)
  state = begin(
    policy,
    weights,
    batch,
    key,
    count=count,
    max_new_tokens=max_new_tokens,
    **ending,
  )
  state = advance(policy, weights, state, max_new_tokens, **ending)
  rows = len(batch['prompt'])
  return {
    name: x.reshape(rows, count, max_new_tokens)
    for name, x in state.out.items()
  }


def begin(
  policy: Policy,
  weights: Weights,
  batch: Batch,
  key,
  *,
  count: int,
  max_new_tokens: int,
  stop: Sequence[int] = (),
  pad: int = 0,
  greedy: bool = False,
) -> State:
  """Reads the prompts and draws the first token of each response."""
  rows, width = batch['prompt'].shape
  logits, cache = policy.start(weights, batch, width + max_new_tokens)
  repeated = jnp.repeat(jnp.arange(rows), count)
  logits, cache = logits[repeated], policy.take(cache, repeated)
  keys = jax.vmap(jax.random.fold_in, (None, 0))(key, batch['id'])
  keys = jax.vmap(lambda k: jax.random.split(k, count))(keys).reshape(-1)
  shape = (rows * count, max_new_tokens)
  state = State(
    length=jnp.int32(0),
    token=jnp.full(rows * count, pad, jnp.int32),
    done=jnp.zeros(rows * count, bool),
    keys=keys,
    cache=cache,
    out={
      'response': jnp.full(shape, pad, jnp.int32),
      'sample_logp': jnp.zeros(shape, jnp.float32),
      'mask': jnp.zeros(shape, bool),
    },
  )
  return _draw(state, policy.limit(logits, None), stop, pad, greedy)


def advance(
  policy: Policy,
  weights: Weights,
  state: State,
  steps,
  *,
  stop: Sequence[int] = (),
  pad: int = 0,
  greedy: bool = False,
) -> State:
  """Draws up to `steps` more tokens, as `begin` was told.

  Fewer where every row is done or has all its tokens. `steps` may be traced.
  """
  room = state.out['response'].shape[1]
  end = jnp.minimum(state.length + steps, room)

  def running(state: State):
    return (state.length < end) & ~jnp.all(state.done)

  def body(state: State):
    logits, cache = policy.step(weights, state.cache, state.token)
    logits = policy.limit(logits, None)
    return _draw(state._replace(cache=cache), logits, stop, pad, greedy)

  return jax.lax.while_loop(running, body, state)


def _draw(state: State, logits, stop, pad: int, greedy: bool) -> State:
  """One token for every row, written down."""
  t, done = state.length, state.done
  score = logits
  if not greedy:
    # The largest of logits plus Gumbel noise is a draw of their softmax.
    score += jax.vmap(
      lambda k, row: jax.random.gumbel(jax.random.fold_in(k, t), row.shape)
    )(state.keys, logits)
  token = _largest(score)
  logp = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
  logp = logp - jax.nn.logsumexp(logits, axis=-1)
  token = jnp.where(done, pad, token).astype(jnp.int32)
  stops = jnp.asarray(stop, jnp.int32)
  new = {
    'response': token,
    'sample_logp': jnp.where(done, 0.0, logp),
    'mask': ~done,
  }
  return state._replace(
    length=t + 1,
    token=token,
    done=done | jnp.any(token[:, None] == stops[None], axis=-1),
    out={
      name: jax.lax.dynamic_update_slice_in_dim(
        state.out[name], x[:, None], t, axis=1
      )
      for name, x in new.items()
    },
  )


def _largest(x):
  """argmax over the last axis, as two reductions that a CPU vectorizes."""
  size = x.shape[-1]
  best = jnp.max(x, axis=-1, keepdims=True)
  first = jnp.min(jnp.where(x == best, jnp.arange(size), size), axis=-1)
  return jnp.minimum(first, size - 1)  # no column equals NaN
