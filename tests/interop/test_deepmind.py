import dataclasses
import errno
import json
import shutil

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest

from alignjax.core import naming, tree
from alignjax.core.errors import UserError
from alignjax.core.spec import Spec
from alignjax.interop import deepmind
from alignjax.models import preset
from alignjax.system import leaf_files, model_dir
from tests.interop import trees

# Which of our configs a release would store as (2, F, D).
TRANSPOSED = {'gemma2': True, 'gemma3': True}


def made(family, dtype=np.float32):
  """(config, canonical leaves, their nested tree by name)."""
  config = trees.CONFIGS[family]
  leaves = trees.leaves(config, dtype=dtype)
  names = trees.nested(config, leaves, TRANSPOSED.get(family, False))
  return config, leaves, names


def same(opened, leaves):
  assert list(opened.leaves) == sorted(leaves)
  for name, expected in leaves.items():
    found = opened.load(name)
    spec = opened.leaves[name]
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape), name
    assert (spec.dtype, spec.shape) == (expected.dtype, expected.shape), name
    assert found.flags.c_contiguous, name
    assert found.tobytes() == expected.tobytes(), name


@pytest.mark.parametrize('kind', ['standard', 'zarr'])
@pytest.mark.parametrize('family', trees.CONFIGS)
def test_nested(tmp_path, family, kind):
  config, leaves, names = made(family)
  opened = deepmind.read(trees.save(tmp_path / 'm', naming.nested(names), kind))
  same(opened, leaves)
  assert opened.config == config
  assert opened.format == 'deepmind'
  assert opened.provenance['source']['layout'] == 'nested'
  assert opened.tokenizer is None and opened.files == ()


@pytest.mark.parametrize('kind', ['standard', 'pytree', 'zarr', 'zarr3'])
@pytest.mark.parametrize('prefix', ['', 'rlx_networks/policy_network/'])
def test_flat(tmp_path, prefix, kind):
  _, leaves, names = made('gemma3', ml_dtypes.bfloat16)
  opened = deepmind.read(
    trees.save(tmp_path / 'm', trees.flat(names, prefix), kind)
  )
  same(opened, leaves)
  assert opened.config.dtype == 'bfloat16'
  assert opened.provenance['source']['layout'] == 'flat'
  assert opened.origin['layer_2/attn/v'] == (
    f'{prefix}transformer/layer_2/attn/kv_einsum/w[1]',
  )


@pytest.mark.parametrize('family, pattern', [('gemma2', 2), ('gemma3', 6)])
def test_stacked(tmp_path, family, pattern):
  _, leaves, names = made(family)
  stacked = trees.stacked(names, pattern)
  opened = deepmind.read(trees.save(tmp_path / 'm', stacked))
  same(opened, leaves)
  assert opened.provenance['source']['layout'] == 'stacked'
  last = (len(opened.config.pattern) - 1) % pattern
  assert opened.origin[f'layer_{last}/ffw/up'] == (
    f'transformer/stacked_layers/attention_type_{last}/mlp/gating_einsum/w'
    '[0][1]',
  )


def test_a_training_state_of_kauldron(tmp_path):
  _, leaves, names = made('gemma2')
  params = naming.nested(names)
  state = {
    'params': params,
    'opt_state': ({'mu': params, 'count': np.int32(3)},),
    'step': np.int32(3),
  }
  path = tmp_path / 'ckpt_3'
  path.mkdir()
  trees.save(path / 'default', state)
  for place in (path, path / 'default'):
    opened = deepmind.read(place)
    same(opened, leaves)
    assert opened.extra == {}
    assert opened.provenance['source']['layout'] == 'kauldron'


def test_what_is_not_the_decoders_is_extra(tmp_path):
  _, leaves, names = made('gemma3')
  kernel = np.arange(6, dtype=np.float32).reshape(2, 3)
  more = {
    'SigLiPFromPatches_0/siglip_encoder/embedding/kernel': kernel,
    'embedder/mm_input_projection/w': kernel + 1,
  }
  opened = deepmind.read(trees.save(tmp_path / 'm', trees.flat(names | more)))
  same(opened, leaves)
  assert {k: x.shape for k, x in opened.extra.items()} == {
    'embedder/mm_input_projection/w': (2, 3),
    'vision_encoder/siglip_encoder/embedding/kernel': (2, 3),
  }
  found = opened.load_extra('vision_encoder/siglip_encoder/embedding/kernel')
  np.testing.assert_array_equal(found, kernel)


@pytest.mark.parametrize('name', ['gemma2-9b', 'gemma3-27b'])
def test_released_shapes_are_known(tmp_path, monkeypatch, name):
  """The numbers that shapes do not show come with the name."""
  released = preset.SHAPES[name]
  sizes = dict(width=16, hidden=24, layers=6, heads=4, kv_heads=2, head_dim=8)
  small = dataclasses.replace(released, vocab_size=32, lru_width=16, **sizes)
  monkeypatch.setattr(preset, 'SHAPES', {name: small})
  leaves = trees.leaves(small)
  names = trees.nested(small, leaves, transposed=True)
  del names['embedder/input_embedding']
  names['embedder/input_embedding'] = np.ones((40, 16), np.float32)
  opened = deepmind.read(trees.save(tmp_path / 'm', naming.nested(names)))
  assert opened.config == dataclasses.replace(small, vocab_size=40)
  assert opened.provenance['config'] == f'from shapes of {name}'


def test_either_orientation_of_gating(tmp_path):
  config = trees.CONFIGS['gemma2']
  leaves = trees.leaves(config)
  for transposed in (False, True):
    names = trees.nested(config, leaves, transposed)
    path = trees.save(tmp_path / str(transposed), naming.nested(names))
    same(deepmind.read(path), leaves)


def test_the_window_can_be_told(tmp_path):
  _, _, names = made('griffin')
  path = trees.save(tmp_path / 'm', naming.nested(names))
  assert deepmind.read(path).config.span == 2049
  assert deepmind.read(path, window_self=True).config.span == 2048


def test_every_wrong_tensor_is_listed_at_once(tmp_path):
  _, _, names = made('gemma2')
  del names['layer_1/attn/kv_einsum/w']
  names['layer_2/mlp/linear'] = np.ones((7, 16), np.float32)
  names['layer_3/attn/_query_norm/bias'] = np.ones(3, np.float32)
  path = trees.save(tmp_path / 'm', naming.nested(names))
  with pytest.raises(UserError) as error:
    deepmind.read(path)
  for part in (
    'layer_1/attn/kv_einsum/w [2, 2, 16, 8] is missing',
    'layer_2/mlp/linear is [7, 16], expected [24, 16]',
    'layer_3/attn/_query_norm/bias [3] is not expected',
  ):
    assert part in str(error.value)


def test_other_architectures_are_refused(tmp_path):
  _, _, names = made('gemma3')
  names['embedder/per_layer_embeddings'] = np.ones((2, 2), np.float32)
  path = trees.save(tmp_path / 'm', naming.nested(names))
  with pytest.raises(UserError, match='no Gemma.*embedder/per_layer_embedd'):
    deepmind.read(path)
  path = trees.save(tmp_path / 'n', {'w': np.ones(3)})
  with pytest.raises(UserError, match=r'without embedder/input_embedding.*w'):
    deepmind.read(path)


def test_a_damaged_array_is_named(tmp_path):
  _, _, names = made('gemma2')
  path = trees.save(tmp_path / 'm', naming.nested(names), 'zarr')
  opened = deepmind.read(path)
  folder = path / 'layer_1.mlp.linear'
  chunk = next(f for f in folder.iterdir() if not f.name.startswith('.'))
  chunk.write_bytes(chunk.read_bytes()[:9])
  with pytest.raises(UserError, match='layer_1/mlp/linear.*corrupt'):
    opened.load('layer_1/ffw/down')
  chunk.unlink()  # would be read as zeros by default
  with pytest.raises(UserError, match='layer_1/mlp/linear.*corrupt'):
    opened.load('layer_1/ffw/down')


def test_a_tokenizer_may_lie_beside_a_release(tmp_path):
  _, _, names = made('gemma1')
  path = trees.save(tmp_path / '2b', naming.nested(names))
  (tmp_path / 'tokenizer.model').write_bytes(b'x')
  (path / 'tokenizer_config.json').write_text('{}')
  opened = deepmind.read(path)
  assert opened.tokenizer is not None
  assert [f.name for f in opened.files] == [
    'tokenizer.model',
    'tokenizer_config.json',
  ]


def write(path, config, leaves, **more):
  with deepmind.writer(path, config, **more) as put:
    for name, leaf in leaves.items():
      put(name, leaf)


@pytest.mark.parametrize('part_bytes', [1, 2**20])
@pytest.mark.parametrize('family', trees.CONFIGS)
def test_what_is_written_is_a_released_tree(
  tmp_path, monkeypatch, family, part_bytes
):
  monkeypatch.setattr(model_dir, 'PART_BYTES', part_bytes)
  config, leaves, names = made(family, ml_dtypes.bfloat16)
  write(tmp_path / 'm', config, leaves, provenance={'source': {'a': 1}})
  for checkpointer in (ocp.StandardCheckpointer(), ocp.PyTreeCheckpointer()):
    restored = tree.named(checkpointer.restore(tmp_path / 'm'))
    assert restored.keys() == names.keys()
    for name, expected in names.items():
      assert np.asarray(restored[name]).tobytes() == expected.tobytes(), name
  opened = deepmind.read(tmp_path / 'm')
  same(opened, leaves)
  assert opened.config == config
  assert opened.provenance['source'] == {'a': 1}


def test_a_tree_is_written_as_it_was_read(tmp_path):
  config, leaves, _ = made('gemma2')
  odd = trees.nested(config, leaves, transposed=False)
  path = trees.save(tmp_path / 'm', naming.nested(odd))
  opened = deepmind.read(path)
  write(tmp_path / 'o', config, leaves, provenance=opened.provenance)
  restored = tree.named(ocp.PyTreeCheckpointer().restore(tmp_path / 'o'))
  gating = 'layer_0/mlp/gating_einsum'
  np.testing.assert_array_equal(restored[gating], odd[gating])


def test_an_unfinished_tree_is_none(tmp_path, monkeypatch):
  config, leaves, _ = made('gemma2')
  some = dict(list(leaves.items())[:5])
  with pytest.raises(ValueError, match='never came'):
    write(tmp_path / 'm', config, some)
  assert list(tmp_path.iterdir()) == []

  def full(*args):
    raise OSError(errno.ENOSPC, 'No space left on device')

  monkeypatch.setattr(leaf_files, 'save', full)
  with pytest.raises(UserError, match='disk full while writing'):
    write(tmp_path / 'm', config, leaves)
  assert list(tmp_path.iterdir()) == []


def test_only_our_own_are_overwritten(tmp_path):
  config, leaves, names = made('gemma1')
  path = trees.save(tmp_path / 'm', naming.nested(names))
  for overwrite in (False, True):
    with pytest.raises(UserError, match='exists'):
      write(path, config, leaves, overwrite=overwrite)
  write(tmp_path / 'o', config, leaves)
  changed = {**leaves, 'final_norm': leaves['final_norm'] + 1}
  write(tmp_path / 'o', config, changed, overwrite=True)
  same(deepmind.read(tmp_path / 'o'), changed)


def test_a_broken_side_file_is_refused(tmp_path):
  config, leaves, _ = made('gemma1')
  write(tmp_path / 'm', config, leaves)
  file = tmp_path / 'm' / deepmind.SIDE_FILE
  facts = json.loads(file.read_text())
  for broken in ({**facts, 'format': 9}, {**facts, 'config': 3}, []):
    file.write_text(json.dumps(broken))
    with pytest.raises(UserError, match='alignjax.json is not sound'):
      deepmind.read(tmp_path / 'm')


def test_shapes_come_without_weights(tmp_path):
  _, _, names = made('gemma2')
  path = trees.save(tmp_path / 'm', naming.nested(names), 'zarr')
  for chunk in path.glob('layer_*/[0-9]*'):
    chunk.unlink()
  assert deepmind.read(path).leaves['layer_0/attn/q'] == Spec(
    (16, 4, 8), np.float32
  )
  shutil.rmtree(path / 'layer_0.mlp.linear')
  with pytest.raises(UserError, match='layer_0/mlp/linear .* is missing'):
    deepmind.read(path)
