"""A logits table per prompt: the smallest policy there is.

Every response token is an independent draw from softmax(logits[prompt]), where
the prompt's last token is the row. All closed forms of the methods are checked
on it, through the same recipes, stages, losses and optimizer as a decoder.
"""

import jax.numpy as jnp

from alignjax.core.types import Batch, Bundle, Embed, Model, Policy, Scalar
from alignjax.models.layers import unit


def tabular(logits) -> Model:
  """A model whose initial parameters are the table `logits`, float [Q, V]."""
  logits = jnp.asarray(logits, jnp.float32)
  return Model(
    init=lambda key: {'logits': logits},
    policy=_policy,
    stop=(),
    pad=0,
    scalar_init=lambda key: {
      'values': jnp.zeros(len(logits)),
      'after': jnp.zeros(logits.shape),
    },
    scalar=_scalar,
    bare=_policy,
    legal=lambda policy: policy,
    embed_init=lambda key, size=0: {'vectors': jnp.eye(logits.shape[-1])},
    embed=_embed,
  )


def _policy(role: str) -> Policy:
  def view(bundle: Bundle, batch: Batch):
    return bundle[role]['logits']

  def features(weights, batch: Batch):
    row = batch['prompt'][:, -1]
    shape = (*batch['response'].shape, weights.shape[-1])
    return jnp.broadcast_to(weights[row][:, None, None], shape), {}

  def start(weights, batch: Batch, length: int):
    row = batch['prompt'][:, -1]
    return weights[row], row

  def step(weights, cache, tokens):
    del tokens
    return weights[cache], cache

  return Policy(
    view=view,
    features=features,
    head=lambda weights, x: x,
    start=start,
    step=step,
    take=lambda cache, rows: jnp.take(cache, rows, axis=0),
  )


def _scalar(role: str) -> Scalar:
  """One number per prompt, then one per prompt and token before."""

  def values(bundle: Bundle, batch: Batch):
    row = batch['prompt'][:, -1][:, None, None]
    tokens = batch['response']
    first = jnp.broadcast_to(bundle[role]['values'][row], tokens.shape)[..., :1]
    later = bundle[role]['after'][row, tokens[..., :-1]]
    return jnp.concatenate([first, later], axis=-1)

  return values


def _embed(role: str) -> Embed:
  """A table of one vector per token; a response has their mean, unit norm."""

  def embed(bundle: Bundle, batch: Batch):
    found = bundle[role]['vectors'][batch['response']]
    return unit(jnp.sum(found * batch['mask'][..., None], axis=-2))

  return embed
