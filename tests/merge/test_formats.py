"""Models of different formats in one merge, and out in any of them."""

import shutil
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from alignjax.core import naming, tree
from alignjax.core.errors import UserError
from alignjax.interop import convert
from alignjax.interop.open import open as open_model
from alignjax.merge import blocks, driver, inputs, planning
from alignjax.merge.memory import merge
from alignjax.models.config import to_json
from alignjax.models.gemma import gemma
from alignjax.models.preset import SHAPES
from alignjax.models.shapes import shapes
from alignjax.system import model_dir

CONFIG = gemma(
  family='gemma2',
  vocab_size=64,
  width=8,
  hidden=12,
  layers=2,
  heads=2,
  kv_heads=1,
  head_dim=4,
  window=4,
  dtype='bfloat16',
)
FORMATS = ('alignjax', 'hf', 'deepmind')
BF16 = np.dtype(ml_dtypes.bfloat16)


@pytest.fixture(scope='module')
def models(tmp_path_factory):
  """(format, seed) -> path, and seed -> tree, of three models."""
  where = tmp_path_factory.mktemp('models')
  paths, trees = {}, {}
  for seed in range(3):
    draw = np.random.default_rng(seed).normal
    trees[seed] = {
      name: draw(size=x.shape).astype(BF16)
      for name, x in shapes(CONFIG).items()
    }
    own = where / f'alignjax_{seed}'
    params = {'policy': naming.nested(trees[seed])}
    model_dir.write(own, config=to_json(CONFIG), params=params, provenance={})
    for to in FORMATS:
      paths[to, seed] = where / f'{to}_{seed}'
      if to != 'alignjax':
        convert.run(convert.plan(open_model(own), paths[to, seed], to=to))
  return paths, trees


def leaves_of(path):
  opened = open_model(path)
  return {name: opened.load(name) for name in opened.leaves}


@pytest.mark.parametrize('format', FORMATS)
@pytest.mark.parametrize(
  ('method', 'numbers'), [('slerp', {'t': 0.3}), ('linear', {})]
)
def test_formats_mix(models, tmp_path, monkeypatch, format, method, numbers):
  paths, trees = models
  monkeypatch.setattr(blocks, 'ITEMS', 24)  # several blocks a leaf
  given = [
    paths[to, seed] for seed, to in enumerate((format, 'hf', 'deepmind'))
  ]
  what = planning.plan(
    method, base=given[0], models=given[1:], out=tmp_path / 'out', **numbers
  )
  assert what.outputs[0].to == format
  (result,) = driver.run(what)
  base, *others = map(naming.nested, trees.values())
  expected = tree.named(merge(method, base=base, models=others, **numbers))
  found = leaves_of(result)
  assert found.keys() == expected.keys()
  for name, x in found.items():
    if method == 'linear':
      assert x.tobytes() == np.asarray(expected[name]).tobytes(), name
    else:  # sums of blocks that are cut otherwise
      np.testing.assert_allclose(
        x.astype('f4'), expected[name].astype('f4'), rtol=2**-7, atol=1e-6
      )


@pytest.mark.parametrize('to', FORMATS)
def test_the_result_has_the_format_that_is_asked_for(models, tmp_path, to):
  paths, trees = models
  base, model = paths['hf', 0], paths['hf', 1]
  what = planning.plan(
    'liti',
    base=base,
    models=[model],
    out=tmp_path / 'o',
    liti_rate=[0.0, 1.0],
    format=to,
  )
  for seed, result in enumerate(driver.run(what)):
    opened = open_model(result)
    assert opened.format == to
    for name, x in leaves_of(result).items():
      assert x.tobytes() == trees[seed][name].tobytes(), name
    said = opened.provenance['merge']
    assert said['method'] == 'liti' and said['base']['path'] == str(base)


def test_large_leaves_lie_in_files(models, tmp_path, monkeypatch):
  paths, _ = models
  monkeypatch.setattr(inputs, 'HELD_BYTES', 100)
  in_files = []
  empty = inputs.empty

  def spied(shape, dtype, scratch):
    out = empty(shape, dtype, scratch)
    in_files.append(inputs.on_file(out))
    return out

  monkeypatch.setattr(inputs, 'empty', spied)
  base, *others = (paths['alignjax', seed] for seed in range(3))
  out = tmp_path / 'out'
  driver.run(planning.plan('linear', base=base, models=others, out=out))
  assert in_files.count(True) > 10
  assert [path.name for path in tmp_path.iterdir()] == ['out']
  plain = tmp_path / 'plain'
  monkeypatch.undo()
  driver.run(planning.plan('linear', base=base, models=others, out=plain))
  digests = {model_dir.digest(model_dir.read(path)) for path in (out, plain)}
  assert len(digests) == 1


def test_weights_have_one_name_in_every_format(models, tmp_path):
  paths, _ = models
  own = model_dir.digest(model_dir.read(paths['alignjax', 1]))
  for to in FORMATS:
    copy = shutil.copytree(paths[to, 1], tmp_path / to)
    given = {'base': paths[to, 0], 'models': [copy], 'liti_rate': 0.3}
    plain = planning.plan('liti', **given, out=tmp_path / f'plain_{to}')
    assert plain.digests.get(str(copy)) == (own if to == 'alignjax' else None)
    out = tmp_path / f'out_{to}'
    driver.run(planning.plan('liti', **given, out=out, checksums=True))
    (said,) = open_model(out).provenance['merge']['models']
    assert said == {'path': str(copy), 'digest': own}
    again = planning.recorded(out)
    assert again.pop('checksums') and again['models'] == [str(copy)]
    if to == 'alignjax':
      continue
    shutil.rmtree(copy)
    shutil.copytree(paths[to, 2], copy)  # other weights under that name
    with pytest.raises(UserError, match=f'{to} has other weights'):
      planning.recorded(out)


def test_another_base_is_found_by_its_weights(models, tmp_path):
  paths, trees = models
  own = model_dir.digest(model_dir.read(paths['alignjax', 0]))
  model_dir.write(
    tmp_path / 'run',
    config=to_json(CONFIG),
    params={'policy': naming.nested(trees[1])},
    provenance={'init': {'checksum': own}},
  )

  def planned(seed, **more):
    return planning.plan(
      'liti',
      base=paths['hf', seed],
      models=[tmp_path / 'run'],
      out=tmp_path / 'out',
      **more,
    )

  planned(0, checksums=True)
  planned(2)  # not known
  with pytest.raises(UserError, match='different bases'):
    planned(2, checksums=True)
  planned(2, checksums=True, allow_different_bases=True)


@pytest.mark.parametrize('shape', ['gemma2-2b', 'recurrentgemma-2b'])
def test_linear_maps_lie_with_their_outputs_first(shape):
  for name, spec in shapes(SHAPES[shape]).items():
    if not name.startswith(('layer_0/', 'layer_2/')):
      continue
    x = np.broadcast_to(np.float32(0), spec.shape)
    turned = inputs.outputs_first(name, x)
    back = inputs.stored_again(name, np.asarray(turned), spec.shape)
    assert back.shape == spec.shape
    if 'attn/o' in name and not name.endswith('bias'):
      assert turned.shape == (spec.shape[-1], spec.shape[0] * spec.shape[1])
  small = np.arange(24).reshape(2, 3, 4)
  for name in ('layer_0/attn/q', 'layer_0/attn/o', 'layer_0/recurrent/conv'):
    x = small if 'attn' in name else small.reshape(4, 6)
    turned = inputs.as_matrix(name, x, True)
    back = inputs.stored_again(name, turned, x.shape)
    np.testing.assert_array_equal(back, x)
  first = inputs.outputs_first('layer_0/attn/q', small)
  np.testing.assert_array_equal(first[:, 0], small[0].reshape(-1))


def test_merging_files_of_hugging_face_imports_no_jax(models, tmp_path):
  paths, _ = models
  code = (
    'import sys\n'
    'from alignjax.cli import merge\n'
    'code = merge.main(sys.argv[1:])\n'
    'assert not {"jax", "flax", "orbax", "optax"} & {*sys.modules}, "slow"\n'
    'raise SystemExit(code)\n'
  )
  out = tmp_path / 'out'
  given = [str(paths['hf', seed]) for seed in range(3)]
  argv = ['slerp', '--base', given[0], '--models', *given[1:], '--t', '0.5']
  subprocess.run(
    [sys.executable, '-c', code, *argv, '--out', str(out)], check=True
  )
  assert leaves_of(out).keys() == leaves_of(given[0]).keys()
