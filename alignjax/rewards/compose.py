"""Rewards made of rewards.

`parts` are the rewards inside and `join` makes their scores into one array, so
that whoever scores can run each part where it belongs: a verifier on the host,
a model on the device. Called directly, a composed reward runs all of it.
"""

import inspect
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from alignjax.core import lookup
from alignjax.core.errors import UserError
from alignjax.core.types import Key, Params, Reward
from alignjax.losses import calibration

Scores = Float[Array, 'B N K']
Context = Mapping[str, Any]  # tokens, source, reward_model: what there is


def build(section: Mapping[str, Any], context: Context) -> Reward:
  """The reward of a section.

  Its function gets `tokens` first, whatever it calls it, then what its other
  positional parameters name: `source`, `reward_model` (a Model), or `context`
  for all of it.

  Raises UserError for what the context does not have.
  """
  fn = lookup.find('rewards', section['name'])
  given = []
  for name, parameter in list(inspect.signature(fn).parameters.items())[1:]:
    if parameter.kind is parameter.KEYWORD_ONLY:
      continue
    found = context if name == 'context' else context.get(name)
    if found is None:
      raise UserError(
        f'reward {section["name"]!r} needs {name!r}, which is not here; here '
        f'are {sorted(context)}'
      )
    given.append(found)
  return lookup.build('rewards', section, context['tokens'], *given)


def roles(reward: Reward) -> dict[str, Callable[[Key], Params]]:
  """The frozen roles that a reward reads, and their initialisers."""
  found = dict(getattr(reward, 'roles', {}))
  for part in getattr(reward, 'parts', ()):
    found |= roles(part)
  return found


def joined(
  parts: Sequence[Reward],
  join: Callable[..., Scores],
  names: Sequence[str],
) -> Reward:
  """The reward join(*scores of the parts), which tells `names`."""

  def reward(bundle, batch, key) -> Any:
    return join(*[part(bundle, batch, key) for part in parts])

  reward.parts = tuple(parts)
  reward.join = join
  reward.names = tuple(names)
  return reward


def beside(reward: Reward, other: Reward) -> Reward:
  """The scores of `reward`, and then those of `other`."""
  names = [n for x in (reward, other) for n in getattr(x, 'names', ('reward',))]
  return joined(
    [reward, other], lambda *scores: jnp.concatenate(scores, axis=-1), names
  )


def stack(
  tokens: Any, context: Context, *, parts: dict, weights: dict | None = None
) -> Reward:
  """The weighted sum of several rewards, then each of them.

  Args:
    tokens, context: for the parts.
    parts: name -> section of a reward.
    weights: name -> weight, default 1. A weight of 0 only logs.

  Scores [B, N, 1 + K]: the sum, every part's first score, then the other
  scores of the parts, named part/score.
  """
  if not parts:
    raise UserError('reward.parts: nothing to stack')
  weights = dict(weights or {})
  for name in weights:
    if name not in parts:
      raise UserError(
        f'reward.weights: no part {name!r}{lookup.nearest(name, parts)}'
      )
  built = [build(part, context) for part in parts.values()]
  factors = [float(weights.get(name, 1.0)) for name in parts]
  more = [
    f'{name}/{other}'
    for name, part in zip(parts, built)
    for other in getattr(part, 'names', ())[1:]
  ]

  def join(*scores):
    total = sum(w * x[..., :1] for w, x in zip(factors, scores))
    first, rest = [x[..., :1] for x in scores], [x[..., 1:] for x in scores]
    return jnp.concatenate([total, *first, *rest], axis=-1)

  return joined(built, join, ('reward', *parts, *more))


def affine(
  tokens: Any,
  context: Context,
  *,
  part: dict,
  scale: float = 1.0,
  shift: float = 0.0,
) -> Reward:
  """scale * r + shift of a reward's first score."""
  return _mapped(context, part, lambda r: scale * r + shift)


def clipped(
  tokens: Any,
  context: Context,
  *,
  part: dict,
  low: float = -1.0,
  high: float = 1.0,
) -> Reward:
  """A reward's first score, kept in [low, high]."""
  if not low < high:
    raise UserError(f'reward: low = {low} is not below high = {high}')
  return _mapped(context, part, lambda r: jnp.clip(r, low, high))


def standardised(
  tokens: Any,
  context: Context,
  *,
  part: dict,
  mean: float | None = None,
  std: float | None = None,
  path: str = '',
) -> Reward:
  """(r - mean) / std of a reward's first score, with stored statistics.

  Rewards that are added up should be of one scale. The statistics are given,
  or those of a calibration at `path` (`alignjax calibrate`): fixed numbers, so
  that the objective does not move with the policy.
  """
  if path:
    rewards = _calibration(path)
    mean, std = float(rewards.mean()), float(rewards.std())
  if mean is None or std is None:
    raise UserError('reward: standardised needs mean and std, or path')
  if not std > 0:
    raise UserError(
      f'reward: std = {std}: a reward that is always {mean} has no scale'
    )
  return _mapped(context, part, lambda r: (r - mean) / std)


def transformed(
  tokens: Any, context: Context, *, part: dict, fn: str
) -> Reward:
  """A function of a reward's first score; `fn` is its dotted name."""
  return _mapped(context, part, lookup.find('rewards', fn))


def calibrated(
  tokens: Any,
  context: Context,
  *,
  part: dict,
  transform: str = 'identity',
  scale: float = 0.0,
  floor: float = 0.005,
) -> Reward:
  """Phi(C): C the chance that a reward beats a reference response's.

  The rewards of the reference's responses come with the rows, from the source
  `calibrated`; they must be those of `part` alone. This makes a reward of any
  scale one in [0, 1], prompt by prompt, for any recipe (InfAlign, arXiv
  2412.19792).

  Args:
    tokens, context, part: the reward, of which the first score is meant.
    transform, scale, floor: Phi, as in `losses.calibration.transform`.

  Scores [B, N, 1 + K]: Phi(C), named calibrated, then those of the part.
  Raises UserError where a batch has no `ref_reward`.
  """
  del tokens
  phi = calibration.transform(transform, scale, floor)
  inner = build(part, context)

  def references(bundle, batch, key):
    del bundle, key
    if 'ref_reward' not in batch:
      raise UserError(
        'compose.calibrated: rows without ref_reward; the source must be '
        'calibrated (rewards of reference responses to each of its prompts)'
      )
    found = batch['ref_reward'][:, None, :]
    return jnp.repeat(found, batch['response'].shape[1], axis=1)

  def join(scores, references):
    chance = calibration.calibrated(scores[..., :1], references)
    return jnp.concatenate([phi(chance), scores], axis=-1)

  names = 'calibrated', *getattr(inner, 'names', ('reward',))
  return joined([inner, references], join, names)


class _Late(BaseException):
  """The limit has passed. No `except Exception` of a reward swallows it."""


def bounded(
  tokens: Any,
  context: Context,
  *,
  part: dict,
  limit_s: float = 10.0,
  score: float = 0.0,
) -> Reward:
  """A host reward that may raise or hang, prompt by prompt.

  A prompt whose responses are not scored within `limit_s` seconds, or whose
  scoring raises, gets `score` for all of them; its error and text go to stderr.
  A last score, `failed`, says where. What took too long once may not the next
  time: such a run is not repeated bit for bit.

  The limit is an alarm signal, which Python handles in the main thread, where
  training scores: it ends a loop, a sleep, a regular expression. A call into C
  that looks for no signals ends when it returns, and in another thread there is
  no limit.
  """
  inner = build(part, context)
  if part['name'] == 'compose.bounded':  # there is one alarm
    raise UserError('reward: a reward can be bounded once')
  if not getattr(inner, 'host', False):
    raise UserError('reward: only a reward of the host can be bounded')
  if limit_s <= 0:
    raise UserError(f'reward.limit_s = {limit_s}: expected more than 0')
  known = tuple(getattr(inner, 'names', ('reward',)))

  def one(bundle, batch, key, row):
    part: Any = {n: np.asarray(x)[row : row + 1] for n, x in batch.items()}
    with _limit(limit_s):
      found = np.asarray(inner(bundle, part, key), np.float32)
    expected = (1, batch['mask'].shape[1], len(known))
    if found.shape != expected:
      raise ValueError(f'scores of shape {found.shape}, expected {expected}')
    if not np.isfinite(found).all():
      raise ValueError('a score that is not a finite number')
    return found[0]

  def reward(bundle, batch, key) -> Any:
    rows, count, _ = np.shape(batch['mask'])
    out = np.zeros((rows, count, len(known) + 1), np.float32)
    for row in range(rows):
      try:
        out[row, :, :-1] = one(bundle, batch, key, row)
      except (Exception, _Late) as error:
        out[row, :, 0], out[row, :, -1] = score, 1
        _tell(error, tokens, batch, row)
    return out

  reward.host = True
  reward.names = (*known, 'failed')
  return reward


def _tell(error: BaseException, tokens: Any, batch: Any, row: int) -> None:
  prompt = tokens.decode(np.asarray(batch['prompt'])[row].tolist())
  kind = '' if isinstance(error, _Late) else f'{type(error).__name__}: '
  why = f'{kind}{error}'.rstrip(': ')
  print(
    f'reward of prompt {int(np.asarray(batch["id"])[row])} failed ({why}): '
    f'{prompt[:200]!r}',
    file=sys.stderr,
  )


@contextmanager
def _limit(seconds: float) -> Iterator[None]:
  """_Late inside the block after that long, in the main thread."""
  if threading.current_thread() is not threading.main_thread():
    yield
    return

  def late(number, frame):
    raise _Late(f'no score after {seconds:g} s')

  before = signal.signal(signal.SIGALRM, late)
  signal.setitimer(signal.ITIMER_REAL, seconds)
  try:
    yield
  finally:
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def _mapped(context: Context, part: Mapping[str, Any], fn) -> Reward:
  inner = build(part, context)

  def join(scores):
    return jnp.concatenate([fn(scores[..., :1]), scores[..., 1:]], axis=-1)

  return joined([inner], join, getattr(inner, 'names', ('reward',)))


def _calibration(path: str) -> np.ndarray:
  file = Path(path) / 'rewards.npy'
  try:
    return np.load(file, allow_pickle=False)
  except (OSError, ValueError) as error:
    raise UserError(f'reward.path: {file}: not readable ({error})') from None
