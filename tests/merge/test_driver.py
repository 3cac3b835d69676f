import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.core import tree
from alignjax.core.types import UserError
from alignjax.merge import driver, merge
from alignjax.system import model_dir


def params(seed, shape=(4, 3), dtype=np.float32):
  draw = np.random.default_rng(seed).normal
  leaf = lambda: np.asarray(jnp.asarray(draw(size=shape), dtype))  # noqa: E731
  return {
    'embed': {'table': leaf()},
    'final_norm': {'scale': leaf()},
    'layer_0': {'attn': {'q': leaf()}, 'ffw': {'up': leaf()}},
    'layer_1': {'attn': {'q': leaf()}, 'ffw': {'up': leaf()}},
  }


def write(path, weights, provenance=None, tokenizer=b'pieces', **more):
  file = path.parent / f'{path.name}.tokenizer'
  file.write_bytes(tokenizer)
  return model_dir.write(
    path,
    config={'width': 3},
    params={'policy': weights},
    provenance=provenance or {},
    tokenizer=file,
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
  what = driver.plan(method, base=base, models=models, out=out, **more)
  return driver.run(what)


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
    model_dir,
    'load_leaf',
    lambda *arguments: reads.append(arguments) or load_leaf(*arguments),
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

  def spied(model, role, name):
    live.append(name)
    return load_leaf(model, role, name)

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
    'layer_1': {'attn': b['layer_1']['attn'], 'ffw': plain['layer_1']['ffw']},
  }
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
  assert result.config == {'width': 3}
  assert result.tokenizer.read_bytes() == b'pieces'
  said = result.provenance['merge']
  assert (said['method'], said['numbers']) == ('slerp', {'t': 0.3})
  for source, path in zip([said['base'], *said['models']], paths):
    digest = model_dir.digest(model_dir.read(path))
    assert source == {'path': str(path), 'digest': digest}
  assert set(said['angles_deg']) == {
    'embed',
    'final_norm',
    'layer_0',
    'layer_1',
  }
  assert all(0 < angle < 180 for (angle,) in said['angles_deg'].values())


def test_what_belongs_to_the_base_travels(three, tmp_path):
  paths, (weights, _, _) = three
  names = ('tokenizer.json', 'chat_template.jinja', 'certificate.json')
  for name in names:
    (tmp_path / name).write_text(name)
  source = {'format': 'hf', 'prefix': 'language_model.'}
  tower = {
    'vision': {'w': np.arange(6, dtype=np.float16).reshape(2, 3)},
    'projector': jnp.ones((3, 2), jnp.bfloat16),
  }
  tokenizer = paths[0].parent / 'base.tokenizer'
  base = model_dir.write(
    paths[0],
    config={'width': 3},
    params={'policy': weights, 'extra': tower},
    provenance={'source': source, 'made': 'for this test'},
    tokenizer=tokenizer,
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
    assert (result.path / 'tokenizer.model').read_bytes() == b'pieces'
    assert result.provenance['source'] == source
    assert 'made' not in result.provenance
    assert result.roles == ('policy', 'extra')
    identical(model_dir.load(result, 'extra'), tower)
    assert result.checksums['extra'] == base.checksums['extra']


def test_only_the_base_gives_other_tensors(three, tmp_path):
  paths, (_, a, _) = three
  model_dir.write(
    paths[1],
    config={'width': 3},
    params={'policy': a, 'extra': {'w': np.ones(2)}},
    provenance={'source': {'format': 'hf'}},
    tokenizer=tmp_path / 'a.tokenizer',
    overwrite=True,
  )
  (result,) = merged('slerp', paths, tmp_path / 'out')
  assert result.roles == ('policy',)
  assert 'source' not in result.provenance


def test_different_shapes_are_refused(three, tmp_path):
  paths, _ = three
  write(paths[2], params(2, shape=(5, 3)), overwrite=True)
  with pytest.raises(UserError, match='different shapes: embed/table is') as e:
    merged('slerp', paths, tmp_path / 'out')
  assert str(e.value).count('[4, 3]') == 6  # every leaf
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


def test_different_tokenizers_are_refused(three, tmp_path):
  paths, (_, _, b) = three
  write(paths[2], b, tokenizer=b'other', overwrite=True)
  with pytest.raises(UserError, match='different tokenizers'):
    merged('slerp', paths, tmp_path / 'out')


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
