"""Policies made of policies: every result is again a Policy.

Sampler and scorers therefore never know what they are given. `restrict` goes
outermost, so combinations are made of bare policies (`under_guidance`): a
difference of logits, one of which is masked, may make an illegal token certain.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from alignjax.core.errors import UserError
from alignjax.core.types import Batch, Model, Policy

PROMPTS = ('prompt', 'uncond')
ILLEGAL = -1e9  # finite: its exponential is 0 and its multiples are numbers


def restrict(policy: Policy, illegal: Sequence[int]) -> Policy:
  """`policy` over legal tokens: `illegal` ids get the logit -1e9."""
  if not illegal:
    return policy

  def mask(logits):
    # A constant mask fuses with whatever follows; a scatter would copy.
    forbidden = np.zeros(logits.shape[-1], bool)
    forbidden[np.asarray(illegal)] = True
    return jnp.where(forbidden, ILLEGAL, logits)

  return on_logits(policy, mask)


def tempered(policy: Policy, temperature: float) -> Policy:
  """`policy` at a sampling temperature, for sampler and scorer alike."""
  if temperature == 1:
    return policy
  return on_logits(policy, lambda logits: logits / temperature)


def sampled(
  policy: Policy, *, temperature: float, top_k: int = 0, top_p: float = 1.0
) -> Policy:
  """`policy` as it is sampled: at a temperature, then truncated.

  Only the `top_k` likeliest tokens (0: all), and of those the fewest that have
  at least `top_p` of their mass, can be drawn, and share all the mass; tokens
  as likely as the last of them belong to them. Scorers do the same, so that
  log-probabilities are those of the distribution that was sampled. A token that
  was drawn counts as drawable where a scorer disagrees: another policy, or one
  that has moved, or rounding.

  Raises UserError for numbers out of range.
  """
  if temperature <= 0 or top_k < 0 or not 0 < top_p <= 1:
    raise UserError(
      f'temperature = {temperature:g}, top_k = {top_k} and top_p = {top_p:g}: '
      'expected more than 0, 0 or more (0: all), and more than 0 up to 1'
    )
  policy = tempered(policy, temperature)
  if not top_k and top_p == 1:
    return policy

  def limit(logits, tokens):
    kept = _kept(jax.lax.stop_gradient(logits), top_k, top_p)
    if tokens is not None:
      kept |= jnp.arange(logits.shape[-1]) == tokens[..., None]
    return jnp.where(kept, logits, ILLEGAL)

  return policy._replace(limit=limit)


def _kept(logits, top_k: int, top_p: float):
  """bool [..., V]: the likeliest tokens."""
  kept = jnp.ones(logits.shape, bool)
  if top_k and top_k < logits.shape[-1]:
    kept = logits >= jax.lax.top_k(logits, top_k)[0][..., -1:]
  if top_p < 1:
    probs = jax.nn.softmax(jnp.where(kept, logits, ILLEGAL), axis=-1)
    kept &= probs >= _nucleus(probs, top_p)
  return kept


def _nucleus(probs, top_p: float):
  """The largest threshold at which what reaches it has mass `top_p`.

  float32 [..., 1]. Found by bisection over the bits of the numbers, which are
  ordered as they are: 31 sums, where sorting 256k tokens would move them.
  """

  def halve(_, ends):
    low, high = ends
    middle = low + (high - low) // 2
    threshold = jax.lax.bitcast_convert_type(middle, jnp.float32)
    mass = jnp.sum(
      jnp.where(probs >= threshold, probs, 0.0), axis=-1, keepdims=True
    )
    enough = mass >= top_p
    return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

  largest = jnp.max(probs, axis=-1, keepdims=True)
  high = jax.lax.bitcast_convert_type(largest, jnp.int32) + 1
  low, _ = jax.lax.fori_loop(0, 31, halve, (jnp.zeros_like(high), high))
  return jax.lax.bitcast_convert_type(low, jnp.float32)


def on_logits(policy: Policy, fn: Callable) -> Policy:
  """`policy` with `fn` applied to all its logits."""

  def start(weights, batch, length):
    logits, cache = policy.start(weights, batch, length)
    return fn(logits), cache

  def step(weights, cache, tokens):
    logits, cache = policy.step(weights, cache, tokens)
    return fn(logits), cache

  return policy._replace(
    head=lambda weights, x: fn(policy.head(weights, x)), start=start, step=step
  )


def guided(policy: Policy, guidance_scale: float) -> Policy:
  """Classifier-free guidance: scale l(. | prompt) + (1 - scale) l(. | uncond).

  Equation 1 of arXiv 2410.06084, on raw logits l. Scale 1 is `policy`, 0 is
  `policy` on the negative prompt `uncond`, more than 1 leads away from it. Both
  read the same response. They are rows 2b and 2b + 1 of one batch with one
  cache, so that a decoded token reads the weights once.
  """

  def mix(logits):
    with_prompt, without = logits
    return guidance_scale * with_prompt + (1 - guidance_scale) * without

  def split(x):
    """[2 B, *] -> (its even rows, its odd rows)."""
    pairs = x.reshape(-1, 2, *x.shape[1:])
    return pairs[:, 0], pairs[:, 1]

  def features(weights, batch):
    x, aux = policy.features(weights, _in_pairs(batch))
    # A pair for each array of features, as over_tokens walks any pytree.
    leaves, form = jax.tree.flatten(x)
    parts = zip(*(split(leaf) for leaf in leaves))
    return tuple(jax.tree.unflatten(form, part) for part in parts), aux

  def head(weights, x):
    return mix(tuple(policy.head(weights, part) for part in x))

  def start(weights, batch, length):
    logits, cache = policy.start(weights, _in_pairs(batch), length)
    return mix(split(logits)), cache

  def step(weights, cache, tokens):
    logits, cache = policy.step(weights, cache, jnp.repeat(tokens, 2))
    return mix(split(logits)), cache

  def take(cache, rows):
    pairs = jnp.stack([2 * rows, 2 * rows + 1], axis=1)
    return policy.take(cache, pairs.reshape(-1))

  return Policy(policy.view, features, head, start, step, take)


def under_guidance(model: Model, role: str, guidance_scale: float) -> Policy:
  """A model's role under guidance, over legal tokens; 1 needs no `uncond`."""
  if guidance_scale == 1:
    return model.policy(role)
  return model.legal(guided(model.bare(role), guidance_scale))


def _in_pairs(batch: Batch) -> Batch:
  """Every row twice, the second time with `uncond` for its prompt."""
  found = {name: batch[name].shape for name in batch if name in PROMPTS}
  if sorted(found) != sorted(PROMPTS) or len(set(found.values())) > 1:
    raise UserError(
      'guidance needs prompts and negative prompts of one width (batch fields '
      f"{PROMPTS}), found {found}; source 'sources.prompts' gives them where "
      'source.uncond is a text, or empty for none'
    )
  pairs = jnp.stack([batch[name] for name in PROMPTS], axis=1)
  out = {name: jnp.repeat(x, 2, axis=0) for name, x in batch.items()}
  return out | {'prompt': pairs.reshape(-1, pairs.shape[-1])}
