"""The step and the loop: exact microbatches, followers, skips, signals."""

import json
import os
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from alignjax import train
from alignjax.core.errors import UserError
from alignjax.core.types import Follow, Mean, Recipe
from alignjax.data import pack, sources
from alignjax.recipes.jbond import jbond
from alignjax.recipes.sft import sft
from alignjax.step import init_state, make_step
from alignjax.system import metrics
from alignjax.system.optimizer import optimizer
from tests import tiny

MODEL = tiny.model()


def text_source(batch_size=8, seed=0):
  rng = np.random.default_rng(seed)
  documents = [
    (rng.integers(6, 262, length).tolist(), [True] * length)
    for length in rng.integers(4, 30, 60)
  ]
  fields = pack.pack(documents, 32)
  return sources.Rows(fields, [{}] * len(fields['tokens']), batch_size, seed)


def one_step(recipe, batch, *, microbatches=1, seed=0, tx=None):
  # Not Adam: its first step divides tiny gradients by themselves.
  tx = tx or optimizer(10, algorithm='sgd', lr=1.0)
  state = init_state(recipe, tx, seed)
  step = jax.jit(make_step(recipe, tx, seed=seed, microbatches=microbatches))
  return step(state, train.stage_batch(recipe, state, batch, seed))


def test_microbatches_are_exact_with_uneven_masks():
  recipe = sft(MODEL)
  batch = jax.tree.map(jnp.asarray, text_source().batch(0))
  # Rows of very different weight: a mean of means would be another number.
  batch['loss_mask'] = batch['loss_mask'].at[1::2, 5:].set(False)
  whole, metrics_1 = one_step(recipe, batch)
  for microbatches in (2, 8):
    split, metrics_m = one_step(recipe, batch, microbatches=microbatches)
    for a, b in zip(
      jax.tree.leaves(whole.params), jax.tree.leaves(split.params)
    ):
      np.testing.assert_allclose(a, b, atol=4e-6)
    np.testing.assert_allclose(
      metrics_1['nll'].value, metrics_m['nll'].value, rtol=1e-5
    )


def test_updates_go_over_every_row_once():
  # The objective counts rows; three minibatches of two rows make three steps.
  def objective(bundle, batch, key):
    seen = Mean.of(batch['id'].astype(jnp.float32), jnp.ones(2))
    loss = Mean.of(bundle['policy']['x'] * batch['id'], jnp.ones(2))
    return {'x': (1.0, loss)}, {'id': seen}

  recipe = Recipe(
    objective, {'policy': lambda key: {'x': jnp.zeros(())}}, updates=3
  )
  tx = optax.sgd(1.0)
  batch = {'id': jnp.arange(6)}
  state, found = one_step(recipe, batch, tx=tx)
  assert float(found['id'].total) == sum(range(6))
  assert float(state.params['policy']['x']) == -sum(range(6)) / 2


def test_followers_move_after_the_update_and_in_float32():
  recipe = Recipe(
    lambda bundle, batch, key: (
      {'x': (1.0, Mean.of(-bundle['policy']['x'][None], jnp.ones(1)))},
      {},
    ),
    {role: lambda key: {'x': jnp.zeros(())} for role in ('policy', 'anchor')},
    follow={
      'anchor': Follow(
        'policy',
        lambda step, leader, me: jax.tree.map(
          lambda a, b: 0.5 * a + 0.5 * b, leader, me
        ),
      )
    },
  )
  state, _ = one_step(recipe, {'id': jnp.zeros(1, int)}, tx=optax.sgd(1.0))
  assert float(state.params['policy']['x']) == 1.0
  assert float(state.frozen['anchor']['x']) == 0.5


def poisoned(bad_steps):
  """A loss that is NaN at the given steps (ids of rows are steps)."""

  def objective(bundle, batch, key):
    bad = jnp.isin(batch['id'], jnp.array(bad_steps))
    x = jnp.where(bad, jnp.nan, bundle['policy']['x'])
    return {'x': (1.0, Mean.of(x, jnp.ones(1)))}, {}

  return Recipe(objective, {'policy': lambda key: {'x': jnp.zeros(())}})


class Steps(sources.Rows):
  """Row k is batch k."""

  def batch(self, k):
    return {'id': np.array([k], np.int32), 'tokens': np.zeros((1, 1))}


def steps_source():
  return Steps({'id': np.arange(100)}, [], 1, 0)


def run(recipe, workdir, schedule, **changes):
  tx = optax.sgd(1.0)
  state = init_state(recipe, tx, schedule.seed)
  return train.train(
    recipe, tx, steps_source(), state, schedule, workdir=workdir, **changes
  )


def test_non_finite_steps_are_skipped_and_counted(tmp_path):
  state, finished = run(
    poisoned([2, 3, 5]), tmp_path, train.Schedule(steps=8, max_bad_steps=3)
  )
  assert finished
  assert float(state.params['policy']['x']) == -5.0  # 8 steps, 3 skipped
  rows = metrics.read(tmp_path / 'metrics.jsonl')
  assert [row['skipped'] for row in rows] == [0, 0, 1, 2, 0, 1, 0, 0]


def test_too_many_in_a_row_end_the_run(tmp_path):
  with pytest.raises(UserError, match='step 6: .* 3 steps in a row'):
    run(
      poisoned([3, 4, 5, 6]),
      tmp_path,
      train.Schedule(steps=9, max_bad_steps=3, save_every=2),
    )


def test_a_signal_saves_and_the_next_call_continues(tmp_path):
  class Interrupted(Steps):
    def tell(self, batch):
      if batch['id'][0] == 4:
        os.kill(os.getpid(), signal.SIGTERM)

  recipe, tx = poisoned([2]), optax.sgd(1.0)
  schedule = train.Schedule(steps=9)

  def go(source, where):
    state = init_state(recipe, tx, 0)
    return train.train(recipe, tx, source, state, schedule, workdir=where)

  interrupted = Interrupted({'id': np.arange(100)}, [], 1, 0)
  state, finished = go(interrupted, tmp_path / 'a')
  assert (int(state.step), finished) == (5, False)
  state, finished = go(steps_source(), tmp_path / 'a')
  assert finished
  whole, _ = go(steps_source(), tmp_path / 'b')
  assert state.params['policy']['x'] == whole.params['policy']['x']
  a, b = (tmp_path / x / 'metrics.jsonl' for x in 'ab')
  assert a.read_bytes() == b.read_bytes()


def test_a_full_disk_is_one_sentence_and_loses_nothing(tmp_path, monkeypatch):
  schedule = train.Schedule(steps=9, save_every=3)
  usage, calls = shutil.disk_usage(tmp_path), []

  def full(path):
    calls.append(path)
    return usage._replace(free=3) if len(calls) == 2 else usage

  monkeypatch.setattr(shutil, 'disk_usage', full)
  with pytest.raises(UserError, match=r'3 are free.* are whole: \[3\]'):
    run(poisoned([]), tmp_path / 'a', schedule)
  state, finished = run(poisoned([]), tmp_path / 'a', schedule)
  assert finished
  whole, _ = run(poisoned([]), tmp_path / 'b', schedule)
  assert state.params['policy']['x'] == whole.params['policy']['x']
  a, b = (tmp_path / x / 'metrics.jsonl' for x in 'ab')
  assert a.read_bytes() == b.read_bytes()


def test_start_names_roles_that_exist():
  recipe = jbond(MODEL, tiny.evenness)
  tx = optimizer(1)
  with pytest.raises(UserError, match="no role 'teacher'"):
    init_state(recipe, tx, 0, start={'teacher': '@policy'})
  with pytest.raises(UserError, match="start.policy: '@anchor'"):
    init_state(recipe, tx, 0, start={'policy': '@anchor', 'anchor': '@policy'})
  state = init_state(recipe, tx, 0)
  jax.tree.map(
    np.testing.assert_array_equal,
    state.params['policy'],
    state.frozen['anchor'],
  )


def test_frozen_leaves_keep_no_moments_and_layers_may_differ():
  table = (
    (r'.*/embedding', 0.0),
    (r'.*/layer_0/.*', 0.0),
    (r'.*/layer_2/.*', 0.5),
    (r'.*', 1.0),
  )
  tx = optimizer(10, lr=1e-2, table=table, clip_norm=0.0)
  recipe = sft(MODEL)
  batch = jax.tree.map(jnp.asarray, text_source().batch(0))
  before = init_state(recipe, tx, 0)
  after, _ = one_step(recipe, batch, tx=tx)
  shapes = [x.shape for x in jax.tree.leaves(before.opt_state)]
  assert before.params['policy']['embedding'].shape not in shapes

  def moved(name, layer=...):
    old, new = before.params['policy'], after.params['policy']
    for part in name.split('/'):
      old, new = old[part], new[part]
    return float(jnp.abs(old - new)[layer].max())

  # Three layers of pattern (local, global): groups hold layers 0 and 1.
  assert moved('embedding') == 0
  assert moved('groups/0/attn/q') == 0
  assert moved('groups/1/attn/q') == pytest.approx(1e-2, rel=1e-2)
  assert moved('layer_2/attn/q') == pytest.approx(0.5e-2, rel=1e-2)


def test_metrics_are_cut_back_to_the_restored_step(tmp_path):
  file = tmp_path / 'metrics.jsonl'
  for step in (1, 2, 3):
    metrics.append(file, {'step': step, 'x': float('nan')})
  with open(file, 'a') as out:
    out.write('{"step": 4, "x"')  # a kill cut this line short
  metrics.cut(file, 2)
  rows = [json.loads(line) for line in file.read_text().splitlines()]
  assert [row['step'] for row in rows] == [1, 2]
