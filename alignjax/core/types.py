"""The vocabulary of alignjax: containers and records of pure functions.

Nothing here computes. A training method is a `Recipe`: an objective, the roles
it needs, who follows whom, and the stages that fill a batch. The loop
(`alignjax.train`) knows these words and no method.

Batch fields. Every field leads with B (rows: prompts or sequences); N is the
axis of responses to one prompt, R response tokens, P prompt tokens, K reward
objectives or condition weights, T positions. `seq_*` means summed over tokens.

  id          int32 [B]        row of the source; `Source.records` has the rest
  prompt      int32 [B, P]     left-padded to one width
  uncond      int32 [B, P]     prompt of the unconditional branch (guidance)
  plain_prompt int32 [B, P']  `prompt` without what only the policy is told
  response    int32 [B, N, R]  sampled tokens; the stop token belongs to it
  mask        bool  [B, N, R]  True on response tokens, stop token included
  sample_logp f32   [B, N, R]  log-probability under the sampling distribution
  ref_logp    f32   [B, N, R]  log-probability under the reference or anchor
  value       f32   [B, N, R]  value estimate before the token
  returns     f32   [B, N, R]  what a value estimate is trained towards
  advantage   f32   [B, N, R]  what multiplies grad log pi
  rewards     f32   [B, N, K]  every score; named by the reward's `names`
  reward      f32   [B, N]     the one number that is optimised: rewards[..., 0]
  ref_reward  f32   [B, M]     rewards of M reference responses, made before
  weight      f32   [B, N]     weight of a response in the loss
  condition   f32   [B, K]     mixing weights of a conditioned policy
  tokens      int32 [B, T]     a plain sequence
  loss_mask   bool  [B, T]     True where the token is to be predicted
  segment     int32 [B, T]     packed document index, 0 = padding
  position    int32 [B, T]     position inside its document
  teacher_ids   int32 [B, T-1, k]  ids that a teacher was written down for
  teacher_probs f32   [B, T-1, k]  their probabilities; 0 where there is no loss
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, dataclass_transform

import jax
import jax.numpy as jnp
from jaxtyping import Array

Params = Any  # nested dict of arrays: one model
Bundle = Mapping[str, Params]  # role -> Params
Batch = dict[str, Array]
Key = Array
Weights = Any  # what Policy.view returns; opaque to everything else
Features = Any
Cache = Any

BATCH_FIELDS = frozenset(
  'id prompt uncond plain_prompt response mask sample_logp ref_logp value'
  ' advantage returns rewards reward ref_reward weight condition tokens'
  ' loss_mask segment position teacher_ids teacher_probs'.split()
)


@dataclass_transform(frozen_default=True)
def _struct(cls):
  cls = dataclasses.dataclass(frozen=True)(cls)
  return jax.tree_util.register_dataclass(cls)


@_struct
class Mean:
  """A mean kept as total and weight, so that parts add up exactly.

  `a + b` is the mean over both parts (microbatches, minibatches, hosts).
  """

  total: Array
  weight: Array

  @classmethod
  def of(cls, x: Array, weight: Array) -> 'Mean':
    """Mean of `x` under `weight` (same shape; a mask or numbers)."""
    weight = weight.astype(jnp.float32)
    return cls(jnp.sum(x * weight), jnp.sum(weight))

  def __add__(self, other: 'Mean') -> 'Mean':
    return Mean(self.total + other.total, self.weight + other.weight)

  def fold(self) -> 'Mean':
    """Adds up a leading axis of parts."""
    return Mean(jnp.sum(self.total, axis=0), jnp.sum(self.weight, axis=0))

  @property
  def value(self) -> Array:
    """total / weight; 0 where nothing was counted."""
    empty = self.weight == 0
    return jnp.where(empty, 0.0, self.total / jnp.where(empty, 1, self.weight))

  @property
  def number(self) -> float:
    """`value` on the host, without dispatching anything to a device."""
    return float(self.total) / float(self.weight) if self.weight else 0.0


@_struct
class Peak:
  """The largest value seen, for metrics whose worst case is the point."""

  total: Array  # scalar

  def __add__(self, other: 'Peak') -> 'Peak':
    return Peak(jnp.maximum(self.total, other.total))

  def fold(self) -> 'Peak':
    """The largest of a leading axis of parts."""
    return Peak(jnp.max(self.total, axis=0))

  @property
  def value(self) -> Array:
    return self.total

  @property
  def number(self) -> float:
    return float(self.total)


Metrics = Mapping[str, Mean | Peak]
# term -> (coefficient, Mean). Terms with different denominators never mix.
Loss = dict[str, tuple[float, Mean]]


def _unlimited(logits: Array, tokens: Array | None) -> Array:
  del tokens
  return logits


class Policy(NamedTuple):
  """A next-token distribution, as pure functions of weights.

  Feature i of a response (or of `tokens[:, 1:]`) predicts exactly that token:
  the shift by one lives in the policy and nowhere else.

  Attributes:
    view: (Bundle, Batch) -> Weights. Work done once per call: cast, mix, fold.
    features: (Weights, Batch) -> (features, aux loss). Features are
      [B, N, R, *] for a batch with responses, [B, T-1, *] for plain tokens.
    head: (Weights, features [..., *]) -> float32 logits [..., V].
    start: (Weights, Batch, length) -> (logits [B, V], Cache). Prefill of
      `prompt` into a cache for `length` positions in all.
    step: (Weights, Cache, int32 [B]) -> (logits [B, V], Cache).
    take: (Cache, int32 [B']) -> Cache. Gathers rows.
    limit: (logits [..., V], tokens [...] or None) -> logits [..., V]. Which
      tokens can be drawn at all; a token that was drawn, could be. Sampler and
      scorers apply it last.
  """

  view: Callable[[Bundle, Batch], Weights]
  features: Callable[[Weights, Batch], tuple[Features, Loss]]
  head: Callable[[Weights, Features], Array]
  start: Callable[[Weights, Batch, int], tuple[Array, Cache]]
  step: Callable[[Weights, Cache, Array], tuple[Array, Cache]]
  take: Callable[[Cache, Array], Cache]
  limit: Callable[[Array, Array | None], Array] = _unlimited


Scalar = Callable[[Bundle, Batch], Array]  # -> float32 [B, N, R]
Embed = Callable[[Bundle, Batch], Array]  # -> float32 [B, N, E], unit rows


class Model(NamedTuple):
  """What a recipe gets for the word `model` in a config.

  Attributes:
    init: key -> Params.
    policy: role -> Policy over legal tokens only (PAD and rows beyond the
      tokenizer cannot be sampled and carry no probability).
    stop: ids that end a response.
    pad: id written after the end of a response.
    scalar_init: key -> Params of the same net with a scalar head.
    scalar: role -> Scalar. Response token i gets the number of what precedes
      it: the prompt and i tokens.
    bare: role -> Policy, raw logits of every row: what combinations are made
      of. `policy(role)` is `legal(bare(role))`.
    legal: Policy -> the same over legal tokens only.
    embed_init: (key, size) -> Params of the same net with an embedding head.
    embed: role -> Embed: a vector for each response, whatever its prompt.
  """

  init: Callable[[Key], Params]
  policy: Callable[[str], Policy]
  stop: tuple[int, ...]
  pad: int
  scalar_init: Callable[[Key], Params]
  scalar: Callable[[str], Scalar]
  bare: Callable[[str], Policy]
  legal: Callable[[Policy], Policy]
  embed_init: Callable[..., Params]
  embed: Callable[[str], Embed]


Objective = Callable[[Bundle, Batch, Key], tuple[Loss, Metrics]]
Stage = Callable[[Bundle, Batch, Key], Batch]
# -> [B, N, K]. A reward function may carry `names`, a tuple of K strings. The
# first score is the one optimised; the others are logged. One that runs on the
# host says `host = True`: it gets NumPy arrays, and of several hosts' rows only
# those it is to answer for.
Reward = Callable[[Bundle, Batch, Key], Array]
Judge = Callable[[Bundle, Batch, Array, Key], Array]  # pairs [P, 2] -> [B, P]


class Source(Protocol):
  """Batches as a function of (seed, k)."""

  @property
  def listens(self) -> bool:
    """Whether `tell` may change later batches; then none is drawn ahead."""
    ...

  def batch(self, k: int) -> dict[str, Any]:
    """Batch k, the same for every process layout."""
    ...

  def batches(self, start: int) -> Iterator[dict[str, Any]]:
    """Batches start, start + 1, ...; may be prefetched."""
    ...

  def records(self, ids: Any) -> list[dict[str, Any]]:
    """Host facts of rows: the text, a reference answer."""
    ...

  def state(self) -> dict[str, Any]:
    """What else, beside k, the next batch depends on. JSON."""
    ...

  def restore(self, state: dict[str, Any]) -> None: ...

  def tell(self, batch: Batch) -> None:
    """Feedback from a finished step; most sources ignore it."""
    ...


class Follow(NamedTuple):
  """A frozen role that moves after every step: `me = fn(step, leader, me)`."""

  leader: str
  fn: Callable[[Array, Params, Params], Params]


class Mixed(NamedTuple):
  """A role whose parameters are several models, mixed by `condition`.

  Attributes:
    make: a plain model's Params -> those of the role.
    names: what each of the K entries of `condition` weighs.
  """

  make: Callable[[Params], Params]
  names: tuple[str, ...]


class Recipe(NamedTuple):
  """A training method.

  Attributes:
    objective: what the step differentiates, with respect to trained roles.
    init: every role's initialiser. Where weights come from is config.
    follow: frozen roles and how they move; None = fixed. Others are trained.
    stages: between steps; may decode, call the host, look across prompts.
    prepare: inside the jitted microbatch; per row only.
    updates: optimizer updates per staged batch, over seeded minibatches.
    mixed: roles made of plain models; `init` and config give the plain one.
  """

  objective: Objective
  init: Mapping[str, Callable[[Key], Params]]
  follow: Mapping[str, Follow | None] = {}
  stages: Sequence[Stage] = ()
  prepare: Sequence[Stage] = ()
  updates: int = 1
  mixed: Mapping[str, Mixed] = {}


@_struct
class TrainState:
  """Everything a step reads and writes; what a checkpoint holds.

  `skipped` counts the non-finite updates in a row.
  """

  step: Array
  params: Bundle
  frozen: Bundle
  opt_state: Any
  skipped: Array

  def replace(self, **changes) -> 'TrainState':
    return dataclasses.replace(self, **changes)  # pyright: ignore
