"""Every file in recipes/ on tiny parts: shapes, fields, determinism."""

import functools
import inspect
import os
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import alignjax
from alignjax import train
from alignjax.core import lookup
from alignjax.core.types import BATCH_FIELDS
from alignjax.data.sources import Rows
from alignjax.models.tabular import tabular
from alignjax.step import init_state, make_step
from alignjax.system.optimizer import optimizer
from tests import tiny
from tests.test_train import text_source

NAMES = sorted(
  path.stem
  for path in (Path(alignjax.__file__).parent / 'recipes').glob('[!_]*.py')
)
PATHS = ('whole', 'parts')
PARTS = {'reward': tiny.evenness, 'embedding': tiny.model()}
# What a recipe cannot do without: its own parts and numbers.
NEEDS = {'clp': ({'reward': tiny.two}, {'objectives': ('even', 'small')})}
# The first step of every recipe. If you did not mean to change behaviour, a
# failure is a bug.
GOLDEN = {
  'bond': {
    'entropy': 5.38641,
    'grad_norm': 23.614,
    'loss/backward': -0.0207891,
    'loss/forward': 34.3536,
    'reward': 0.5,
  },
  'cfg_distill': {'entropy': 5.39156, 'grad_norm': 3.79477, 'kl': 10.6642},
  'clp': {
    'entropy': 5.39168,
    'grad_norm': 5.87167,
    'loss/policy_gradient': 0.459893,
    'own/even': 0.424697,
    'reward': 0.532608,
    'reward/small': 0.572917,
  },
  'distill': {'grad_norm': 0.209069, 'loss/kl': 0.335489, 'nll': 5.66469},
  'embed': {
    'grad_norm': 2.65021,
    'loss/triplet': 0.0561622,
    'negative': 0.814105,
    'positive': 0.548845,
  },
  'gkd': {
    'entropy': 5.38641,
    'forward': 0.319915,
    'grad_norm': 0.0803026,
    'loss/jensen_shannon': 0.0743889,
  },
  'infalign': {
    'calibrated': 0.554688,
    'entropy': 5.39156,
    'grad_norm': 2.77496,
    'loss/policy_gradient': 0.103595,
    'reward': 0.5625,
  },
  'grpo': {
    'entropy': 5.39324,
    'grad_norm': 1.80611,
    'loss/kl': 0.313639,
    'reward': 0.526042,
  },
  'jbond': {
    'entropy': 5.38641,
    'grad_norm': 23.3716,
    'loss/backward': -0.393429,
    'loss/forward': 31.461,
    'reward': 0.5,
  },
  'ppo': {
    'entropy': 5.39116,
    'grad_norm': 3.60317,
    'loss/value': 0.10939,
    'returns': 0.4157,
    'reward': 0.541667,
  },
  'reinforce': {
    'entropy': 5.39156,
    'flat_groups': 0.25,
    'grad_norm': 4.52498,
    'loss/kl': 2.28468,
    'reward': 0.5625,
  },
  'sft': {'grad_norm': 2.29586, 'loss/nll': 5.66469},
  'warp': {
    'entropy': 5.34413,
    'grad_norm': 6.66564,
    'loss/policy_gradient': 0.0815517,
    'reward': 0.4875,
  },
}


def build(name, model=None):
  model = model or tiny.model()
  fn = lookup.find('recipes', name)
  own, changed = NEEDS.get(name, ({}, {}))
  given = PARTS | {'model': model, 'teacher': model} | own
  parts = [
    given[parameter.name]
    for parameter in inspect.signature(fn).parameters.values()
    if parameter.kind is not parameter.KEYWORD_ONLY
  ]
  numbers = lookup.defaults('recipes', name, **changed)
  if 'max_new_tokens' in numbers:
    numbers.max_new_tokens = 6
  return lookup.build('recipes', numbers, *parts)


def batch_for(recipe, name=''):
  if name == 'embed':
    return jax.tree.map(jnp.asarray, tiny.segment_source(batch_size=4).batch(0))
  if recipe.stages:
    batch = tiny.batch(4)
    ref_reward = jnp.linspace(0.0, 1.0, 8) * jnp.ones((4, 1))
    uncond = jnp.roll(batch['prompt'], 1, axis=0)
    return batch | {'ref_reward': ref_reward, 'uncond': uncond}
  return jax.tree.map(jnp.asarray, text_source(batch_size=4).batch(0))


@pytest.mark.parametrize('name', NAMES)
def test_three_steps(name):
  recipe = build(name)
  tx = optimizer(3, lr=1e-2)
  results = []
  start = init_state(recipe, tx, 0)
  step = jax.jit(make_step(recipe, tx))
  for _ in range(2):
    state = start
    for k in range(3):
      batch = train.stage_batch(recipe, state, batch_for(recipe, name), 0)
      assert set(batch) <= BATCH_FIELDS
      assert {len(field) for field in batch.values()} == {4}
      state, metrics = step(state, batch)
      if k == 0:
        first = {term: metrics[term].number for term in GOLDEN[name]}
        assert first == pytest.approx(GOLDEN[name], rel=1e-3, abs=1e-4)
    assert metrics['skipped'].number == 0
    assert all(np.isfinite(metric.number) for metric in metrics.values())
    results.append(state)
  moved = jax.tree.map(
    lambda a, b: float(jnp.abs(a - b).max()), start.params, state.params
  )
  assert min(jax.tree.leaves(moved)) > 0
  jax.tree.map(np.testing.assert_array_equal, *results)
  if 'logprob_gap' in metrics:
    assert metrics['logprob_gap'].number < 1e-4


class Interrupting:
  """A source that stops its run after batch `last`."""

  def __init__(self, rows, last):
    self.rows, self.last, self.told = rows, last, 0

  def __getattr__(self, name):
    return getattr(self.rows, name)

  def tell(self, batch):
    self.told += 1
    if self.told == self.last:
      os.kill(os.getpid(), signal.SIGTERM)


def rows_of_a_table(name):
  prompt = np.arange(16, dtype=np.int32)[:, None]
  fields = {
    'prompt': prompt,
    'uncond': prompt[::-1],
    'ref_reward': np.linspace(0, 1, 8, dtype='f4') * np.ones((16, 1), 'f4'),
  }
  if name == 'embed':  # two segments of each of two documents
    draw = np.random.default_rng(1).integers
    texts = draw(0, 8, (16, 4, 3), dtype=np.int32)
    fields = {'response': texts, 'mask': np.ones(texts.shape, bool)}
  return Rows(fields, [{}] * 16, 4, 0)


# On a table, which compiles fast; tests/chaos kills runs of a decoder, those of
# recipes without stages among them.
@pytest.mark.slow
@pytest.mark.parametrize('name', sorted({*NAMES} - {'sft', 'distill'}))
def test_an_interrupted_run_continues_bit_for_bit(name, tmp_path):
  table = np.random.default_rng(0).normal(size=(16, 8))
  recipe, tx = build(name, tabular(table)), optimizer(3, lr=1e-2)
  begin = jax.tree.map(np.asarray, init_state(recipe, tx, 0))

  def go(where, last=0):
    source = Interrupting(rows_of_a_table(name), last)
    state = jax.tree.map(jnp.asarray, begin)
    schedule = train.Schedule(steps=3, seed=5, save_every=9)
    return train.train(recipe, tx, source, state, schedule, workdir=where)

  whole, _ = go(tmp_path / 'whole')
  stopped, finished = go(tmp_path / 'parts', last=2)
  assert (int(stopped.step), finished) == (2, False)
  resumed, _ = go(tmp_path / 'parts')
  jax.tree.map(np.testing.assert_array_equal, whole, resumed)
  rows = [(tmp_path / x / 'metrics.jsonl').read_bytes() for x in PATHS]
  assert rows[0] == rows[1] and rows[0].count(b'\n') == 3


@pytest.mark.parametrize('name', ['grpo', 'ppo', 'reinforce'])
def test_microbatches_change_nothing(name):
  recipe = build(name)
  tx = optimizer(1, algorithm='sgd', b1=0.0, lr=0.1, clip_norm=0.0)
  state = init_state(recipe, tx, 0)
  batch = train.stage_batch(recipe, state, batch_for(recipe), 0)
  found = [
    jax.jit(make_step(recipe, tx, microbatches=parts))(state, batch)
    for parts in (1, 4)
  ]
  (state, metrics), (other, others) = found
  close = functools.partial(np.testing.assert_allclose, rtol=2e-5)
  jax.tree.map(functools.partial(close, atol=2e-6), state, other)
  # PPO's policy gradient is a mean near zero of terms of about 1, whose
  # rounding it keeps.
  jax.tree.map(functools.partial(close, atol=1e-5), metrics, others)


@pytest.mark.parametrize('name', NAMES)
def test_the_file_says_what_it_is(name):
  module = inspect.getmodule(lookup.find('recipes', name))
  assert module is not None and len(module.__doc__ or '') > 80


def test_alignment_raises_its_reward():
  # Not a bandit: a decoder that samples, scores, compares and learns.
  recipe = build('jbond')
  tx = optimizer(40, lr=1e-2)
  state = init_state(recipe, tx, 0)
  step = jax.jit(make_step(recipe, tx))
  source, rewards = tiny.prompt_source(batch_size=32), []
  for k in range(40):
    batch = jax.tree.map(jnp.asarray, source.batch(k))
    batch = train.stage_batch(recipe, state, batch, 0)
    state, metrics = step(state, batch)
    rewards.append(metrics['reward'].number)
  assert np.mean(rewards[-5:]) > np.mean(rewards[:5]) + 0.1
