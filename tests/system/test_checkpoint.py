"""Checkpoints: any mesh, any damage, another model, a step that donates."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from alignjax.core import naming, tree
from alignjax.core.errors import UserError
from alignjax.core.types import TrainState
from alignjax.system import checkpoint
from alignjax.system import mesh as meshes

TABLE = (('.*embedding', ('tensor', 'fsdp')), ('.*q', ('fsdp', 'tensor')))
TABLE = (*TABLE, ('.*', None))


def shape(**changes):
  sizes = {'embedding': (16, 8), 'q': (8, 4), 'scale': (8,)} | changes
  return {name: size for name, size in sizes.items() if size}


def make(mesh=None, seed=0, **changes):
  """A state with a follower, a fixed role and moments."""
  key = jax.random.key(seed)
  params = {
    role: {
      name: jax.random.normal(jax.random.fold_in(key, i), size)
      for i, (name, size) in enumerate(shape(**changes).items())
    }
    for role in ('policy', 'anchor', 'teacher')
  }
  trained = {'policy': params['policy']}
  state = TrainState(
    step=jnp.int32(seed),
    params=trained,
    frozen={role: params[role] for role in ('anchor', 'teacher')},
    opt_state=optax.adam(1e-3).init(trained),
    skipped=jnp.int32(0),
  )
  if mesh is None:
    return state

  def place(name, x):
    spec = naming.lookup(TABLE, name, 'table') or (None,) * x.ndim
    spec = [axis if axis in mesh.shape else None for axis in spec[: x.ndim]]
    return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))

  return tree.map_named(place, state)


def values(state):
  return {name: np.asarray(x) for name, x in tree.named(state).items()}


def same(a, b):
  jax.tree.map(np.testing.assert_array_equal, values(a), values(b))


def write(where, *states, keep=5):
  checkpoints = checkpoint.manager(where, keep)
  for state in states:
    checkpoint.save(checkpoints, state, source={'k': int(state.step)})
  checkpoints.wait_until_finished()
  return checkpoints


def test_from_one_mesh_to_another(tmp_path):
  one = jax.devices()[:1]
  meshes_ = [
    meshes.make({'data': 4}),
    meshes.make({'fsdp': 2, 'tensor': 2}),
    meshes.make({'data': 1}, devices=one),
    None,
  ]
  state = make(meshes_[0], seed=7)
  first = values(state)
  for i, (here, there) in enumerate(zip(meshes_, meshes_[1:])):
    state = make(here, seed=7) if i == 0 else state
    checkpoints = write(tmp_path / str(i), state)
    like = make(there, seed=8)
    found = checkpoint.restore(checkpoints, like)
    assert found is not None and found[1] == {'k': 7}
    state = found[0]
    jax.tree.map(np.testing.assert_array_equal, values(state), first)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(like)):
      assert a.sharding.is_equivalent_to(b.sharding, a.ndim)


def test_each_device_writes_its_own_shard(tmp_path):
  state = make(meshes.make({'fsdp': 2, 'tensor': 2}))
  checkpoints = write(tmp_path, state)
  found = json.loads((tmp_path / '0/state/_METADATA').read_text())
  leaf = found['tree_metadata']["('params', 'policy', 'embedding')"]
  assert leaf['value_metadata']['write_shape'] == [8, 4]
  checkpoints.close()


def test_a_step_that_donates_does_not_reach_what_is_being_written(tmp_path):
  size = {'embedding': (2048, 512)}
  for mesh in (None, meshes.make({'fsdp': 2, 'tensor': 2})):
    state, kept = make(mesh, 1, **size), values(make(mesh, 1, **size))
    where = jax.tree.map(lambda x: x.sharding, state)
    again = jax.jit(
      lambda s: jax.tree.map(lambda x: x + 1, s),
      donate_argnums=0,
      out_shardings=where,
    )
    checkpoints = checkpoint.manager(tmp_path / str(mesh is None), 2)
    checkpoint.save(checkpoints, state, source={})
    for _ in range(5):
      state = again(state)
    checkpoints.wait_until_finished()
    found = checkpoint.restore(checkpoints, make(mesh, 2, **size))
    assert found is not None
    jax.tree.map(np.testing.assert_array_equal, values(found[0]), kept)


def test_fixed_roles_are_not_written_but_carried_over(tmp_path):
  checkpoints = checkpoint.manager(tmp_path, 2)
  checkpoint.save(checkpoints, make(seed=1), fixed=['teacher'], source={})
  checkpoints.wait_until_finished()
  found = checkpoint.restore(checkpoints, make(seed=2), fixed=['teacher'])
  assert found is not None
  same(found[0].frozen['anchor'], make(seed=1).frozen['anchor'])
  same(found[0].frozen['teacher'], make(seed=2).frozen['teacher'])
  assert list(found[0].frozen) == ['anchor', 'teacher']


def flipped(data):
  middle = len(data) // 2
  return data[:middle] + bytes([data[middle] ^ 0x10]) + data[middle + 1 :]


DAMAGE = {
  'a flipped bit': flipped,
  'cut short': lambda data: data[: len(data) // 2],
  'emptied': lambda data: b'',
}


@pytest.mark.parametrize('how', DAMAGE)
def test_damage_to_any_file_is_found_or_does_no_harm(how, tmp_path, capfd):
  original = tmp_path / 'original'
  write(original, make(seed=1), make(seed=2)).close()
  files = [f for f in (original / '2').rglob('*') if f.is_file()]
  found_out = 0
  for i, file in enumerate(sorted(files)):
    copy = tmp_path / str(i)
    shutil.copytree(original, copy)
    target = copy / file.relative_to(original)
    target.write_bytes(DAMAGE[how](target.read_bytes()))
    checkpoints = checkpoint.manager(copy, 5)
    capfd.readouterr()
    restored = checkpoint.restore(checkpoints, make(seed=3))
    assert restored is not None
    state, source = restored
    same(state, make(seed=source['k']))
    said = [x for x in capfd.readouterr().err.splitlines() if 'damaged' in x]
    if source['k'] == 1:
      found_out += 1
      assert len(said) == 1 and f'checkpoint 2 in {copy} is damaged' in said[0]
      assert said[0].endswith('the run continues from checkpoint 1')
      assert checkpoints.all_steps() == [1]
    else:
      assert said == []
    checkpoints.close()
  assert found_out >= 2


def test_wrong_values_in_a_sound_file_are_found(tmp_path, capfd):
  """What a disk's own checks cannot see: another array in the place."""
  write(tmp_path, make(seed=1), make(seed=2)).close()
  shutil.rmtree(tmp_path / '2' / 'state')
  shutil.copytree(tmp_path / '1' / 'state', tmp_path / '2' / 'state')
  checkpoints = checkpoint.manager(tmp_path, 5)
  found = checkpoint.restore(checkpoints, make(seed=3))
  assert found is not None and found[1] == {'k': 1}
  assert 'the fingerprint of' in capfd.readouterr().err


def test_nothing_whole_is_an_error_and_nothing_is_removed(tmp_path):
  write(tmp_path, make(seed=1), make(seed=2)).close()
  for step in '12':
    shutil.rmtree(tmp_path / step / 'meta')
  checkpoints = checkpoint.manager(tmp_path, 5)
  with pytest.raises(UserError, match=r'every checkpoint .* \(2: .*; 1: ') as e:
    checkpoint.restore(checkpoints, make())
  assert '\n' not in str(e.value)
  assert checkpoints.all_steps() == [1, 2]


def test_another_model_is_named_by_leaf_and_shape(tmp_path):
  checkpoints = write(tmp_path, make(seed=1))
  with pytest.raises(UserError) as error:
    checkpoint.restore(checkpoints, make(q=(8, 6), scale=(), bias=(3,)))
  text = str(error.value)
  assert f'checkpoint 1 in {tmp_path} is of another model: ' in text
  assert 'params/policy/q is float32[8,4], expected float32[8,6]' in text
  assert 'params/policy/bias is absent, expected float32[3]' in text
  assert text.count(';') == 3 and text.endswith(' more')
  file = tmp_path / '1' / 'meta' / 'metadata'
  file.write_text(json.dumps(json.loads(file.read_text()) | {'format': 1}))
  with pytest.raises(UserError, match='has format 1, expected 2'):
    checkpoint.restore(checkpoints, make())


def test_what_a_kill_left_of_a_save_goes_and_counts_for_nothing(tmp_path):
  write(tmp_path, make(seed=1)).close()
  shutil.copytree(tmp_path / '1', tmp_path / '2.orbax-checkpoint-tmp')
  checkpoints = checkpoint.manager(tmp_path, 5)
  found = checkpoint.restore(checkpoints, make())
  assert found is not None and found[1] == {'k': 1}
  checkpoint.save(checkpoints, make(seed=2), source={})
  checkpoints.wait_until_finished()
  assert sorted(p.name for p in tmp_path.glob('[0-9]*')) == ['1', '2']
