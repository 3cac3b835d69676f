"""What a plan takes for the parts of a run that are not here or not needed.

A tokenizer without its file, records that nobody reads, and the shapes of a
reward in place of the reward.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp

from alignjax.core.types import Reward
from alignjax.rewards import compose


class Tokens(NamedTuple):
  """A stand-in for a tokenizer file that is not here: every row is legal."""

  size: int
  pad: int = 0
  eos: int = 1
  bos: int = 2
  stop: tuple[int, ...] = (1,)
  illegal: tuple[int, ...] = (0, 2)
  system: bool = False

  def decode(self, ids) -> str:
    """No text: what a host reward sees while shapes are found."""
    del ids
    return ''


class Records:
  """A stand-in for a source, which a plan does not read."""

  def records(self, ids) -> list['Fact']:
    return [Fact() for _ in ids]


class Fact(dict):
  """A record in which every field is there, and a number."""

  def __contains__(self, key):
    return True

  def __getitem__(self, key):
    return '0'


def without_host(reward: Reward) -> Reward:
  """A reward whose parts on the host leave only their shapes."""
  if parts := getattr(reward, 'parts', ()):
    inner = [without_host(part) for part in parts]
    return compose.joined(inner, reward.join, reward.names)
  if not getattr(reward, 'host', False):
    return reward
  return unscored(getattr(reward, 'names', ('reward',)))


def unscored(names: Sequence[str] = ('reward',)) -> Reward:
  """A reward of shapes only, in place of one that runs on the host."""

  def reward(bundle, batch, key):
    del bundle, key
    return jnp.zeros((*batch['response'].shape[:2], len(names)), jnp.float32)

  reward.names = tuple(names)
  return reward
