import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.core import naming, tree
from alignjax.core.errors import UserError
from alignjax.data import tokenizer as tokenizers
from alignjax.merge import driver, planning
from alignjax.merge.memory import merge
from alignjax.models.config import to_json
from alignjax.models.gemma import gemma
from alignjax.models.shapes import shapes
from alignjax.system import model_dir

CONFIG = gemma(
  family='gemma2',
  vocab_size=500,
  width=4,
  hidden=6,
  layers=2,
  heads=2,
  kv_heads=1,
  head_dim=2,
  window=4,
)


def params(seed, config=CONFIG, dtype=np.float32):
  draw = np.random.default_rng(seed).normal
  return jax.tree.map(
    lambda x: np.asarray(jnp.asarray(draw(size=x.shape), dtype)),
    naming.nested(shapes(config)),
  )


def write(path, weights, provenance=None, config=CONFIG, **more):
  return model_dir.write(
    path,
    config=to_json(config),
    params={'policy': weights},
    provenance=provenance or {},
    **more,
  )


@pytest.fixture
def three(tmp_path):
  """Paths of a base and two models, and their trees."""
  paths = [tmp_path / name for name in ('base', 'a', 'b')]
  trees = [params(seed) for seed in range(3)]
  for path, weights in zip(paths, trees):
    write(path, weights)
  return paths, trees


def merged(method, paths, out, **more):
  base, *models = paths
  what = planning.plan(method, base=base, models=models, out=out, **more)
  return [model_dir.read(path) for path in driver.run(what)]


def identical(a, b):
  a, b = tree.named(a), tree.named(b)
  assert list(a) == list(b)
  for name in a:
    assert np.asarray(a[name]).dtype == np.asarray(b[name]).dtype
    assert np.asarray(a[name]).tobytes() == np.asarray(b[name]).tobytes(), name


@pytest.mark.parametrize(
  ('method', 'numbers'),
  [
    ('slerp', {'t': 0.3}),
    ('slerp', {'group': 'all'}),
    ('lerp', {'t': 0.3}),
    ('linear', {'weights': [0.2, 0.3]}),
  ],
)
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_streamed_is_in_memory_bit_for_bit(tmp_path, method, numbers, dtype):
  trees = [params(seed, dtype=dtype) for seed in range(3)]
  paths = [tmp_path / str(seed) for seed in range(3)]
  for path, weights in zip(paths, trees):
    write(path, weights)
  (result,) = merged(method, paths, tmp_path / 'out', **numbers)
  base, *models = trees
  identical(
    model_dir.load(result),
    merge(method, base=base, models=models, **numbers),
  )


def test_ends_are_the_models(three, tmp_path):
  paths, (_, a, b) = three
  first, last = merged('slerp', paths, tmp_path / 'out', t=[0.0, 1.0])
  identical(model_dir.load(first), a)
  identical(model_dir.load(last), b)


def test_a_list_gives_several_results_in_one_pass(three, tmp_path, monkeypatch):
  paths, (base, a, _) = three
  reads = []
  load_leaf = model_dir.load_leaf
  monkeypatch.setattr(
    model_dir, 'load_leaf', lambda *of: reads.append(of) or load_leaf(*of)
  )
  rates = [0, 0.3, 0.5, 0.125, 1]
  out = tmp_path / 'front'
  results = merged('liti', paths[:2], out, liti_rate=rates)
  assert len(reads) == 2 * len(tree.named(base))
  names = ['liti_0.00', 'liti_0.30', 'liti_0.50', 'liti_0.125', 'liti_1.00']
  assert [result.path.name for result in results] == names
  assert sorted(p.name for p in out.iterdir()) == sorted(names)
  for rate, result in zip(rates, results):
    identical(
      model_dir.load(result),
      merge('liti', base=base, models=[a], liti_rate=rate),
    )


def test_one_leaf_at_a_time_is_in_memory(three, tmp_path, monkeypatch):
  paths, _ = three
  monkeypatch.setattr(model_dir, 'PART_BYTES', 1)
  live = []
  load_leaf = model_dir.load_leaf

  def spied(model, role, name, *rest):
    live.append(name)
    return load_leaf(model, role, name, *rest)

  monkeypatch.setattr(model_dir, 'load_leaf', spied)
  monkeypatch.setattr(
    model_dir, 'load', lambda *_: pytest.fail('a whole model was read')
  )
  (result,) = merged('slerp', paths, tmp_path / 'out', t=0.5)
  names = list(result.checksums['policy'])
  assert live == [name for name in names * 2 for _ in range(3)]


def test_rules_change_some_leaves(three, tmp_path):
  paths, (base, a, b) = three
  where = ['layer_0/.*:t=0.0', r'(?:layer_\d|x:y)/attn/q:t=1.0']
  (result,) = merged('slerp', paths, tmp_path / 'out', t=0.5, where=where)
  plain = merge('slerp', base=base, models=[a, b], t=0.5)
  expected = {
    **plain,
    'layer_0': a['layer_0'],
    'layer_1': plain['layer_1'],
  }
  expected['layer_1']['attn']['q'] = b['layer_1']['attn']['q']
  identical(model_dir.load(result), expected)
  assert result.provenance['merge']['where'] == where


@pytest.mark.parametrize(
  ('rule', 'message'),
  [
    ('layer_9/.*:t=0.2', 'matches no leaf'),
    ('layer_0:t=0.2', 'matches no leaf'),
    ('layer_0/.*', 'is not of the form'),
    ('layer_0/.*:t', 'is not of the form'),
    ('layer_0/.*:t=half', 'is not of the form'),
    ('layer_0/(:t=0.5', 'bad regex'),
    ('layer_0/.*:t=1.5', 't must be a number from 0 to 1'),
    ('layer_0/.*:lam=0.5', "no number 'lam'"),
  ],
)
def test_bad_rules_are_refused(three, tmp_path, rule, message):
  with pytest.raises(UserError, match=message):
    merged('slerp', three[0], tmp_path / 'out', where=[rule])
  assert not (tmp_path / 'out').exists()


def test_a_rule_behind_another_is_refused(three, tmp_path):
  where = ['layer_.*:t=0.2', 'layer_0/.*:t=0.3']
  with pytest.raises(UserError, match='earlier rules take all its leaves'):
    merged('slerp', three[0], tmp_path / 'out', where=where)


def test_provenance_says_what_was_merged(three, tmp_path):
  paths, _ = three
  (result,) = merged('slerp', paths, tmp_path / 'out', t=0.3)
  assert result.config == to_json(CONFIG)
  said = result.provenance['merge']
  assert (said['method'], said['numbers']) == ('slerp', {'t': 0.3})
  for source, path in zip([said['base'], *said['models']], paths):
    digest = model_dir.digest(model_dir.read(path))
    assert source == {'path': str(path), 'digest': digest}
  groups = {'embedding', 'final_norm', 'layer_0', 'layer_1'}
  assert set(said['angles_deg']) == groups
  assert all(0 < angle < 180 for (angle,) in said['angles_deg'].values())
  assert set(said['norms']) == groups
  assert all(a > 0 and b > 0 for a, b in said['norms'].values())


def test_what_belongs_to_the_base_travels(three, tmp_path):
  paths, (weights, a, _) = three
  tokenizers.train(['def f(x):\n  return x\n'] * 50, tmp_path / 'pieces')
  names = ('tokenizer.json', 'chat_template.jinja', 'certificate.json')
  for name in names:
    (tmp_path / name).write_text(name)
  source = {'format': 'hf', 'prefix': 'language_model.'}
  tower = {
    'vision': {'w': np.arange(6, dtype=np.float16).reshape(2, 3)},
    'projector': jnp.ones((3, 2), jnp.bfloat16),
  }
  base = model_dir.write(
    paths[0],
    config=to_json(CONFIG),
    params={'policy': weights, 'extra': tower},
    provenance={'source': source, 'made': 'for this test'},
    tokenizer=tmp_path / 'pieces',
    files=[tmp_path / name for name in names],
    overwrite=True,
  )
  results = merged('slerp', paths, tmp_path / 'out', t=[0.2, 0.7])
  assert len(results) == 2
  for result in results:
    # A certificate is about the base only.
    assert [file.name for file in result.files] == [
      'chat_template.jinja',
      'tokenizer.json',
      'tokenizer.model',
    ]
    pieces = (tmp_path / 'pieces').read_bytes()
    assert (result.path / 'tokenizer.model').read_bytes() == pieces
    assert result.provenance['source'] == source
    assert 'made' not in result.provenance
    assert result.roles == ('policy', 'extra')
    identical(model_dir.load(result, 'extra'), tower)
    assert result.checksums['extra'] == base.checksums['extra']

  (tmp_path / 'other').write_bytes(b'other')
  write(paths[1], a, tokenizer=tmp_path / 'other', overwrite=True)
  with pytest.raises(UserError, match='different tokenizers'):
    merged('slerp', paths, tmp_path / 'more')


def test_only_the_base_gives_other_tensors(three, tmp_path):
  paths, (_, a, _) = three
  model_dir.write(
    paths[1],
    config=to_json(CONFIG),
    params={'policy': a, 'extra': {'w': np.ones(2)}},
    provenance={'source': {'format': 'hf'}},
    overwrite=True,
  )
  (result,) = merged('slerp', paths, tmp_path / 'out')
  assert result.roles == ('policy',)
  assert 'source' not in result.provenance


def test_different_models_are_refused(three, tmp_path):
  paths, _ = three
  for changes, message in (
    ({'hidden': 8}, 'architectures: hidden is 6 in .*/base and 8 in'),
    ({'vocab_size': 510}, r'shapes: embedding is \[500, 4\] .*--pad'),
  ):
    other = dataclasses.replace(CONFIG, **changes)
    write(paths[2], params(2, other), config=other, overwrite=True)
    with pytest.raises(UserError, match=message):
      merged('slerp', paths, tmp_path / 'out')
  write(paths[2], params(2, dtype=jnp.bfloat16), overwrite=True)
  with pytest.raises(UserError, match='different dtypes: .* and 19 more; say'):
    merged('slerp', paths, tmp_path / 'out')
  assert not (tmp_path / 'out').exists()
  (result,) = merged('slerp', paths, tmp_path / 'out', dtype='bfloat16')
  leaves = model_dir.leaves(result).values()
  assert {x.dtype for x in leaves} == {np.dtype(jnp.bfloat16)}


@pytest.mark.parametrize('rows', [490, 510])
def test_tables_of_different_rows(three, tmp_path, rows):
  paths, (base, a, b) = three
  other = dataclasses.replace(CONFIG, vocab_size=rows)
  write(paths[2], params(2, other), config=other, overwrite=True)
  b = params(2, other)
  (result,) = merged('linear', paths, tmp_path / 'out', t=0.25, pad=True)
  found = model_dir.load(result)['embedding']
  both = min(rows, 500)
  expected = 0.75 * a['embedding'][:both] + 0.25 * b['embedding'][:both]
  assert found.shape == (500, 4)
  np.testing.assert_allclose(found[:both], expected, atol=1e-6)
  rest = 0.75 * a['embedding'][both:] + 0.25 * base['embedding'][both:]
  np.testing.assert_allclose(found[both:], rest, atol=1e-6)


@pytest.mark.parametrize('method', ['slerp', 'linear'])
def test_weights_that_are_not_finite_are_named(three, tmp_path, method):
  paths, (_, _, b) = three
  up = b['layer_1']['ffw']['up'].copy()
  up[2, 3] = np.nan
  b['layer_1']['ffw']['up'] = up
  write(paths[2], b, overwrite=True)
  with pytest.raises(UserError, match='layer_1'):
    merged(method, paths, tmp_path / 'out')
  assert not (tmp_path / 'out').exists()


def test_different_bases_are_refused(three, tmp_path):
  paths, (_, a, b) = three
  own = model_dir.digest(model_dir.read(paths[0]))
  write(paths[1], a, {'init': {'checksum': own}}, overwrite=True)
  merged('slerp', paths, tmp_path / 'fine')
  write(paths[2], b, {'init': {'checksum': 'f' * 64}}, overwrite=True)
  with pytest.raises(UserError, match='different bases: .*b was trained'):
    merged('slerp', paths, tmp_path / 'out')
  assert not (tmp_path / 'out').exists()
  merged('slerp', paths, tmp_path / 'out', allow_different_bases=True)


def test_different_kinds_are_refused(three, tmp_path):
  paths, (_, _, b) = three
  write(paths[2], b, overwrite=True, head='untied')
  with pytest.raises(UserError, match="head is 'tied' in .*'untied'"):
    merged('slerp', paths, tmp_path / 'out')


def test_a_truncated_leaf_stops_the_merge(three, tmp_path):
  paths, _ = three
  file = paths[2] / 'params/policy/layer_1.ffw.up/0.0'
  file.write_bytes(file.read_bytes()[:20])
  with pytest.raises(UserError, match="b/params/policy: leaf 'layer_1/ffw/up'"):
    merged('lerp', paths, tmp_path / 'out')
  assert not [p for p in tmp_path.iterdir() if 'out' in p.name]


def test_results_are_not_overwritten(three, tmp_path):
  paths, _ = three
  merged('lerp', paths, tmp_path / 'out', t=0.2)
  before = model_dir.digest(model_dir.read(tmp_path / 'out'))
  with pytest.raises(UserError, match='out exists already'):
    merged('lerp', paths, tmp_path / 'out', t=0.7)
  assert model_dir.digest(model_dir.read(tmp_path / 'out')) == before
  merged('lerp', paths, tmp_path / 'out', t=0.7, overwrite=True)
  assert model_dir.digest(model_dir.read(tmp_path / 'out')) != before


def test_opposite_task_vectors_name_the_layer(three, tmp_path):
  paths, (base, a, b) = three
  b['layer_1'] = jax.tree.map(
    lambda x, y: 2 * x - y, base['layer_1'], a['layer_1']
  )
  write(paths[2], b, overwrite=True)
  with pytest.raises(UserError, match="opposite.*group 'layer_1'"):
    merged('slerp', paths, tmp_path / 'out')
  assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize(
  ('numbers', 'message'),
  [
    ({'t': []}, 't is an empty list'),
    ({'t': [0.5, 0.5]}, 'the value 0.5 twice'),
    ({'t': [0.5, 'x']}, "found 'x'"),
    ({'group': 'block'}, "not 'block'"),
    ({'role': 'value'}, "no role 'value'"),
  ],
)
def test_bad_arguments_are_refused(three, tmp_path, numbers, message):
  with pytest.raises(UserError, match=message):
    merged('slerp', three[0], tmp_path / 'out', **numbers)


def test_a_merge_can_be_made_again(three, tmp_path):
  paths, (_, a, _) = three
  where = ['layer_0/.*:t=[0.1,0.9]']
  (first,) = merged('slerp', paths, tmp_path / 'out', t=0.3, where=where)
  said = planning.recorded(first.path)
  what = planning.plan(said.pop('method'), out=tmp_path / 'again', **said)
  (again,) = map(model_dir.read, driver.run(what))
  assert model_dir.digest(again) == model_dir.digest(first)
  assert again.provenance == first.provenance
  with pytest.raises(UserError, match='does not say that it was merged'):
    planning.recorded(paths[0])
  write(paths[2], a, overwrite=True)
  with pytest.raises(UserError, match='b has other weights'):
    planning.recorded(first.path)


def test_values_spread_over_the_depth(three, tmp_path):
  paths, (_, a, b) = three
  where = ['.*:t=[0,1]']
  (result,) = merged('slerp', paths, tmp_path / 'out', where=where)
  found = model_dir.load(result)
  identical({'x': found['layer_0']}, {'x': a['layer_0']})
  identical({'x': found['layer_1']}, {'x': b['layer_1']})
  identical({'x': found['embedding']}, {'x': a['embedding']})
  identical({'x': found['final_norm']}, {'x': b['final_norm']})
