"""The only decoding loop: prefill once, then one token at a time.

N responses share the prefill of their prompt. The loop ends when every row
has met a stop token, and what it returns can be scored exactly: the
log-probabilities are those that it sampled with.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array

from alignjax.core.types import Batch, Policy, Weights


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
  rows, width = batch['prompt'].shape
  logits, cache = policy.start(weights, batch, width + max_new_tokens)
  repeated = jnp.repeat(jnp.arange(rows), count)
  logits, cache = logits[repeated], policy.take(cache, repeated)
  keys = jax.vmap(jax.random.fold_in, (None, 0))(key, batch['id'])
  keys = jax.vmap(lambda k: jax.random.split(k, count))(keys).reshape(-1)
  stops = jnp.asarray(stop, jnp.int32)

  def draw(t, logits, done):
    if greedy:
      token = jnp.argmax(logits, axis=-1)
    else:
      token = jax.vmap(
        lambda k, row: jax.random.categorical(jax.random.fold_in(k, t), row)
      )(keys, logits)
    logp = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
    logp = logp - jax.nn.logsumexp(logits, axis=-1)
    token = jnp.where(done, pad, token).astype(jnp.int32)
    ended = done | jnp.any(token[:, None] == stops[None], axis=-1)
    return token, jnp.where(done, 0.0, logp), ended

  def write(out, t, token, logp, done):
    new = {'response': token, 'sample_logp': logp, 'mask': ~done}
    return {
      name: jax.lax.dynamic_update_slice_in_dim(
        out[name], x[:, None], t, axis=1
      )
      for name, x in new.items()
    }

  def running(carry):
    t, _, done, _, _ = carry
    return (t < max_new_tokens) & ~jnp.all(done)

  def body(carry):
    t, token, done, cache, out = carry
    logits, cache = policy.step(weights, cache, token)
    token, logp, ended = draw(t, logits, done)
    out = write(out, t, token, logp, done)
    return t + 1, token, ended, cache, out

  shape = (rows * count, max_new_tokens)
  out = {
    'response': jnp.full(shape, pad, jnp.int32),
    'sample_logp': jnp.zeros(shape, jnp.float32),
    'mask': jnp.zeros(shape, bool),
  }
  done = jnp.zeros(rows * count, bool)
  token, logp, ended = draw(0, logits, done)
  out = write(out, 0, token, logp, done)
  carry = (jnp.int32(1), token, ended, cache, out)
  out = jax.lax.while_loop(running, body, carry)[-1]
  return {
    name: x.reshape(rows, count, max_new_tokens) for name, x in out.items()
  }
