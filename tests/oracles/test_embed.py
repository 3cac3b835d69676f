"""The encoder: what it sees, that it learns, and how it travels as a file."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.core import naming
from alignjax.core.errors import UserError
from alignjax.data.segments import segments
from alignjax.interop import open as files_of
from alignjax.models import decoder
from alignjax.models.config import to_json
from alignjax.recipes.embed import embed
from alignjax.step import init_state, make_step
from alignjax.system import model_dir
from alignjax.system.optimizer import optimizer
from tests import tiny

MODEL = tiny.model(layers=2)
WORDS = ['def load(path)', 'for x in rows', 'import os', 'raise ValueError']


def pool(rows=1):
  return jax.tree.map(
    jnp.asarray, tiny.segment_source(batch_size=rows).batch(0)
  )


def test_an_embedding_is_of_the_response_alone_and_has_unit_norm():
  bundle = {'embedding': jax.jit(MODEL.embed_init)(jax.random.key(0))}
  assert bundle['embedding']['embedding_head'].shape == (32, 64)
  encode = jax.jit(MODEL.embed('embedding'))
  batch = pool(2)
  found = encode(bundle, batch)
  assert found.shape == (2, 8, 64) and found.dtype == jnp.float32
  np.testing.assert_allclose(jnp.linalg.norm(found, axis=-1), 1, atol=1e-5)
  # Neither what is behind the end nor room for it changes anything.
  junk = jnp.where(batch['mask'], batch['response'], 77)
  other = encode(bundle, batch | {'response': junk})
  np.testing.assert_allclose(other, found, atol=1e-5)
  wide = {
    name: jnp.pad(batch[name], ((0, 0), (0, 0), (0, 5)))
    for name in ('response', 'mask')
  }
  np.testing.assert_allclose(encode(bundle, wide), found, atol=1e-5)
  shorter = batch['mask'].at[0, 0, 2:].set(False)
  changed = encode(bundle, batch | {'mask': shorter})
  assert float(jnp.abs(changed - found)[0, 0].max()) > 1e-2
  empty = encode(bundle, batch | {'mask': batch['mask'].at[0, 0].set(False)})
  assert not empty[0, 0].any() and jnp.isfinite(empty).all()


def folder(tmp_path, count=24):
  # Two letters of a document's own among many that are everybody's.
  rng = np.random.default_rng(0)
  for i in range(count):
    own = rng.choice(list('uvwxyz'), 2, replace=False)
    letters = np.where(
      rng.random(120) < 0.4,
      rng.choice(own, 120),
      rng.choice(list('abcdefghijklm'), 120),
    )
    text = ''.join(letters) + '\n'
    (tmp_path / f'{i:02}.py').write_text(text)
  return str(tmp_path)


def test_segments_of_a_document_end_nearer_than_others(tmp_path):
  numbers = dict(
    path=folder(tmp_path, 60), length=24, documents=5, passes=20, held_out=0.3
  )
  source = segments(tiny.TOKENS, 8, 0, **numbers)
  recipe = embed(MODEL, size=16)
  tx = optimizer(60, lr=3e-3, warmup_steps=5)
  state = init_state(recipe, tx, 0)
  test = segments(tiny.TOKENS, 32, 0, part='held_out', **numbers)
  unseen = jax.tree.map(jnp.asarray, test.batch(0))

  def measured(state):
    found = jax.jit(recipe.objective)(state.params, unseen, None)[1]
    return {name: float(mean.value) for name, mean in found.items()}

  before = measured(state)
  step = jax.jit(make_step(recipe, tx))
  for k in range(60):
    batch = jax.tree.map(jnp.asarray, source.batch(k))
    state, _ = step(state, batch)
  after = measured(state)
  assert before['nearest_is_partner'] < 0.4 < 0.5 < after['nearest_is_partner']
  assert after['positive'] + 0.2 < after['negative']


def test_a_trunk_from_a_language_model_gets_a_head():
  trunk = jax.jit(MODEL.init)(jax.random.key(5))
  state = init_state(
    embed(MODEL, size=8), optimizer(1), 0, start={'policy': trunk}
  )
  params = dict(state.params['policy'])
  assert params.pop('embedding_head').shape == (32, 8)
  jax.tree.map(np.testing.assert_array_equal, params, trunk)


def test_it_is_written_and_opened_as_what_it_is(tmp_path):
  config = tiny.config(layers=2)
  params = jax.jit(lambda key: MODEL.embed_init(key, 8))(jax.random.key(0))
  model_dir.write(
    tmp_path / 'encoder',
    config=to_json(config),
    params={'policy': decoder.canonical(params)},
    provenance={},
    head='embedding(8)',
  )
  found = files_of.open(tmp_path / 'encoder', head='embedding')
  assert found.leaves['embedding_head'].shape == (32, 8)
  again = naming.nested({name: found.load(name) for name in found.leaves})
  jax.tree.map(
    np.testing.assert_array_equal, decoder.stacked(config, again), params
  )
  with pytest.raises(UserError, match=r"head is 'embedding', expected 'tied'"):
    files_of.open(tmp_path / 'encoder')
  model_dir.write(
    tmp_path / 'plain',
    config=to_json(config),
    params={'policy': decoder.canonical(MODEL.init(jax.random.key(0)))},
    provenance={},
  )
  with pytest.raises(UserError, match='not an embedding model'):
    files_of.open(tmp_path / 'plain', head='embedding')


def test_pools_pair_segments_of_one_document(tmp_path):
  source = segments(
    tiny.TOKENS, 3, 0, path=folder(tmp_path), length=16, documents=3, part='all'
  )
  batch = source.batch(0)
  assert batch['response'].shape == (3, 6, 16) == batch['mask'].shape
  assert len(source) == 8 * 8
  texts = {p.read_text() for p in tmp_path.iterdir()}
  for row, mask in zip(batch['response'], batch['mask']):
    owners = []
    for ids, on in zip(row, mask):
      text = tiny.TOKENS.decode(ids[on].tolist())
      (owner,) = [t for t in texts if text in t]
      owners.append((owner, owner.index(text)))
    for (a, i), (b, j) in zip(owners[::2], owners[1::2]):
      assert a == b and abs(i - j) >= 16  # one document, no overlap
    assert len({owner for owner, _ in owners}) == 3
  again = segments(
    tiny.TOKENS, 3, 0, path=str(tmp_path), length=16, documents=3, part='all'
  )
  for name, x in source.batch(2).items():
    np.testing.assert_array_equal(again.batch(2)[name], x)


def test_a_lone_text_is_cut_into_documents(tmp_path):
  file = tmp_path / 'one.txt'
  file.write_text(''.join(f'{WORDS[i % 4]} {i}\n\n' for i in range(200)))
  source = segments(
    tiny.TOKENS, 1, 0, path=str(file), length=8, documents=4, part='all'
  )
  assert len(source) >= 8


@pytest.mark.parametrize(
  'numbers, message',
  [
    ({'documents': 1}, 'source.documents = 1'),
    ({'documents': 99}, 'expected source.documents = 99 or more'),
    ({'part': 'test'}, "source.part: found 'test'"),
  ],
)
def test_bad_numbers_of_segments(tmp_path, numbers, message):
  with pytest.raises(UserError, match=message):
    segments(tiny.TOKENS, 1, 0, path=folder(tmp_path), **numbers)


def test_bad_numbers_of_the_recipe():
  for numbers, message in (
    ({'size': 0}, 'recipe.size: found 0'),
    ({'margin': 0.0}, 'recipe.margin: found 0'),
  ):
    with pytest.raises(UserError, match=message):
      embed(MODEL, **numbers)
  batch = pool(1)
  batch = {name: x[:, :2] if x.ndim > 1 else x for name, x in batch.items()}
  bundle = {'policy': MODEL.embed_init(jax.random.key(0))}
  with pytest.raises(UserError, match='found 2 texts in a row'):
    embed(MODEL).objective(bundle, batch, None)
