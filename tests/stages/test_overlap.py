"""Chunked rollout and score: the same batch, sooner, and honest errors."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.core.errors import UserError
from alignjax.models.tabular import tabular
from alignjax.recipes.bond import bond
from alignjax.recipes.jbond import jbond
from alignjax.recipes.warp import warp
from alignjax.stages.overlap import join, overlap, split
from alignjax.stages.rollout import rollout
from alignjax.stages.score import score
from alignjax.system import mesh as meshes
from tests import tiny

MODEL = tiny.model()
DRAW = rollout(
  [(MODEL.policy('policy'), 2)],
  max_new_tokens=6,
  stop=MODEL.stop,
  pad=MODEL.pad,
)
BUNDLE = tiny.bundle(MODEL, 'policy')


def host_evenness(bundle, batch, key):
  mask = np.asarray(batch['mask'])
  even = (np.asarray(batch['response']) % 2 == 0) & mask
  share = even.sum(-1) / np.maximum(mask.sum(-1), 1)
  return share[..., None].astype(np.float32)


def staged(chunks, reward=host_evenness, batch=None):
  batch = batch or tiny.batch(8)
  for stage in overlap(DRAW, score(reward), chunks=chunks):
    batch = stage(BUNDLE, batch, jax.random.key(3))
  return jax.device_get(batch)


def test_chunks_change_nothing():
  whole, parts = staged(1), staged(2)
  plain = score(host_evenness)(
    BUNDLE, DRAW(BUNDLE, tiny.batch(8), jax.random.key(3)), jax.random.key(0)
  )
  assert set(plain) == set(whole) == set(parts)
  for name, field in whole.items():
    np.testing.assert_array_equal(field, plain[name], err_msg=name)
    if name != 'sample_logp':
      np.testing.assert_array_equal(field, parts[name], err_msg=name)
  # A matrix product of fewer rows may round its sums in another order.
  np.testing.assert_allclose(
    parts['sample_logp'], whole['sample_logp'], atol=4e-6
  )


@pytest.mark.parametrize('recipe', [jbond, bond, warp])
def test_recipes_in_chunks_change_no_bit_without_matrix_products(recipe):
  model = tabular(jax.random.normal(jax.random.key(7), (4, 5)))
  bundle = {
    role: model.init(jax.random.key(0)) for role in ('policy', 'anchor')
  }
  batch = {'id': jnp.arange(8), 'prompt': jnp.arange(8)[:, None] % 4}
  staged = []
  for chunks in (1, 4):
    parts = recipe(
      model, host_evenness, max_new_tokens=1, rollout_chunks=chunks
    )
    found = batch
    for stage in parts.stages[: 2 if chunks == 1 else 1]:
      found = stage(bundle, found, jax.random.key(5))
    staged.append(found)
  assert set(staged[0]) == set(staged[1])
  for name, field in staged[0].items():
    np.testing.assert_array_equal(field, staged[1][name], err_msg=name)


def test_split_and_join_are_inverse_on_a_mesh():
  mesh = meshes.make({'data': 2, 'fsdp': 2})
  batch = jax.device_put(tiny.batch(8), meshes.rows(mesh))
  parts = split(batch, 2)
  assert parts[1]['id'].tolist() == [1, 3, 5, 7]
  assert parts[1]['id'].sharding.is_equivalent_to(meshes.rows(mesh), 1)
  jax.tree.map(np.testing.assert_array_equal, join(parts), batch)


def test_chunks_must_divide_the_rows():
  with pytest.raises(UserError, match='= 3 does not divide the 8 rows'):
    staged(3)
  with pytest.raises(UserError, match='found 0'):
    staged(0)


def test_errors_name_the_rows_of_their_chunk():
  def fails(kind):
    def reward(bundle, batch, key):
      if 3 in np.asarray(batch['id']):
        raise kind('no answer')
      return host_evenness(bundle, batch, key)

    return reward

  with pytest.raises(UserError, match=r'no answer .* \[1, 3, 5, 7\]'):
    staged(2, fails(UserError))
  with pytest.raises(ValueError, match='no answer') as caught:
    staged(2, fails(ValueError))
  assert '[1, 3, 5, 7]' in caught.value.__notes__[0]


def test_the_next_chunk_is_decoding_while_one_is_scored():
  # 8 rows of work whose time does not depend on the machine's other guests.
  def work(x):
    return jax.lax.fori_loop(0, 400, lambda _, y: jnp.tanh(y @ y), x)

  @jax.jit
  def draw(bundle, batch, key):
    return batch | {'reward': work(bundle)[0, :1] + batch['id'][:, None]}

  seen = []

  def slow(bundle, batch, key):
    np.asarray(batch['reward'])  # this chunk is decoded
    seen.append(coming[len(seen) + 1 :])
    time.sleep(0.01)
    return batch

  coming = []

  def noted(bundle, batch, key):
    batch = draw(bundle, batch, key)
    coming.append(batch['reward'])
    return batch

  (stage,) = overlap(noted, slow, chunks=4)
  stage(jnp.ones((64, 64)), {'id': jnp.arange(8)}, jax.random.key(0))
  # All that comes later has been dispatched when a chunk is scored.
  assert [len(later) for later in seen] == [3, 2, 1, 0]
