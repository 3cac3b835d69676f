import errno
import json
import zlib

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts

from alignjax.core import tree
from alignjax.core.errors import UserError
from alignjax.system import leaf_files, model_dir


def params():
  draw = np.random.default_rng(0).normal
  return {
    'embed': {'table': draw(size=(16, 4)).astype(np.float32)},
    'final_norm': {'scale': np.array(2, np.float32)},
    'layer_0': {
      'attn': {
        'k': jnp.asarray(draw(size=(4, 2, 3)), jnp.float16),
        'q': jnp.asarray(draw(size=(4, 2, 3)), jnp.bfloat16),
      }
    },
  }


def write(path, **changed):
  arguments = {
    'config': {'width': 4},
    'params': {'policy': params()},
    'provenance': {'by': 'test'},
  }
  return model_dir.write(path, **{**arguments, **changed})


def same(a, b):
  a, b = tree.named(a), tree.named(b)
  assert list(a) == list(b)
  for name, leaf in a.items():
    assert b[name].dtype == leaf.dtype and b[name].shape == leaf.shape, name
    assert np.asarray(leaf).tobytes() == np.asarray(b[name]).tobytes(), name


def test_what_is_written_is_read(tmp_path):
  tokenizer = tmp_path / 'any.model'
  tokenizer.write_bytes(b'\x00pieces')
  model = write(
    tmp_path / 'new/m',
    params={'policy': params(), 'value': {'head': np.ones((2, 1))}},
    tokenizer=tokenizer,
    head='untied',
  )
  assert model == model_dir.read(tmp_path / 'new/m')
  assert (model.config, model.head, model.view) == (
    {'width': 4},
    'untied',
    'plain',
  )
  assert model.roles == ('policy', 'value')
  assert model.tokenizer is not None
  assert model.tokenizer.read_bytes() == b'\x00pieces'
  same(params(), model_dir.load(model))
  leaves = model_dir.leaves(model)
  assert leaves['layer_0/attn/q'].shape == (4, 2, 3)
  assert leaves['layer_0/attn/q'].dtype == ml_dtypes.bfloat16
  assert [p.name for p in (tmp_path / 'new').iterdir()] == ['m']


@pytest.mark.parametrize('part_bytes', [1, 60, 2**20])
def test_plain_orbax_restores_it(tmp_path, monkeypatch, part_bytes):
  monkeypatch.setattr(model_dir, 'PART_BYTES', part_bytes)
  write(tmp_path / 'm')
  path = tmp_path / 'm/params/policy'
  same(params(), ocp.PyTreeCheckpointer().restore(path))
  same(params(), ocp.StandardCheckpointer().restore(path))


def large(tmp_path, monkeypatch, leaf):
  monkeypatch.setattr(model_dir, 'PART_BYTES', 64)
  monkeypatch.setattr(leaf_files, 'CHUNK_BYTES', 128)
  small = np.arange(3, dtype=np.float32)
  weights = {'norm': small, 'table': leaf, 'z': {'table': leaf[::-1]}}
  return write(tmp_path / 'm', params={'policy': weights}), weights


@pytest.mark.parametrize('dtype', [np.float32, ml_dtypes.bfloat16, np.int8])
@pytest.mark.parametrize('shape', [(203,), (37, 5), (3, 7, 11), (2, 500)])
def test_a_large_leaf_is_written_in_pieces(tmp_path, monkeypatch, shape, dtype):
  leaf = (np.arange(np.prod(shape)) % 113).astype(dtype).reshape(shape)
  leaf[1:] *= leaf[1:] < 60  # some pieces are nothing but zeros
  model, weights = large(tmp_path, monkeypatch, leaf)
  path = tmp_path / 'm/params/policy'
  pieces = [f for f in (path / 'z.table').iterdir() if f.name != '.zarray']
  assert len(pieces) >= leaf.nbytes / 128 > 1
  same(weights, model_dir.load(model))
  same(weights, ocp.PyTreeCheckpointer().restore(path))
  same(weights, ocp.StandardCheckpointer().restore(path))
  assert model_dir.leaves(model)['z/table'].shape == shape
  assert model.checksums['policy'] == model_dir.checksums(weights)
  crc = zlib.crc32(weights['z']['table'].tobytes())
  assert model.checksums['policy']['z/table'] == f'{crc:08x}'


def test_large_leaves_are_stored_as_small_ones(tmp_path, monkeypatch):
  leaf = np.ones((20, 4), np.float32)
  write(tmp_path / 'o', params={'policy': {'table': leaf}})
  large(tmp_path, monkeypatch, leaf)
  facts = [
    json.loads((tmp_path / path / 'params/policy/table/.zarray').read_text())
    for path in ('o', 'm')
  ]
  assert facts[1].pop('chunks') == [8, 4]
  assert facts[0].pop('chunks') == facts[0]['shape']
  assert facts[0] == facts[1]
  index = [
    json.loads((tmp_path / path / 'params/policy/_METADATA').read_text())
    for path in ('o', 'm')
  ]
  entry = "('table',)"
  ours, theirs = (of.pop('tree_metadata')[entry] for of in index)
  assert ours == theirs and index[0] == index[1]


@pytest.mark.parametrize('damage', ['cut', 'gone'])
def test_a_damaged_piece_names_the_leaf(tmp_path, monkeypatch, damage):
  model, _ = large(tmp_path, monkeypatch, np.ones((20, 4), np.float32))
  file = tmp_path / 'm/params/policy/table/1.0'
  file.unlink() if damage == 'gone' else file.write_bytes(file.read_bytes()[:9])
  with pytest.raises(UserError, match="m/params/policy: leaf 'table'"):
    model_dir.load_leaf(model, 'policy', 'table')
  model_dir.load_leaf(model, 'policy', 'z/table')


def test_a_full_disk_amid_a_large_leaf_leaves_nothing(tmp_path, monkeypatch):
  def full(*_):
    raise ValueError('RESOURCE_EXHAUSTED: No space left on device')

  monkeypatch.setattr(leaf_files, '_rewrite', full)
  with pytest.raises(UserError, match='disk full while writing .*m'):
    large(tmp_path, monkeypatch, np.ones((20, 4), np.float32))
  assert list(tmp_path.iterdir()) == []


def test_a_large_leaf_is_not_copied(tmp_path):
  leaf = np.zeros((model_dir.PART_BYTES // 2**20 + 32, 2**20), np.int8)
  leaf[:, ::7] = 3
  saved = []
  save = ocp.PyTreeCheckpointHandler.save

  def spied(self, directory, args):
    saved.extend(x.nbytes for x in tree.named(args.item).values())
    save(self, directory, args=args)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(ocp.PyTreeCheckpointHandler, 'save', spied)
    model = write(tmp_path / 'm', params={'policy': {'table': leaf}})
  assert saved == [1]
  facts = json.loads((tmp_path / 'm/params/policy/table/.zarray').read_text())
  assert np.prod(facts['chunks']) <= leaf_files.CHUNK_BYTES
  assert model.checksums['policy'] == model_dir.checksums({'table': leaf})


def test_leaves_may_come_one_by_one(tmp_path):
  pairs = iter(list(tree.named(params()).items()))
  model = write(tmp_path / 'm', params={'policy': pairs})
  same(params(), model_dir.load(model))


def test_digest_is_of_the_weights_only(tmp_path):
  one = write(tmp_path / 'a')
  two = write(tmp_path / 'b', config={'width': 5}, provenance={})
  changed = params()
  changed['embed']['table'][3, 1] += 1
  three = write(tmp_path / 'c', params={'policy': changed})
  digest = model_dir.digest(one)
  assert digest == model_dir.digest(two) != model_dir.digest(three)
  assert digest == model_dir.digest_of(model_dir.checksums(params()))


def damage_truncated(file):
  file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def damage_gone(file):
  file.unlink()


def damage_metadata(file):
  (file.parent / '.zarray').write_text('{')


def damage_other_values(file):
  store = {'driver': 'file', 'path': str(file.parent)}
  leaf = ts.open({'driver': 'zarr', 'kvstore': store}).result()
  leaf[0, 0] = 7.0


@pytest.mark.parametrize(
  'damage',
  [damage_truncated, damage_gone, damage_metadata, damage_other_values],
)
def test_a_damaged_leaf_is_named(tmp_path, damage):
  model = write(tmp_path / 'm')
  damage(tmp_path / 'm/params/policy/embed.table/0.0')
  with pytest.raises(UserError, match="m/params/policy: leaf 'embed/table'"):
    model_dir.load(model)
  model_dir.load_leaf(model, 'policy', 'layer_0/attn/q')  # others are fine


def edited(path, **changed):
  facts = json.loads((path / 'model.json').read_text())
  (path / 'model.json').write_text(json.dumps({**facts, **changed}))


def test_what_is_no_model_directory_is_refused(tmp_path):
  with pytest.raises(UserError, match='no model directory at .*absent'):
    model_dir.read(tmp_path / 'absent')
  with pytest.raises(UserError, match='not a model directory'):
    model_dir.read(tmp_path)
  path = tmp_path / 'm'
  write(path)
  edited(path, format=9)
  with pytest.raises(UserError, match='format 9, expected 1'):
    model_dir.read(path)
  edited(path, format=1, roles=['policy', 'value'])
  with pytest.raises(UserError, match="no checksums of the role 'value'"):
    model_dir.read(path)
  edited(path, roles=['policy'], config=None)
  with pytest.raises(UserError, match="field 'config'"):
    model_dir.read(path)
  (path / 'model.json').write_text('{"format": 1')
  with pytest.raises(UserError, match='model.json is not JSON'):
    model_dir.read(path)


def test_an_unknown_role_is_named(tmp_path):
  model = write(tmp_path / 'm')
  with pytest.raises(UserError, match="no role 'value' .roles: policy"):
    model_dir.load(model, 'value')


def test_an_existing_directory_is_kept(tmp_path):
  old = write(tmp_path / 'm')
  changed = params()
  changed['embed']['table'] += 1
  with pytest.raises(UserError, match='m exists already'):
    write(tmp_path / 'm', params={'policy': changed})
  same(params(), model_dir.load(old))
  new = write(tmp_path / 'm', params={'policy': changed}, overwrite=True)
  same(changed, model_dir.load(new))
  (tmp_path / 'mine').mkdir()
  (tmp_path / 'mine/thesis.txt').write_text('years of work')
  with pytest.raises(UserError, match='has no model.json'):
    write(tmp_path / 'mine', overwrite=True)
  assert sorted(p.name for p in tmp_path.iterdir()) == ['m', 'mine']


@pytest.mark.parametrize('overwrite', [False, True])
def test_a_failed_write_leaves_nothing(tmp_path, overwrite):
  if overwrite:
    write(tmp_path / 'm')

  def pairs():
    yield 'embed', np.ones(3, np.float32)
    raise OSError(errno.ENOSPC, 'No space left on device')

  with pytest.raises(UserError, match='disk full while writing .*m'):
    write(tmp_path / 'm', params={'policy': pairs()}, overwrite=overwrite)
  assert [p.name for p in tmp_path.iterdir()] == ['m'] * overwrite
  if overwrite:
    same(params(), model_dir.load(model_dir.read(tmp_path / 'm')))


def test_leftovers_of_a_killed_write_do_not_enter(tmp_path):
  stale = tmp_path / '.m.partial/params/policy/stale'
  stale.mkdir(parents=True)
  write(tmp_path / 'm')
  assert not (tmp_path / 'm/params/policy/stale').exists()
  assert [p.name for p in tmp_path.iterdir()] == ['m']


@pytest.mark.parametrize('name', ['a.b', '', 'a//b', '/a'])
def test_names_that_cannot_be_held_are_refused(tmp_path, name):
  with pytest.raises(UserError, match='a leaf cannot be named'):
    write(tmp_path / 'm', params={'policy': [(name, np.ones(2))]})


def test_empty_leaves_are_refused(tmp_path):
  with pytest.raises(UserError, match="leaf 'x' is empty"):
    write(tmp_path / 'm', params={'policy': {'x': np.ones((0, 2))}})
