"""Closed forms of the online recipes on the bandit of `bandit`."""

import numpy as np

from alignjax.stages.rollout import enumerate_arms
from tests.oracles import bandit


def tilt(strength, ref=bandit.REF, rewards=bandit.REWARD):
  """ref exp(strength r) / Z: the optimum of r - KL / strength."""
  p = ref * np.exp(strength * rewards)
  return p / p.sum()


def exactly(recipe, model, count):
  """`recipe` with all outcomes of `count` draws instead of samples."""
  arms = enumerate_arms([(model.policy('policy'), count)], arms=5)
  return recipe._replace(stages=(arms, *recipe.stages[1:]))


def annealed(first, decay):
  """A decaying step of the natural gradient."""
  return bandit.natural_gradient(lambda step: first / (1 + decay * step))
