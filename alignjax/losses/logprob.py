"""Log-probabilities of tokens, without ever holding all logits at once.

At a 256k vocabulary the logits of one 4096-token row are 4.2 GB, so everything
that needs logits walks over chunks of T and applies the policy's head to one
chunk at a time; the backward pass recomputes them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from alignjax.core.types import Batch, Policy, Weights


def targets(batch: Batch) -> tuple[Array, Array]:
  """(tokens, mask) aligned with `Policy.features`: what feature i predicts."""
  if 'response' in batch:
    return batch['response'], batch['mask']
  inside = batch['segment'][:, 1:] == batch['segment'][:, :-1]
  return batch['tokens'][:, 1:], batch['loss_mask'][:, 1:] & inside


def over_tokens(
  fn: Callable[..., Any],
  parts: Sequence[tuple[Any, Weights, Any]],
  *arrays: Float[Array, '... T'],
  chunk: int = 256,
) -> Any:
  """fn(*logits, *arrays) computed chunk by chunk along T.

  Args:
    fn: takes logits [..., t, V] of every part (or what else its head gives),
      then every array [..., t]; returns a pytree of arrays [..., t, *].
    parts: (policy, or what has a head, weights, features [..., T, *]).
    arrays: [..., T].
    chunk: positions per chunk. A T no longer than this is one chunk, whose
      logits are kept for the backward pass.
  """
  features = [part[2] for part in parts]

  def apply(features, arrays):
    # Flat: one row per token is a layout in which both products of the backward
    # pass read the gradient of the logits as it lies.
    lead = arrays[0].shape
    logits = [
      policy.head(
        weights,
        jax.tree.map(lambda y: y.reshape(-1, *y.shape[len(lead) :]), x),
      )
      for (policy, weights, _), x in zip(parts, features)
    ]
    out = fn(*logits, *[x.reshape(-1) for x in arrays])
    return jax.tree.map(lambda y: y.reshape(*lead, *y.shape[1:]), out)

  axis, length = arrays[0].ndim - 1, arrays[0].shape[-1]
  if length <= chunk:
    return apply(features, arrays)

  def split(x, axis):
    """[..., T, *] -> [T / chunk, ..., chunk, *], padded at the end."""
    axis %= x.ndim
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, -length % chunk)
    x = jnp.pad(x, padding)
    shape = (*x.shape[:axis], -1, chunk, *x.shape[axis + 1 :])
    return jnp.moveaxis(x.reshape(shape), axis, 0)

  def join(x):
    """[T / chunk, ..., chunk, *] -> [..., T, *]."""
    x = jnp.moveaxis(x, 0, axis)
    x = x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
    return jax.lax.slice_in_dim(x, 0, length, axis=axis)

  chunks = (
    jax.tree.map(lambda x: split(x, -2), features),
    [split(x, -1) for x in arrays],
  )
  walk = jax.checkpoint(lambda xs: apply(*xs))
  return jax.tree.map(join, jax.lax.map(walk, chunks))


def token_logp(
  policy: Policy, weights: Weights, batch: Batch, *, chunk: int = 256
) -> Float[Array, '... T']:
  """log p of every target token, 0 where the mask is False."""
  return token_scores(policy, weights, batch, chunk=chunk)[0]


def token_scores(
  policy: Policy, weights: Weights, batch: Batch, *, chunk: int = 256
) -> tuple[Float[Array, '... T'], Float[Array, '... T']]:
  """(log p of the token, entropy of its distribution in nats), masked."""
  features, _ = policy.features(weights, batch)
  tokens, mask = targets(batch)

  def scores(logits, tokens):
    logp = gather_logp(logits, tokens)
    return logp, entropy(logits)

  logp, nats = over_tokens(
    scores, [(policy, weights, features)], tokens, chunk=chunk
  )
  return jnp.where(mask, logp, 0.0), jnp.where(mask, nats, 0.0)


def gather_logp(
  logits: Float[Array, '... V'], tokens: Array
) -> Float[Array, '...']:
  """log softmax(logits)[token], float32."""
  return _gather_logp(logits.astype(jnp.float32), tokens)


@jax.custom_vjp
def _gather_logp(logits, tokens):
  return _gather_forward(logits, tokens)[0]


def _gather_forward(logits, tokens):
  picked = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
  total = jax.nn.logsumexp(logits, axis=-1)
  return picked - total, (logits, tokens, total)


def _gather_backward(saved, g):
  # The derivative of a gather is a scatter over [..., V]; this is one pass.
  logits, tokens, total = saved
  hit = jnp.arange(logits.shape[-1]) == tokens[..., None]
  return g[..., None] * (hit - jnp.exp(logits - total[..., None])), None


_gather_logp.defvjp(_gather_forward, _gather_backward)


def entropy(logits: Float[Array, '... V']) -> Float[Array, '...']:
  """Entropy of softmax(logits) in nats, float32."""
  logits = logits.astype(jnp.float32)
  probs = jax.nn.softmax(logits, axis=-1)
  return jax.nn.logsumexp(logits, axis=-1) - jnp.sum(probs * logits, axis=-1)
