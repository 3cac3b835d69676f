"""Models by name and on disk, training runs, task vectors: all without load."""

import dataclasses
import json
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.cli import facts, inspect
from alignjax.core.errors import UserError
from alignjax.core.spec import Spec
from alignjax.core.types import TrainState
from alignjax.models.config import to_json
from alignjax.models.preset import SHAPES
from alignjax.models.shapes import shapes
from alignjax.system import checkpoint, model_dir
from tests import tiny

LOAD_LEAF = model_dir.load_leaf
CONFIG = tiny.config(family='gemma3', layers=13)


def params(seed):
  draw = np.random.default_rng(seed).normal
  return {
    name: draw(size=leaf.shape).astype(np.float32)
    for name, leaf in shapes(CONFIG).items()
  }


@pytest.fixture(autouse=True)
def no_weights(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(model_dir, 'load_leaf', None)


@pytest.fixture
def models(tmp_path, monkeypatch):
  for seed, name in enumerate(['base', 'a', 'b']):
    model_dir.write(
      name,
      config=to_json(CONFIG),
      params={'policy': params(seed).items()},
      provenance={'by': name},
    )


def said(capsys, *argv):
  assert inspect.main([*argv]) == 0
  return capsys.readouterr().out


def found(capsys, *argv):
  return json.loads(said(capsys, *argv, '--json'))


def test_a_released_model_by_name(capsys):
  out = said(capsys, 'gemma3-27b', '--length=32768')
  assert '27,009,002,240 parameters: embedding 1.41 B, body 25.6 B' in out
  assert '62 layers: 52 local, 10 global, window 1,024' in out
  # Keys and values of 10 layers, 16 heads of 128, 2 bytes.
  assert f'{2 * 10 * 16 * 128 * 2:,} bytes of keys and values per token' in out
  assert '32,768' in out and '131,072' not in out


@pytest.mark.parametrize('name', SHAPES)
def test_cache_bytes_by_hand(name):
  c, length, batch = SHAPES[name], 32_768, 3
  c = dataclasses.replace(c, dtype='bfloat16')
  cache = facts.cache(c, batch, [length])
  slot = 2 * c.kv_heads * c.head_dim * 2 + 4  # bfloat16, int32 position
  ring = c.count('local') * min(c.span, length) * slot
  # A convolution's last three inputs and a float32 state.
  state = c.count('recurrent') * (3 * c.lru_width * 2 + c.lru_width * 4)
  grows = c.count('global') * slot
  assert cache['growth_bytes_per_token'] == grows
  assert cache['kv_bytes_per_token'] == grows - 4 * c.count('global')
  assert cache['ring_bytes'] == batch * ring
  assert cache['recurrent_bytes'] == batch * state
  [row] = cache['lengths']
  assert row['bytes'] == batch * (ring + state + grows * length)
  attention = c.count('local') + c.count('global')
  whole = batch * (attention * slot * length + state)
  assert row['full_length_bytes'] == whole
  assert row['ratio'] == row['bytes'] / whole
  # Its promise for the pattern of Gemma 3.
  assert row['ratio'] < 0.2 or not name.startswith('gemma3')


def test_dtype_batch_and_lengths(capsys):
  argv = ['gemma2-2b', '--length=10', '--length=5000']
  half = found(capsys, *argv)
  full = found(capsys, *argv, '--dtype=float32', '--batch=2')
  assert half['cache']['dtype'] == 'bfloat16' and half['config']['layers'] == 26
  kv = 'kv_bytes_per_token'
  assert full['cache'][kv] == 2 * half['cache'][kv]
  assert [row['length'] for row in full['cache']['lengths']] == [10, 5000]
  # Below its window a ring is no longer than the text.
  assert full['cache']['lengths'][0]['ratio'] == 1
  with pytest.raises(UserError, match='--batch and --length'):
    inspect.main(['gemma2-2b', '--batch=0'])


def test_a_model_directory(models, capsys):
  out = said(capsys, 'base')
  total = sum(x.size for x in params(0).values())
  assert f'{total:,} parameters' in out
  assert '32 x 4 x 8' in out and 'float32' in out
  assert '"by": "base"' in out and '"width": 32' in out
  assert out.index('layer_2/') < out.index('layer_10/')
  assert 'format alignjax' in out and 'tokenizer none' in out
  digest = model_dir.digest(model_dir.read('base'))
  assert f'role policy, digest {digest[:12]}' in out
  listed = found(capsys, 'base')
  assert listed['layers'] == {'local': 11, 'global': 2}
  assert listed['leaves']['layer_3/attn/q_norm']['shape'] == [8]


def test_a_hugging_face_directory(capsys):
  from alignjax.interop import hf

  leaves = params(0)
  specs = {name: Spec(x.shape, x.dtype) for name, x in leaves.items()}
  with hf.writer('theirs', CONFIG, specs) as put:
    for name, x in leaves.items():
      put(name, x)
  out = said(capsys, 'theirs')
  assert 'format hf' in out and 'layers.12.self_attn.q_proj.weight' in out
  listed = found(capsys, 'theirs')
  assert listed['parameters']['all'] == sum(x.size for x in leaves.values())
  assert len(listed['leaves']['layer_0/ffw/gate']['from']) == 1
  assert listed['cache']['ring_bytes'] > 0


def test_a_training_run(tmp_path, capsys):
  weights = {'embedding': jnp.ones((6, 2)), 'final_norm': jnp.ones(2)}
  state = TrainState(
    step=jnp.int32(4),
    params={'policy': weights},
    frozen={'anchor': weights},
    opt_state={'mu': weights},
    skipped=jnp.int32(0),
  )
  with checkpoint.manager(tmp_path / 'run' / 'checkpoints', 2) as manager:
    for step in (4, 10):
      at = state.replace(step=jnp.int32(step))
      checkpoint.save(manager, at, source={})
    manager.wait_until_finished()
  out = said(capsys, 'run')
  assert 'training run; finished models: none' in out
  for group in ('params/policy', 'frozen/anchor', 'opt_state'):
    assert group in out
  assert 'leaves of step 10: 8' in out and 'params/policy/embedding' in out
  listed = found(capsys, 'run')
  assert [c['step'] for c in listed['checkpoints']] == ['4', '10']
  assert listed['checkpoints'][1]['holds']['params/policy'] == {
    'leaves': 2,
    'parameters': 14,
    'bytes': 56,
  }
  # The folder of checkpoints and one of them, alone.
  assert len(found(capsys, 'run/checkpoints')['checkpoints']) == 2
  assert len(found(capsys, 'run/checkpoints/4')['checkpoints']) == 1
  record = tmp_path / 'run' / 'checkpoints' / '4' / 'meta' / 'metadata'
  meta = json.loads(record.read_text())
  meta['facts']['leaves']['params/policy/lost'] = [[2], '0']
  record.write_text(json.dumps(meta))
  with pytest.raises(UserError, match='4 is damaged.*params/policy/lost'):
    inspect.main(['run'])
  record.write_text('{')
  with pytest.raises(UserError, match='not the record of a checkpoint'):
    inspect.main(['run'])


@pytest.fixture
def read(models, monkeypatch):
  monkeypatch.setattr(model_dir, 'load_leaf', LOAD_LEAF)


def write(name, leaves):
  """A model that is not a draw of `params`."""
  model_dir.write(
    name,
    config=to_json(CONFIG),
    params={'policy': leaves.items()},
    provenance={},
  )


def test_inspect_diff_measures_the_task_vector(read, capsys):
  groups = found(capsys, 'base', '--diff', 'a')['groups']
  layers = [f'layer_{i}' for i in range(CONFIG.layers)]
  assert [*groups] == ['embedding', *layers, 'final_norm', 'all']
  x, y = params(0), params(1)
  for row in ('layer_10', 'embedding', 'all'):
    names = [n for n in x if row == 'all' or n.split('/')[0] == row]
    moved = np.sqrt(sum(np.sum((y[n] - x[n]) ** 2.0) for n in names))
    of = np.sqrt(sum(np.sum(x[n] ** 2.0) for n in names))
    np.testing.assert_allclose(groups[row]['norms'], [moved], rtol=1e-5)
    np.testing.assert_allclose(groups[row]['relative'], [moved / of], 1e-5)
    assert groups[row]['angles_deg'] == []
  out = said(capsys, 'base', '--diff', 'a')
  assert 'layer_10' in out and f'{groups["all"]["norms"][0]:.4g}' in out


def test_inspect_diff_of_several_models(read, capsys):
  facts = found(capsys, 'base', '--diff', 'a', 'base', 'a')
  whole = facts['groups']['all']
  x, y = (
    np.concatenate([np.ravel(v) for v in params(i).values()]) for i in (0, 1)
  )
  far = np.linalg.norm(y - x)
  # The base has not moved: no angle, neither 0 nor NaN.
  assert whole['angles_deg'] == [None, 0, None]
  assert whole['norms'][1] == 0
  np.testing.assert_allclose(
    whole['distances'],
    far * np.abs(np.subtract.outer([0, 1, 0, 1], [0, 1, 0, 1])),
    rtol=1e-5,
    atol=1e-5 * far,
  )
  assert whole['sign_conflicts'] == 0
  out = said(capsys, 'base', '--diff', 'a', 'base', 'a')
  assert 'BC' in out and 'distances between' in out
  assert '-' in out and 'nan' not in out.lower()


def test_closed_forms_of_angles(read, capsys):
  x = params(0)
  odd = {n: np.arange(v.size).reshape(v.shape) % 2 for n, v in x.items()}
  moved = {n: np.float32(2**-6) * np.ones_like(v) for n, v in x.items()}
  write('zero', {n: np.zeros_like(v) for n, v in x.items()})
  write('one', {n: moved[n] * odd[n] for n in x})
  write('rest', {n: moved[n] * (1 - odd[n]) for n in x})
  write('minus', {n: -moved[n] * odd[n] for n in x})
  argv = ['zero', '--diff', 'one', 'one', 'rest', 'minus']
  for name, of in found(capsys, *argv)['groups'].items():
    # Pairs 01, 02, 12, 03, 13, 23.
    assert of['angles_deg'] == [0, 90, 90, 180, 180, 90], name
    assert of['relative'] == [None] * 4  # a base of zeros
    assert of['sign_conflicts'] == 1  # of what two or more have moved
    assert of['slerp'] is None or np.isfinite(of['slerp'])
  groups = found(capsys, 'zero', '--diff', 'one', 'rest')['groups']
  for of in groups.values():
    # Orthogonal: LERP has the length of half the sum; SLERP keeps theirs.
    a, b = of['norms']
    np.testing.assert_allclose(of['lerp'], np.hypot(a, b) / 2)
    np.testing.assert_allclose(of['slerp'], np.hypot(a, b) / 2**0.5)
    assert of['sign_conflicts'] is None  # no item is moved by both
  groups = found(capsys, 'zero', '--diff', 'one', 'minus')['groups']
  assert groups['layer_3']['slerp'] is None and groups['all']['slerp'] is None
  assert groups['all']['lerp'] == 0


def test_lerp_and_slerp_are_the_norms_of_the_merges(read, capsys):
  from alignjax.cli import merge

  for method in ('linear', 'slerp'):
    argv = '--base base --models a b --out'.split()
    assert merge.main([method, *argv, method]) == 0
  capsys.readouterr()
  groups = found(capsys, 'base', '--diff', 'a', 'b')['groups']
  merged = found(capsys, 'base', '--diff', 'linear', 'slerp')['groups']
  for name, of in groups.items():
    norms = [of['lerp'], of['slerp']]
    np.testing.assert_allclose(norms, merged[name]['norms'], rtol=1e-5)
  # What the merge has recorded of its inputs is what is measured here.
  record = found(capsys, 'slerp')['provenance']['merge']
  for name, norms in record['norms'].items():
    np.testing.assert_allclose(norms, groups[name]['norms'], rtol=1e-6)
    assert record['angles_deg'][name] == groups[name]['angles_deg']
  assert set(record['norms']) == set(groups) - {'all'}
  assert 'norms' in said(capsys, 'slerp')


def test_the_geometry_is_kept(read, capsys):
  out = said(capsys, 'base', '--diff', 'a', 'b', '--out', 'kept/g.json')
  assert 'wrote kept/g.json' in out
  with open('kept/g.json') as file:
    kept = json.load(file)
  assert kept == found(capsys, 'base', '--diff', 'a', 'b')
  assert kept['format'] == 1 and kept['base']['name'] == 'base'
  assert [m['name'] for m in kept['models']] == ['a', 'b']


def test_it_is_a_verb_of_a_job_graph(read, capsys):
  with open('job.json', 'w') as file:
    json.dump({'base': 'base', 'models': ['a', 'b']}, file)
  assert 'wrote w/geometry.json' in said(
    capsys, '--config=job.json', '--workdir=w'
  )
  with open('w/geometry.json') as file:
    kept = json.load(file)
  assert kept == found(capsys, 'base', '--diff', 'a', 'b')


def test_names_tell_models_of_a_graph_apart():
  paths = ['/w/pretrain/model', '/w/a/model', '/w/a/model_anchor', '/w/hf']
  assert facts._names(paths) == ['pretrain', 'a', 'a/model_anchor', 'hf']
  clash = ['/w/sft/model', '/v/sft/model']
  assert facts._names(clash) == clash
  assert facts._names(['/w/a', '/w/a']) == ['a', 'a']


@pytest.mark.parametrize(
  'job, flags, words',
  [
    ({'base': 'base', 'model': ['a']}, [], "did you mean 'models'"),
    ({'base': 'base'}, [], 'models must be a list of paths, found None'),
    ({'base': 'base', 'models': [3]}, [], 'must be strings, found 3'),
    ({'models': ['a']}, [], 'must be strings, found None'),
    ({'base': 'base', 'models': ['a']}, ['b'], 'WHAT and --diff are'),
    (None, [], 'WHAT is missing'),
    (None, ['base', '--out=x.json'], '--diff says; it is missing'),
    (None, ['base', '--workdir=w'], '--diff says; it is missing'),
  ],
)
def test_bad_words_of_the_geometry(models, job, flags, words):
  if job is not None:
    with open('job.json', 'w') as file:
      json.dump(job, file)
    flags = ['--config=job.json', *flags]
  with pytest.raises(UserError, match=words):
    inspect.main(flags)


def test_weights_that_are_not_finite_are_told(read):
  write('bad', {n: v * np.float32(np.nan) for n, v in params(1).items()})
  with pytest.raises(UserError, match='non-finite weights in the group'):
    inspect.main(['base', '--diff', 'bad', '--out=x.json'])


@pytest.mark.parametrize(
  'name, words',
  [
    ('gema3-12b', "did you mean 'gemma3-12b'"),
    ('absent', 'no model at absent'),
    ('./gemma3-27b', 'no such file'),
  ],
)
def test_what_is_no_model(name, words):
  with pytest.raises(UserError, match=words):
    inspect.main([name])


def test_help_is_quick_and_imports_no_jax():
  done = subprocess.run(
    [sys.executable, '-X', 'importtime', '-m', 'alignjax.cli.inspect', '-h'],
    capture_output=True,
    text=True,
    timeout=60,
  )
  assert done.returncode == 0 and 'gemma3-27b' in done.stdout
  imported = {line.split('|')[-1].strip() for line in done.stderr.splitlines()}
  assert not imported & {'jax', 'numpy', 'orbax'}
