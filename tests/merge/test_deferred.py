"""Merges that nobody writes: the streamed ones, and what is refused."""

import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from alignjax.core import naming, tree
from alignjax.core.errors import UserError
from alignjax.core.spec import Spec
from alignjax.merge import deferred, driver, inputs, placed, planning
from alignjax.models import decoder, sharding
from alignjax.models.config import to_json
from alignjax.models.shapes import shapes as shapes_of
from alignjax.system import mesh as meshes
from alignjax.system import model_dir
from tests import tiny


def write(
  path, seed, *, head='tied', provenance=None, config=None, dtype='float32'
):
  config = config or tiny.config()
  draw = np.random.default_rng(seed).normal
  shapes = shapes_of(config)
  if head != 'tied':
    shapes['scalar_head'] = Spec((config.width, 1), 'f4')
  params = {
    name: np.asarray(0.1 * draw(size=spec.shape), dtype)
    for name, spec in shapes.items()
  }
  return model_dir.write(
    path,
    config=to_json(config),
    params={'policy': naming.nested(params)},
    provenance=provenance or {},
    head=head,
  )


@pytest.fixture(scope='module')
def where(tmp_path_factory):
  path = tmp_path_factory.mktemp('models')
  for i, name in enumerate(('base', 'a', 'b', 'c')):
    write(path / name, i)
  return path


def slerp(where, **more):
  models = [str(where / name) for name in 'ab']
  return {
    'method': 'slerp',
    'base': str(where / 'base'),
    'models': models,
    't': 0.3,
  } | more


def liti(where, model, base='base', rate=0.4):
  base = str(where / base) if isinstance(base, str) else base
  return {'method': 'liti', 'base': base, 'models': [model], 'liti_rate': rate}


def streamed(spec, out):
  """What `alignjax merge` writes, one directory after the other."""
  fields = dict(spec)
  models = []
  for i, model in enumerate(fields.pop('models')):
    if not isinstance(model, str):
      model = str(streamed(model, Path(f'{out}_{i}')))
    models.append(model)
  base = fields.pop('base', None)
  if isinstance(base, dict):
    base = str(streamed(base, Path(f'{out}_base')))
  what = planning.plan(
    fields.pop('method'), base=base, models=models, out=out, **fields
  )
  return driver.run(what)[0]


def leaves(path):
  return tree.named(model_dir.load(model_dir.read(path)))


def specs(where):
  round_2 = liti(where, slerp(where))
  return {
    'slerp': slerp(where),
    'slerp of three': {
      'method': 'slerp',
      'base': str(where / 'base'),
      'models': [str(where / name) for name in 'abc'],
      'group': 'all',
    },
    'linear': {
      'method': 'linear',
      'models': [str(where / name) for name in 'abc'],
      'weights': [1.0, 2.0, 5.0],
      'where': ['layer_0/.*:weights=[0,1,0]'],
    },
    'ties': slerp(where) | {'method': 'ties', 'density': 0.5, 't': None},
    'liti of slerp': liti(where, slerp(where)),
    'the next round': slerp(
      where, base=round_2, models=[str(where / 'c'), round_2]
    ),
  }


NAMES = tuple(specs(Path('.')))


@pytest.mark.parametrize('name', NAMES)
def test_it_is_the_streamed_merge_bit_for_bit(where, tmp_path, name):
  spec = specs(where)[name]
  found = deferred.opened(spec)
  for leaf, x in leaves(streamed(spec, tmp_path / 'out')).items():
    np.testing.assert_array_equal(found.load(leaf), x)


@pytest.mark.parametrize(
  ('name', 'devices'),
  [('liti of slerp', 1), *((name, 4) for name in NAMES if name != 'ties')],
)
def test_on_a_mesh_it_is_the_streamed_merge(where, tmp_path, name, devices):
  spec = specs(where)[name]
  mesh = meshes.make({'fsdp': -1}, jax.devices()[:devices])
  layout = functools.partial(decoder.stacked, tiny.config())
  found = placed.onto(deferred.opened(spec), layout, sharding.TABLE, mesh)
  for x in jax.tree.leaves(found):
    assert len(x.sharding.device_set) == devices
  if devices > 1:
    assert not found['embedding'].sharding.is_fully_replicated
  found = tree.named(decoder.canonical(jax.device_get(found)))
  expected = leaves(streamed(spec, tmp_path / 'out'))
  assert set(found) == set(expected)
  for leaf, x in expected.items():
    np.testing.assert_allclose(found[leaf], x, atol=1e-6 * np.abs(x).max())


def test_on_a_mesh_it_is_the_same_bits_again(where):
  mesh = meshes.make({'fsdp': -1}, jax.devices()[:4])
  layout = functools.partial(decoder.stacked, tiny.config())
  one, two = (
    placed.onto(
      deferred.opened(liti(where, slerp(where))), layout, sharding.TABLE, mesh
    )
    for _ in range(2)
  )
  jax.tree.map(np.testing.assert_array_equal, one, two)


def test_arithmetic_is_float32_and_the_dtype_what_is_said(tmp_path):
  for i, name in enumerate(('base', 'a', 'b')):
    write(tmp_path / name, i, dtype='bfloat16')
  mesh = meshes.make({'fsdp': -1}, jax.devices()[:4])
  layout = functools.partial(decoder.stacked, tiny.config())
  for dtype in ('keep', 'float32'):
    spec = slerp(tmp_path, dtype=dtype)
    found = deferred.opened(spec)
    out = streamed(spec, tmp_path / f'out_{dtype}')
    there = placed.onto(found, layout, sharding.TABLE, mesh)
    there = tree.named(decoder.canonical(jax.device_get(there)))
    close = 1e-6 if dtype == 'float32' else 2**-8  # one bit of bfloat16
    for leaf, x in leaves(out).items():
      assert found.load(leaf).dtype == there[leaf].dtype == x.dtype
      np.testing.assert_array_equal(found.load(leaf), x)
      x, y = (np.asarray(v, np.float32) for v in (x, there[leaf]))
      np.testing.assert_allclose(y, x, atol=close * np.abs(x).max())


def test_words_are_json_a_section_or_a_dict(where):
  spec = liti(where, slerp(where))
  texts = [spec, json.dumps(spec), ConfigDict(spec)]
  found = [deferred.opened(words) for words in texts]
  assert len({str(model.path) for model in found}) == 1
  assert all(map(deferred.is_spec, texts))
  assert not deferred.is_spec('a/path') and not deferred.is_spec('@policy')
  digests = {inputs.digest(model, 'policy') for model in found}
  assert len(digests) == 1 and None not in digests
  other = deferred.opened(liti(where, slerp(where), rate=0.5))
  assert inputs.digest(other, 'policy') not in digests


def test_a_leaf_of_a_model_is_read_once_however_deep(where, monkeypatch):
  # Three rounds of WARP: the first init is in each of them.
  init = str(where / 'base')
  for _ in range(3):
    init = liti(where, slerp(where, base=init), base=init)
  read = []
  load = model_dir.load_leaf

  def noted(found, role, name, *rest):
    read.append((found.path.name, name))
    return load(found, role, name, *rest)

  monkeypatch.setattr(model_dir, 'load_leaf', noted)
  found = deferred.opened(init)
  found.load('embedding')
  # Once for the angle of each round, once for the leaf itself, at most.
  for name in ('base', 'a', 'b'):
    assert read.count((name, 'embedding')) <= 4


def test_on_a_mesh_only_the_result_is_ever_whole(tmp_path, monkeypatch):
  config = tiny.config(layers=8)
  for i, name in enumerate(('base', 'a', 'b')):
    write(tmp_path / name, i, config=config)
  found = deferred.opened(liti(tmp_path, slerp(tmp_path)))
  sizes = [4 * spec.size for spec in found.leaves.values()]
  mesh = meshes.make({'fsdp': -1}, jax.devices()[:4])
  put, held = meshes.put, []

  def noted(*arguments):
    out = put(*arguments)
    held.append(sum(x.nbytes for x in jax.live_arrays()))
    return out

  before = sum(x.nbytes for x in jax.live_arrays())
  monkeypatch.setattr(meshes, 'put', noted)
  layout = functools.partial(decoder.stacked, config)
  placed.onto(found, layout, sharding.TABLE, mesh)
  # One copy, and a leaf each of three inputs and of the merge within.
  assert max(held) - before < 1.2 * sum(sizes)


def refused(spec, words):
  with pytest.raises(UserError, match=words):
    deferred.opened(spec)


def test_what_is_wrong_is_said_before_anything_is_read(where, tmp_path):
  refused(slerp(where, method='slurp'), "no 'slurp' in merge.methods")
  refused(slerp(where, models=[str(where / 'nobody')] * 2), 'no model at')
  refused(slerp(where, base=''), 'slerp needs --base')
  refused(slerp(where, t=2), 't must be a number from 0 to 1')
  refused(slerp(where, t=[0.1, 0.2]), 't must be a number')
  refused(slerp(where, rate=1), "no number 'rate'")
  refused(slerp(where, models=str(where / 'a')), 'models is a list')
  refused(slerp(where, models=[3, 4]), '3 is no path of a model')
  refused(slerp(where, dtype='float16'), "'float16' is none of")
  refused('{"method": slerp}', 'a merge as text is JSON')
  refused({'models': [str(where / 'a')]}, 'names its method')
  write(tmp_path / 'wide', 0, config=tiny.config(width=40))
  refused(
    slerp(where, models=[str(where / 'a'), str(tmp_path / 'wide')]),
    'different architectures: width is 32',
  )
  write(tmp_path / 'rows', 0, config=tiny.config(vocab_size=280))
  refused(
    liti(where, slerp(where, base=str(tmp_path / 'rows'))),
    'different shapes: embedding is',
  )
  write(tmp_path / 'judge', 0, head='scalar(1)')
  refused(
    slerp(where, models=[str(where / 'a'), str(tmp_path / 'judge')]),
    'different kinds of models',
  )
  with pytest.raises(UserError, match="head is 'tied', expected 'scalar'"):
    deferred.opened(slerp(where), head='scalar')


def test_weights_that_cannot_be_merged_are_refused(where, tmp_path):
  base, a = (leaves(where / name) for name in ('base', 'a'))
  config = to_json(tiny.config())
  opposite = {name: x - (a[name] - x) for name, x in base.items()}
  broken = a | {'final_norm': a['final_norm'] * np.nan}
  for name, of in (('opposite', opposite), ('broken', broken)):
    model_dir.write(
      tmp_path / name,
      config=config,
      params={'policy': naming.nested(of)},
      provenance={},
    )
  mesh = meshes.make({'fsdp': -1}, jax.devices()[:4])
  layout = functools.partial(decoder.stacked, tiny.config())
  for name, words in (('opposite', 'opposite'), ('broken', 'non-finite|NaN')):
    models = [str(where / 'a'), str(tmp_path / name)]
    for method in ('slerp', 'linear'):
      if (method, name) == ('linear', 'opposite'):
        continue
      spec = slerp(where, method=method, models=models)
      found = deferred.opened(spec)
      with pytest.raises(UserError, match=words):
        placed.onto(found, layout, sharding.TABLE, mesh)
      with pytest.raises(UserError, match=words):
        for leaf in found.leaves:
          found.load(leaf)


def test_a_merge_by_files_takes_merges(where, tmp_path):
  spec = slerp(where, base=liti(where, slerp(where)), models=[])
  models = [slerp(where), str(where / 'c')]
  spec |= {'models': models}
  expected = leaves(streamed(spec, tmp_path / 'steps'))
  fields = dict(spec)
  what = planning.plan(fields.pop('method'), **fields, out=tmp_path / 'direct')
  (out,) = driver.run(what)
  for leaf, x in leaves(out).items():
    np.testing.assert_array_equal(x, expected[leaf])
  said = model_dir.read(out).provenance['merge']
  assert said['base']['merge']['models'][0]['merge']['method'] == 'slerp'
  # And says enough to be made again.
  again = planning.recorded(out)
  what = planning.plan(again.pop('method'), **again, out=tmp_path / 'again')
  (out,) = driver.run(what)
  for leaf, x in leaves(out).items():
    np.testing.assert_array_equal(x, expected[leaf])


def test_bases_are_compared_by_what_they_are_merged_of(where, tmp_path):
  spec = liti(where, slerp(where))
  begun = inputs.digest(deferred.opened(spec), 'policy')
  for i, name in enumerate('de'):
    provenance = {'init': {'checksum': begun}}
    write(tmp_path / name, 7 + i, provenance=provenance)
  models = [str(tmp_path / name) for name in 'de']
  written = str(streamed(spec, tmp_path / 'init'))
  # slerp is written first here, and liti then read it from its directory.
  refused(slerp(where, base=written, models=models), 'different bases')
  fields = dict(spec)
  name = fields.pop('method')
  what = planning.plan(name, **fields, out=tmp_path / 'same')
  (written,) = driver.run(what)
  for base in (spec, str(written)):
    assert deferred.opened(slerp(where, base=base, models=models))
  refused(slerp(where, models=models), 'different bases')
  other = liti(where, slerp(where), rate=0.41)
  refused(slerp(where, base=other, models=models), 'different bases')
  assert deferred.opened(
    slerp(where, base=other, models=models, allow_different_bases=True)
  )


def test_a_base_that_another_verb_has_put_together_is_a_base(where, tmp_path):
  for name in ('base', 'a', 'b'):
    write(tmp_path / name, 3, provenance={'merge': {'method': 'stack'}})
  assert deferred.opened(slerp(tmp_path))
