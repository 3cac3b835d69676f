"""What a teacher says about a position: its whole distribution, or k ids of it.

A target is a part of `over_tokens` whose head gives a `Target`, so that a model
that runs in the step and records from disk are the same thing to an objective,
and a teacher's logits exist for one chunk of positions only.

  full      every id; the exact gradient, q - p.
  top_k     the k likeliest ids, renormalised. Biased for ever: the tail is
            missing from every target, and the head has its mass.
  counts    k draws with replacement, each of mass 1 / k. Unbiased for any k.
  distinct  the distinct ones of k such draws, p renormalised over them.
            Biased to the head for k > 1; the bias goes as k covers the mass.

Of Gemma 3's "256 logits per token, weighted by teacher probabilities" (arXiv
2503.19786, section 2.2), `distinct` is the literal reading and `counts` the one
without bias. Draws are of fold_in(key(draw_seed), row id) and the position: a
row has the same ids whenever and wherever it comes.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from alignjax.core.errors import UserError
from alignjax.core.types import Batch, Bundle, Policy
from alignjax.losses.divergence import ABSENT, sparse
from alignjax.losses.logprob import over_tokens, targets

KINDS = ('full', 'top_k', 'counts', 'distinct')
NORMALISERS = ('full', 'ids')
Part = tuple[Any, Any, Any]  # head, weights, features of `over_tokens`


class Target(NamedTuple):
  """A distribution, as logits; with `ids`, 0 for every other id.

  Attributes:
    ids: int32 [..., k], or None: outcome i is id i.
    logits: f32 [..., k], `ABSENT` in slots that are not used; [..., V].
  """

  ids: Array | None
  logits: Array


class Head(NamedTuple):
  """A policy that only has a head."""

  head: Callable[[Any, Any], Target]


def check(kind: str, k: int, normaliser: str) -> None:
  """UserError unless the numbers of a target make sense."""
  for field, found, known in (
    ('targets', kind, KINDS),
    ('normaliser', normaliser, NORMALISERS),
  ):
    if found not in known:
      raise UserError(
        f'recipe.{field}: found {found!r}, expected one of {list(known)}'
      )
  if k < 1:
    raise UserError(f'recipe.k: found {k}, expected 1 or more ids')


def online(
  teacher: Policy,
  bundle: Bundle,
  batch: Batch,
  *,
  kind: str,
  k: int,
  draw_seed: int,
) -> Part:
  """The part of a teacher that runs here; nothing flows back into it.

  Raises UserError, while tracing, if `top_k` is to give more ids than exist.
  """
  weights = teacher.view(bundle, batch)
  features = teacher.features(weights, batch)[0]
  weights, features = jax.lax.stop_gradient((weights, features))
  if kind in ('full', 'top_k'):

    def plain(weights, features):
      logits = teacher.head(weights, features)
      return Target(None, logits) if kind == 'full' else top_k(logits, k)

    return Head(plain), weights, features

  def drawn(weights, features):
    x, keys = features
    logits = teacher.head(weights, x)
    return from_draws(logits, draws(logits, keys, k), kind)

  keys = _keys(draw_seed, batch['id'], targets(batch)[0].shape)
  return Head(drawn), weights, (features, keys)


def recorded(batch: Batch) -> Part:
  """The part of a teacher that was written down: `teacher_ids`, `_probs`."""

  def head(weights, features):
    del weights
    ids, probs = features
    logits = jnp.log(jnp.where(probs > 0, probs, 1))
    return Target(ids, jnp.where(probs > 0, logits, ABSENT))

  return Head(head), (), (batch['teacher_ids'], batch['teacher_probs'])


def outcomes(
  target: Target, logits: Array, *, normaliser: str
) -> tuple[Array, Array]:
  """(p, q) as logits over the same outcomes, for a divergence.

  `normaliser` of q, where the target has ids: 'full' pushes all other ids down,
  'ids' compares within the ids and so identifies ratios only. Rows of either
  embedding beyond the other's are no tokens, and are left out.
  """
  if target.ids is not None:
    restricted = normaliser == 'ids'
    return sparse(target.ids, target.logits, logits, restricted=restricted)
  size = min(target.logits.shape[-1], logits.shape[-1])
  return target.logits[..., :size], logits[..., :size]


def likeliest(target: Target) -> Array:
  """The id to which a target gives most, int32 [...]."""
  best = jnp.argmax(target.logits, axis=-1)
  if target.ids is None:
    return best
  return jnp.take_along_axis(target.ids, best[..., None], axis=-1)[..., 0]


def top_k(logits: Array, k: int) -> Target:
  """The k likeliest ids of [..., V]."""
  if k > logits.shape[-1]:
    raise UserError(
      f'recipe.k = {k} is more than the {logits.shape[-1]} ids that the '
      "teacher's vocabulary has"
    )
  logits, ids = jax.lax.top_k(logits.astype(jnp.float32), k)
  return _target(ids, logits)


def draws(logits: Array, keys: Array, k: int) -> Array:
  """k ids of softmax(logits) with replacement, sorted: int32 [t, k].

  `logits` [t, V], `keys` uint32 [t, 2]. By the inverse of the distribution
  function: V + k log V work, where Gumbel noise would take k V.
  """
  upto = jnp.cumsum(jax.nn.softmax(logits.astype(jnp.float32)), axis=-1)

  def one(key, upto):
    at = jax.random.uniform(jax.random.wrap_key_data(key), (k,)) * upto[-1]
    return jnp.searchsorted(upto, jnp.sort(at), side='right')

  ids = jax.vmap(one)(keys, upto)
  return jnp.minimum(ids, logits.shape[-1] - 1).astype(jnp.int32)


def from_draws(logits: Array, ids: Array, kind: str) -> Target:
  """The target of sorted draws [t, k]: 'counts' or 'distinct'."""

  def number(ids):
    below = jnp.searchsorted(ids, ids, side='left')
    return jnp.searchsorted(ids, ids, side='right') - below

  first = jnp.pad(ids[:, 1:] != ids[:, :-1], ((0, 0), (1, 0)))
  first = first.at[:, 0].set(True)
  if kind == 'counts':
    values = jnp.log(jax.vmap(number)(ids).astype(jnp.float32))
  else:
    values = jnp.take_along_axis(logits.astype(jnp.float32), ids, axis=-1)
  # An id that was drawn again keeps one slot.
  return _target(ids, jnp.where(first, values, ABSENT))


def writer(
  teacher: Policy, *, kind: str, k: int, draw_seed: int
) -> Callable[[Bundle, Batch], tuple[Array, Array]]:
  """A jitted (bundle, batch) -> (teacher_ids, teacher_probs), for records."""

  @jax.jit
  def write(bundle, batch):
    part = online(teacher, bundle, batch, kind=kind, k=k, draw_seed=draw_seed)
    tokens, mask = targets(batch)

    def read(target: Target, tokens):
      del tokens
      return target.ids, jnp.exp(target.logits)

    ids, probs = over_tokens(read, [part], tokens)
    mask = mask[..., None]
    return jnp.where(mask, ids, 0), jnp.where(mask, probs, 0.0)

  return write


def _target(ids: Array, logits: Array) -> Target:
  logits = jnp.maximum(jax.nn.log_softmax(logits, axis=-1), ABSENT)
  # An unused slot may name a row that the policy does not have.
  return Target(jnp.where(logits > ABSENT / 2, ids, 0), logits)


def _keys(draw_seed: int, ids: Array, shape: tuple[int, ...]) -> Array:
  """Raw keys [*shape, 2], one per position of each row."""
  count = math.prod(shape[1:])
  fold = jax.vmap(jax.random.fold_in, (None, 0))
  rows = fold(jax.random.key(draw_seed), ids)
  keys = jax.vmap(lambda row: fold(row, jnp.arange(count)))(rows)
  return jax.random.key_data(keys).reshape(*shape, -1)
