"""One step on any mesh is the step on one device, whatever the family."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax import train
from alignjax.core.errors import UserError
from alignjax.models.recurrentgemma import recurrentgemma
from alignjax.models.sharding import TABLE
from alignjax.policies import lm
from alignjax.recipes.clp import clp
from alignjax.recipes.jbond import jbond
from alignjax.recipes.sft import sft
from alignjax.step import init_state, make_step
from alignjax.system import mesh as meshes
from alignjax.system.optimizer import optimizer
from tests import tiny

MESHES = (
  {'data': 4},
  {'data': 2, 'fsdp': 2},
  {'fsdp': 4},
  {'fsdp': 2, 'tensor': 2},
  {'tensor': 2, 'seq': 2},
  {'data': 2, 'seq': 2},
)


class Tokens:
  size, pad, stop, illegal = 30, 0, (1,), (2,)


def model(family):
  if family == 'recurrentgemma':
    config = recurrentgemma(
      vocab_size=32, layers=4, width=16, heads=2, hidden=32, window=8
    )
  else:
    config = tiny.config(
      family=family, vocab_size=32, width=16, remat='outputs'
    )
  return lm.model(config, Tokens)


def rows():
  key = jax.random.key(3)
  tokens = jax.random.randint(key, (8, 16), 3, 30)
  segment = jnp.where(jnp.arange(16) < 6, 1, 2) * jnp.ones((8, 1), jnp.int32)
  position = jnp.where(jnp.arange(16) < 6, jnp.arange(16), jnp.arange(16) - 6)
  return {
    'id': jnp.arange(8),
    'tokens': tokens,
    'segment': segment,
    'position': jnp.broadcast_to(position, (8, 16)).astype(jnp.int32),
    'loss_mask': jnp.ones((8, 16), bool),
  }


@functools.cache
def plain(family):
  params, _, found = one_step(sft(model(family)), rows(), None)
  return params, found


def one_step(recipe, batch, axes):
  tx = optimizer(10, algorithm='sgd', lr=1.0)
  mesh = axes and meshes.make(axes)
  with meshes.current(mesh):
    state = init_state(recipe, tx, 0, mesh=mesh, table=TABLE)
    if mesh is not None:
      batch = jax.device_put(batch, meshes.rows(mesh))
    batch = train.stage_batch(recipe, state, batch, 0)
    state, found = jax.jit(make_step(recipe, tx))(state, batch)
    return jax.device_get((state.params, batch, found))


@pytest.mark.parametrize(
  'family, axes',
  [
    *[('gemma2', axes) for axes in MESHES],
    *[
      pytest.param(*case, marks=pytest.mark.slow)
      for case in (
        ('gemma3', MESHES[1]),
        ('recurrentgemma', MESHES[3]),
        ('recurrentgemma', MESHES[5]),
      )
    ],
  ],
)
def test_sft_on_any_mesh(family, axes):
  recipe = sft(model(family))
  params, found = plain(family)
  other, _, other_found = one_step(recipe, rows(), axes)
  assert other_found['nll'].number == pytest.approx(
    found['nll'].number, rel=1e-5
  ), axes
  for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(other)):
    np.testing.assert_allclose(a, b, atol=2e-5, err_msg=str(axes))


@pytest.mark.slow
def test_a_rollout_and_its_update_on_any_mesh():
  recipe = jbond(model('gemma2'), tiny.evenness, max_new_tokens=6)
  batch = tiny.batch(16)
  batch['prompt'] %= 30  # this model has 32 rows
  params, staged, found = one_step(recipe, batch, None)
  for axes in (MESHES[1], MESHES[3]):
    other, other_staged, other_found = one_step(recipe, batch, axes)
    np.testing.assert_array_equal(
      staged['response'], other_staged['response'], err_msg=str(axes)
    )
    assert other_found['logprob_gap'].number < 1e-4
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(other)):
      np.testing.assert_allclose(a, b, atol=5e-5, err_msg=str(axes))


def conditioned(**numbers):
  shape = tiny.config(vocab_size=32, width=16, layers=1, heads=2, hidden=16)
  return clp(
    lm.model(shape, Tokens),
    tiny.two,
    **dict(objectives=tiny.two.names, groups=2, max_new_tokens=4) | numbers,
  )


def prompts_of(rows):
  batch = tiny.batch(rows)
  return batch | {'prompt': batch['prompt'] % 30}


# All leaves twice and the reference as one more end; an output table twice.
CLP = ({'kl_coef_low': 0.2, 'kl_coef_high': 0.8}, {'copied': 'logits'})


@pytest.mark.parametrize(
  'numbers',
  [CLP[0], pytest.param(CLP[1], marks=pytest.mark.slow)],
  ids=['full', 'logits'],
)
def test_microbatches_of_a_mixture_are_its_batch(numbers):
  recipe = conditioned(**numbers)
  tx = optimizer(10, algorithm='sgd', lr=1.0, clip_norm=0.0)
  state = init_state(recipe, tx, 0, start={'reference': '@policy'})
  batch = train.stage_batch(recipe, state, prompts_of(8), 0)
  assert len(np.unique(np.asarray(batch['condition'])[:, 0])) == 2
  before = jax.device_get(state.params)
  (one, found), (two, other) = (
    jax.jit(make_step(recipe, tx, microbatches=parts))(state, batch)
    for parts in (1, 2)
  )
  for name in found:
    assert found[name].number == pytest.approx(
      other[name].number, rel=1e-5, abs=1e-6
    )
  # sgd at a rate of 1: what moves is the gradient.
  leaves = [jax.tree.leaves(x) for x in (before, one.params, two.params)]
  for start, a, b in zip(*leaves):
    assert np.abs(a - start).max() > 1e-4
    np.testing.assert_allclose(a - start, b - start, atol=2e-6, rtol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize('axes', MESHES[:2], ids=str)
@pytest.mark.parametrize('numbers', CLP, ids=['full', 'logits'])
def test_a_mixture_on_any_mesh(numbers, axes):
  recipe = conditioned(**numbers)
  params, staged, found = one_step(recipe, prompts_of(8), None)
  other, other_staged, other_found = one_step(recipe, prompts_of(8), axes)
  np.testing.assert_array_equal(staged['response'], other_staged['response'])
  np.testing.assert_allclose(
    staged['condition'], other_staged['condition'], atol=1e-6
  )
  assert other_found['logprob_gap'].number < 1e-4
  assert other_found['grad_norm'].number == pytest.approx(
    found['grad_norm'].number, rel=1e-4
  )
  for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(other)):
    np.testing.assert_allclose(a, b, atol=2e-5)


def test_masters_are_stored_once():
  mesh = meshes.make({'data': 2, 'fsdp': 2})
  recipe, tx = sft(model('gemma2')), optimizer(10)
  state = init_state(recipe, tx, 0, mesh=mesh, table=TABLE)
  for leaf in jax.tree.leaves((state.params, state.opt_state)):
    if leaf.ndim > 1 and leaf.shape[0] > 1:
      assert leaf.addressable_shards[0].data.size * 4 == leaf.size, leaf.shape


def test_weights_of_the_host_arrive_in_parts():
  mesh = meshes.make({'data': 2, 'fsdp': 2})
  recipe, tx = sft(model('gemma2')), optimizer(10)
  weights = jax.device_get(tiny.bundle(model('gemma2'), 'policy'))
  parts = meshes.put(weights, meshes.shardings(weights, TABLE, mesh))
  state = init_state(recipe, tx, 0, start=weights, mesh=mesh, table=TABLE)
  for found in (parts, state.params):
    jax.tree.map(np.testing.assert_array_equal, found, weights)
  for leaf in jax.tree.leaves(parts):
    if leaf.ndim > 1 and leaf.shape[0] > 1:
      assert leaf.addressable_shards[0].data.size * 4 == leaf.size, leaf.shape


def test_what_a_mesh_cannot_do_is_said():
  with pytest.raises(UserError, match="no axis 'model'"):
    meshes.make({'model': 4})
  with pytest.raises(UserError, match='does not fill the 4 devices'):
    meshes.make({'data': 3})
  mesh = meshes.make({'tensor': 4})
  tree = {'layer_0': {'ffw': {'gate': jnp.zeros((4, 6))}}}
  with pytest.raises(UserError, match='tensor of size 4 .* layer_0/ffw/gate'):
    meshes.shardings(tree, TABLE, mesh)
  with pytest.raises(UserError, match='no rule matches'):
    meshes.shardings({'layer_0': {'new': jnp.zeros((4, 4))}}, TABLE, mesh)
  twice = (('.*', ('tensor', 'tensor')),)
  with pytest.raises(UserError, match='uses an axis twice'):
    meshes.shardings({'x': jnp.zeros((4, 4))}, twice, mesh)
