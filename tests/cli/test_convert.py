import json
import os
import re
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest

from alignjax.cli import console, convert
from alignjax.core import naming, tree
from alignjax.data import tokenizer
from alignjax.interop import convert as engine
from alignjax.interop.open import open as open_
from tests.interop import hf_tiny, trees

ROOT = Path(__file__).parents[2]


def run(*argv):
  return console.call('convert', convert.main, list(map(str, argv)))


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)


def normal(path, model_type, dtype='float32'):
  """A Hugging Face directory whose weights are numbers to compute with."""
  names = hf_tiny.shapes(model_type)
  draw = np.random.default_rng(0).normal
  kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
  tensors = {k: (draw(size=x) * 0.2).astype(kind) for k, x in names.items()}
  config = hf_tiny.CONFIGS[model_type] | {'torch_dtype': dtype}
  return hf_tiny.write(Path(path), config, tensors), tensors


def same(path, tensors):
  found = hf_tiny.stored(Path(path))
  assert found.keys() == tensors.keys()
  for name, expected in tensors.items():
    assert found[name].dtype == expected.dtype, name
    assert found[name].shape == expected.shape, name
    assert found[name].tobytes() == expected.tobytes(), name


def verdict(path):
  return json.loads(Path(path, 'certificate.json').read_text())['verdict']


@pytest.mark.parametrize('between', ['alignjax', 'deepmind'])
@pytest.mark.parametrize(
  'model_type', ['gemma', 'gemma2', 'gemma3_text', 'recurrent_gemma']
)
def test_hugging_face_there_and_back(model_type, between):
  path, tensors = hf_tiny.model(Path('a'), model_type, 'bfloat16')
  (path / 'tokenizer_config.json').write_text('{"x": 1}')
  assert run('a', 'b', '--to', between) == 0
  assert run('b', 'c', '--to', 'hf') == 0
  same('c', tensors)
  for name in ('config.json', 'tokenizer_config.json'):
    before, after = (json.loads(Path(p, name).read_text()) for p in 'ac')
    assert before == after
  assert open_('b').config == open_('a').config


def test_a_vision_tower_travels(capsys):
  names = hf_tiny.shapes('gemma3', prefix='language_model.model.')
  tensors = hf_tiny.values(names | hf_tiny.VISION)
  hf_tiny.write(Path('a'), hf_tiny.CONFIGS['gemma3'], tensors, shards=2)
  assert run('a', 'b', '--to', 'alignjax') == 0
  assert run('b', 'c', '--to', 'hf') == 0
  same('c', tensors)
  assert '4 other tensors' in capsys.readouterr().out
  assert run('b', 'd', '--to', 'deepmind') == 0
  assert '4 tensors beyond the decoder' in capsys.readouterr().out
  assert not open_('d').extra


@pytest.mark.parametrize('between', ['alignjax', 'hf'])
@pytest.mark.parametrize('family', trees.CONFIGS)
def test_deepmind_there_and_back(tmp_path, family, between):
  config = trees.CONFIGS[family]
  leaves = trees.leaves(config, dtype=ml_dtypes.bfloat16)
  transposed = family in ('gemma2', 'gemma3')
  names = trees.nested(config, leaves, transposed)
  trees.save(tmp_path / 'a', naming.nested(names))
  assert run('a', 'b', '--to', between, '--verify') == 0
  assert run('b', 'c', '--to', 'deepmind', '--verify') == 0
  assert verdict('b').startswith('identical')
  assert verdict('c').startswith('identical')
  back = tree.named(ocp.PyTreeCheckpointer().restore(tmp_path / 'c'))
  assert back.keys() == names.keys()
  for name, expected in names.items():
    assert np.asarray(back[name]).tobytes() == expected.tobytes(), name


def test_a_flat_release_with_a_vision_tower(tmp_path):
  config = trees.CONFIGS['gemma3']
  leaves = trees.leaves(config)
  image = {
    'embedder/mm_input_projection/w': np.ones((2, 3), np.float32),
    'SigLiPFromPatches_0/siglip_encoder/pos': np.ones((3, 1), np.float32),
  }
  names = trees.nested(config, leaves, transposed=True)
  trees.save(tmp_path / 'a', trees.flat(names | image))
  assert run('a', 'b', '--to', 'alignjax', '--verify') == 0
  assert run('b', 'c', '--to', 'deepmind', '--verify') == 0
  assert verdict('c') == 'identical: every leaf and every logit of the probe'
  back = tree.named(ocp.PyTreeCheckpointer().restore(tmp_path / 'c'))
  assert set(back) - set(names) == {
    'embedder/mm_input_projection/w',
    'vision_encoder/siglip_encoder/pos',
  }


def test_rows_of_padding(monkeypatch, capsys):
  monkeypatch.setattr(engine, '_DEEPMIND_ROWS', (24, 20))
  _, tensors = normal('a', 'gemma2')
  assert run('a', 'b', '--to', 'deepmind', '--verify') == 0
  assert 'rows 20 to 23 of the embedding are padding' in capsys.readouterr().out
  table = open_('b').load('embedding')
  assert table.shape == (24, 16) and not table[20:].any()
  assert '20 common rows' in verdict('b')
  assert run('b', 'c', '--to', 'hf', '--verify') == 0
  assert 'rows 20 to 23' in capsys.readouterr().out
  same('c', tensors)
  # A file that had the rows keeps them.
  names = hf_tiny.shapes('gemma2', rows=24)
  tensors = hf_tiny.values(names)
  config = hf_tiny.CONFIGS['gemma2'] | {'vocab_size': 24}
  hf_tiny.write(Path('d'), config, tensors)
  assert run('d', 'e', '--to', 'alignjax') == run('e', 'f', '--to', 'hf') == 0
  same('f', tensors)


def test_the_plan_comes_first_and_alone_if_asked(capsys):
  normal('a', 'gemma2', 'bfloat16')
  assert run('a', 'b', '--to', 'hf', '--dry-run', '--verify') == 0
  said = capsys.readouterr().out
  for part in (
    'hf -> hf: 3 layers of width 16 (local/global), 20 rows',
    'parameters in 35 leaves (bfloat16)',
    'peak memory of the arrays about',
    f'would write {os.getcwd()}/b',
  ):
    assert part in said
  assert not Path('b').exists()


def test_another_dtype():
  _, tensors = normal('a', 'gemma2')
  assert run('a', 'b', '--to', 'hf', '--dtype', 'bfloat16', '--verify') == 0
  assert verdict('b').startswith('equal within 0.0')
  rounded = {k: x.astype(ml_dtypes.bfloat16) for k, x in tensors.items()}
  same('b', rounded)
  assert json.loads(Path('b/config.json').read_text())['torch_dtype'] == (
    'bfloat16'
  )


def test_the_window_rule_travels(capsys):
  normal('a', 'recurrent_gemma')
  assert run('a', 'b', '--to', 'alignjax') == 0
  assert open_('b').config.span == 5
  assert run('b', 'h', '--to', 'hf') == 0
  assert 'counts W keys' in capsys.readouterr().out
  flags = ('--window-self', 'true', '--to', 'alignjax', '--verify')
  assert run('a', 'c', *flags) == 0
  assert open_('c').config.span == 4


def test_an_existing_directory_is_verified(capsys):
  normal('a', 'gemma2')
  assert run('a', 'b', '--to', 'alignjax') == 0
  assert run('a', 'b', '--verify') == 0
  assert 'identical' in capsys.readouterr().out
  path, tensors = normal('c', 'gemma2')
  name = 'model.layers.1.mlp.up_proj.weight'
  tensors[name] = tensors[name] + np.float32(1e-3)
  hf_tiny.peer.save_file(tensors, path / 'model.safetensors')
  assert run('b', 'c', '--verify') == 1
  said = capsys.readouterr().out
  assert 'DIFFERENT: 1 of' in said and 'layer_1/ffw/up' in said
  assert verdict('c').startswith('DIFFERENT')


def test_a_tokenizer_with_too_many_ids(tmp_path, capsys):
  texts = ['hello there, general; nothing more to say\n' * 3]
  tokenizer.train(texts, tmp_path / 't', vocab_size=400)
  normal('a', 'gemma2')
  Path('a/tokenizer.model').write_bytes(Path('t').read_bytes())
  assert run('a', 'b', '--to', 'alignjax') == 2
  assert 'ids and the embedding' in capsys.readouterr().err
  assert not Path('b').exists()


@pytest.mark.parametrize(
  'argv, message',
  [
    (['a', 'b'], '--to is missing'),
    (['a', 'b', '--to', 'onnx'], "--to is 'onnx', expected one of"),
    (['a', 'b', '--to', 'hf', '--dtype', 'int8'], "--dtype is 'int8'"),
    (['a', './a', '--to', 'hf'], 'SRC and DST are the same'),
    (['nowhere', 'b', '--to', 'hf'], 'no model at'),
    (['a', 'taken', '--to', 'hf'], 'exists'),
    (['a', 'taken', '--to', 'deepmind', '--overwrite'], 'not overwritten'),
    (['a', 'taken', '--to', 'alignjax', '--overwrite'], 'not overwritten'),
    (['a', 'taken', '--verify'], 'no model at'),
  ],
)
def test_bad_input_is_one_sentence(argv, message, capsys):
  normal('a', 'gemma2')
  Path('taken').mkdir()
  Path('taken/precious').write_text('x')
  assert run(*argv) == 2
  said = capsys.readouterr().err
  assert message in said and len(said.splitlines()) == 1
  assert sorted(p.name for p in Path().iterdir()) == ['a', 'taken']
  assert [p.name for p in Path('taken').iterdir()] == ['precious']


@pytest.mark.parametrize('to', engine.FORMATS)
def test_overwrite(to):
  normal('a', 'gemma2')
  for _ in range(2):
    assert run('a', 'b', '--to', to, '--overwrite', '--verify') == 0
  assert verdict('b').startswith('identical')


@pytest.mark.parametrize('to', engine.FORMATS)
def test_a_full_disk(to, monkeypatch, capsys):
  normal('a', 'gemma2')
  put = engine.cast

  def full(leaf, spec):
    if leaf.shape == (16, 10):
      raise OSError(28, 'No space left on device')
    return put(leaf, spec)

  monkeypatch.setattr(engine, 'cast', full)
  assert run('a', 'b', '--to', to) == 2
  assert 'disk full while writing' in capsys.readouterr().err
  assert sorted(p.name for p in Path().iterdir()) == ['a']


KILLED = """
import os, sys
from alignjax.cli import convert
from alignjax.interop import convert as engine
cast, left = engine.cast, [9]
def dying(leaf, spec):
  left[0] -= 1
  if not left[0]:
    os.kill(os.getpid(), 9)
  return cast(leaf, spec)
engine.cast = dying
convert.main(['a', 'b', '--to', sys.argv[1]])
"""


@pytest.mark.parametrize('to', engine.FORMATS)
def test_a_kill_leaves_nothing_that_looks_whole(to):
  _, tensors = normal('a', 'gemma2')
  environment = os.environ | {'PYTHONPATH': str(ROOT)}
  found = subprocess.run([sys.executable, '-c', KILLED, to], env=environment)
  assert found.returncode == -9
  assert not Path('b').exists()
  assert run('a', 'b', '--to', to, '--verify') == 0
  assert sorted(p.name for p in Path().iterdir()) == ['a', 'b']


MEMORY = """
import sys, threading, time
from alignjax.cli import convert
def anonymous():
  with open('/proc/self/status') as file:
    line = next(x for x in file if x.startswith('RssAnon'))
  return int(line.split()[1]) / 1024
import alignjax.interop.open, orbax.checkpoint, jax
jax.numpy.ones(3).block_until_ready()
before, peak = anonymous(), 0
def watch():
  global peak
  while True:
    peak = max(peak, anonymous())
    time.sleep(0.005)
threading.Thread(target=watch, daemon=True).start()
assert convert.main(sys.argv[1:]) == 0
print('MIB', peak - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize('to', engine.FORMATS)
def test_memory_is_bounded_by_the_largest_tensor(tmp_path, to):
  """A model of 750 MB whose largest tensor is 32 MB, copied and verified."""
  rng = np.random.default_rng(0)
  config = hf_tiny.CONFIGS['gemma2'] | dict(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=12,
    vocab_size=8192,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=256,
  )
  names = {'model.embed_tokens.weight': (8192, 1024)}
  for i in range(12):
    for name, shape in hf_tiny.shapes('gemma2').items():
      if name.startswith('model.layers.0.'):
        sizes = {16: 1024, 10: 4096, 12: 1024, 6: 512}
        name = name.replace('layers.0.', f'layers.{i}.')
        names[name] = tuple(sizes[n] for n in shape)
  names['model.norm.weight'] = (1024,)
  tensors = {
    k: rng.standard_normal(x, np.float32) * np.float32(0.02)
    for k, x in names.items()
  }
  hf_tiny.write(tmp_path / 'a', config, tensors)
  total = sum(x.nbytes for x in tensors.values()) / 2**20
  assert total > 700
  del tensors
  found = subprocess.run(
    [sys.executable, '-c', MEMORY, 'a', 'b', '--to', to, '--verify'],
    env=os.environ | {'PYTHONPATH': str(ROOT)},
    capture_output=True,
    text=True,
  )
  assert found.returncode == 0, found.stderr
  used = float(found.stdout.split('MIB')[-1])
  promised = float(re.findall(r'arrays about ([\d,]+) MiB', found.stdout)[0])
  # Compiled programs are no arrays.
  assert used < promised + 100 < total, (used, promised, total)
