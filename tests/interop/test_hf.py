import json
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest

from alignjax.core.errors import UserError
from alignjax.core.spec import Spec
from alignjax.interop import hf
from tests.interop import hf_tiny
from tests.interop.hf_tiny import VISION, D, F, H, K, N, V

FAMILIES = sorted(hf_tiny.CONFIGS)


def bits(x) -> bytes:
  return np.asarray(x).tobytes()


def rewrite(opened, path, source=True, **more):
  """Out again, leaf by leaf, in the order of the leaves."""
  leaves = {**opened.leaves, **opened.extra}
  kept = opened.provenance['source'] if source else None
  with hf.writer(
    path, opened.config, leaves, source=kept, files=opened.files, **more
  ) as put:
    for name in opened.leaves:
      put(name, opened.load(name))
    for name in opened.extra:
      put(name, opened.load_extra(name))
  return path


def same_tensors(a: dict, b: dict) -> bool:
  return set(a) == set(b) and all(
    a[k].dtype == b[k].dtype
    and a[k].shape == b[k].shape
    and bits(a[k]) == bits(b[k])
    for k in a
  )


def test_leaves_of_the_first_gemma(tmp_path):
  path, w = hf_tiny.model(tmp_path / 'm', 'gemma')
  opened = hf.read(path)
  assert opened.format == 'hf' and opened.path == path
  assert list(opened.leaves) == sorted(opened.leaves)
  assert opened.config.vocab_size == V and opened.config.dtype == 'float32'

  at = 'model.layers.1.'
  q, o = w[at + 'self_attn.q_proj.weight'], w[at + 'self_attn.o_proj.weight']
  found = opened.load('layer_1/attn/q')
  assert found.shape == (D, N, H) and found.flags.c_contiguous
  for n in range(N):
    assert bits(found[:, n]) == bits(q[n * H : (n + 1) * H].T)
  found = opened.load('layer_1/attn/o')
  assert found.shape == (N, H, D)
  for n in range(N):
    assert bits(found[n]) == bits(o[:, n * H : (n + 1) * H].T)
  assert opened.leaves['layer_1/attn/k'].shape == (D, K, H)
  assert bits(opened.load('layer_1/ffw/up')) == bits(
    w[at + 'mlp.up_proj.weight'].T
  )
  assert opened.load('layer_1/ffw/down').shape == (F, D)
  assert bits(opened.load('embedding')) == bits(w['model.embed_tokens.weight'])
  # The trap: here this is the norm before the feed-forward.
  assert bits(opened.load('layer_1/pre_ffw_norm')) == bits(
    w[at + 'post_attention_layernorm.weight']
  )
  assert 'layer_1/post_attn_norm' not in opened.leaves
  assert opened.origin['layer_1/attn/q'] == (at + 'self_attn.q_proj.weight',)


@pytest.mark.parametrize('family', ['gemma2', 'gemma3_text'])
def test_norms_of_the_later_gemmas(tmp_path, family):
  path, w = hf_tiny.model(tmp_path / 'm', family)
  opened = hf.read(path)
  for leaf, name in {
    'pre_attn_norm': 'input_layernorm',
    'post_attn_norm': 'post_attention_layernorm',
    'pre_ffw_norm': 'pre_feedforward_layernorm',
    'post_ffw_norm': 'post_feedforward_layernorm',
    **(
      {'attn/q_norm': 'self_attn.q_norm', 'attn/k_norm': 'self_attn.k_norm'}
      if family == 'gemma3_text'
      else {}
    ),
  }.items():
    found = opened.load(f'layer_2/{leaf}')
    assert bits(found) == bits(w[f'model.layers.2.{name}.weight']), leaf
  assert ('layer_0/attn/q_norm' in opened.leaves) == (family == 'gemma3_text')


def test_leaves_of_recurrentgemma(tmp_path):
  path, w = hf_tiny.model(tmp_path / 'm', 'recurrent_gemma', 'bfloat16')
  opened = hf.read(path)
  assert opened.config.pattern == ('recurrent', 'recurrent', 'local')
  assert opened.config.hidden == F and not opened.config.window_self
  assert hf.read(path, window_self=True).config.window_self
  block = 'model.layers.1.temporal_block.'
  conv = opened.load('layer_1/recurrent/conv')
  for tap in range(4):
    assert bits(conv[tap]) == bits(w[block + 'conv_1d.weight'][:, 0, tap])
  for leaf, name, turn in (
    ('recurrent/x', 'linear_x.weight', True),
    ('recurrent/y', 'linear_y.weight', True),
    ('recurrent/out', 'linear_out.weight', True),
    ('recurrent/y_bias', 'linear_y.bias', False),
    ('recurrent/out_bias', 'linear_out.bias', False),
    ('recurrent/conv_bias', 'conv_1d.bias', False),
    ('recurrent/a_param', 'rg_lru.recurrent_param', False),
    ('recurrent/a_gate', 'rg_lru.recurrent_gate_weight', False),
    ('recurrent/a_gate_bias', 'rg_lru.recurrent_gate_bias', False),
    ('recurrent/input_gate', 'rg_lru.input_gate_weight', False),
    ('recurrent/input_gate_bias', 'rg_lru.input_gate_bias', False),
  ):
    x = w[block + name]
    assert bits(opened.load(f'layer_1/{leaf}')) == bits(x.T if turn else x)
  at = 'model.layers.2.'
  for leaf, name in {
    'attn/o_bias': 'temporal_block.o_proj.bias',
    'pre_attn_norm': 'temporal_pre_norm.weight',
    'pre_ffw_norm': 'channel_pre_norm.weight',
    'ffw/down_bias': 'mlp_block.down_proj.bias',
  }.items():
    assert bits(opened.load(f'layer_2/{leaf}')) == bits(w[at + name])
  gate = w[at + 'mlp_block.gate_proj.weight']
  assert bits(opened.load('layer_2/ffw/gate')) == bits(gate.T)


@pytest.mark.parametrize('shards', [1, 3])
@pytest.mark.parametrize('dtype', ['bfloat16', 'float32', 'float16'])
@pytest.mark.parametrize('family', FAMILIES)
def test_round_trip_keeps_every_byte(tmp_path, family, dtype, shards):
  config = hf_tiny.CONFIGS[family] | {'torch_dtype': dtype}
  tensors = hf_tiny.values(hf_tiny.shapes(family), dtype)
  path = hf_tiny.write(tmp_path / 'a', config, tensors, shards)
  opened = hf.read(path)
  assert opened.config.dtype == (
    'float32' if dtype == 'float32' else 'bfloat16'
  )
  size = 2000 if shards > 1 else 10**9
  out = rewrite(opened, tmp_path / 'b', shard_bytes=size)
  assert (out / 'model.safetensors.index.json').exists() == (shards > 1)
  assert same_tensors(hf_tiny.stored(out), tensors)
  for name in ('config.json', *(['model.safetensors'] * (shards == 1))):
    assert (out / name).read_bytes() == (path / name).read_bytes()
  again = hf.read(out)
  assert again.leaves == opened.leaves and again.config == opened.config


IN_MEMORY = {
  name if name.startswith('model.') else f'model.{name}': shape
  for name, shape in VISION.items()
}
NO_VISION_MODEL = {
  name.replace('vision_tower.vision_model.', 'vision_tower.'): shape
  for name, shape in VISION.items()
}


@pytest.mark.parametrize(
  'prefix, vision, head',
  [
    ('language_model.model.', VISION, 'language_model.lm_head.weight'),
    ('language_model.model.', NO_VISION_MODEL, None),
    ('model.language_model.', IN_MEMORY, 'lm_head.weight'),
    ('model.language_model.', {}, None),
    ('model.', {}, 'lm_head.weight'),
  ],
)
def test_prefixes_vision_rows_and_head_survive(tmp_path, prefix, vision, head):
  rows = 262208
  tensors = hf_tiny.values(
    {**vision, **hf_tiny.shapes('gemma3', rows, prefix)}, 'bfloat16'
  )
  for name in vision:
    tensors[name] = hf_tiny.values({name: vision[name]}, 'float32')[name]
  if head:
    tensors[head] = tensors[f'{prefix}embed_tokens.weight'].copy()
  text = hf_tiny.CONFIGS['gemma3_text'] | {'vocab_size': rows}
  text = {'num_hidden_layers': 3} | text
  config = hf_tiny.CONFIGS['gemma3'] | {'text_config': text}
  path = hf_tiny.write(tmp_path / 'a', config, tensors)
  opened = hf.read(path)
  assert opened.config.vocab_size == rows
  assert set(opened.extra) == set(vision)
  assert all(x.dtype == np.float32 for x in opened.extra.values())
  # As it comes back from a model.json.
  kept = json.loads(json.dumps(opened.provenance))
  out = rewrite(opened._replace(provenance=kept), tmp_path / 'b')
  assert same_tensors(hf_tiny.stored(out), tensors)
  assert json.loads((out / 'config.json').read_text()) == config


@pytest.mark.parametrize(
  'said, rows', [(256000, 256128), (256128, 256000), (262208, 262144)]
)
def test_padded_tables_count_as_stored(tmp_path, said, rows):
  tensors = hf_tiny.values(hf_tiny.shapes('gemma', rows), 'bfloat16')
  config = hf_tiny.CONFIGS['gemma'] | {'vocab_size': said}
  opened = hf.read(hf_tiny.write(tmp_path / 'a', config, tensors))
  assert opened.config.vocab_size == rows
  out = rewrite(opened, tmp_path / 'b')
  assert same_tensors(hf_tiny.stored(out), tensors)


@pytest.mark.parametrize('family', FAMILIES)
def test_from_numbers_alone(tmp_path, family):
  path, tensors = hf_tiny.model(tmp_path / 'a', family)
  opened = hf.read(path)
  out = rewrite(opened, tmp_path / 'b', source=False)
  assert same_tensors(hf_tiny.stored(out), tensors)
  again = hf.read(out)
  assert again.config == opened.config
  facts = json.loads((out / 'config.json').read_text())
  assert facts['model_type'] == {'gemma3': 'gemma3_text'}.get(family, family)


def test_an_image_model_without_its_images_is_a_text_model(tmp_path):
  tensors = hf_tiny.values(
    {**VISION, **hf_tiny.shapes('gemma3', V, 'language_model.model.')}
  )
  path = hf_tiny.write(tmp_path / 'a', hf_tiny.CONFIGS['gemma3'], tensors)
  opened = hf.read(path)._replace(extra={})
  out = rewrite(opened, tmp_path / 'b')
  assert json.loads((out / 'config.json').read_text())['model_type'] == (
    'gemma3_text'
  )
  assert 'model.embed_tokens.weight' in hf_tiny.stored(out)


def test_another_dtype_and_other_rows_are_said_in_the_config(tmp_path):
  path, _ = hf_tiny.model(tmp_path / 'a', 'gemma2', 'bfloat16')
  opened = hf.read(path)
  config = opened.config.__class__(
    **{**opened.config.__dict__, 'vocab_size': V + 4}
  )
  leaves = {
    name: Spec(spec.shape, np.float32) for name, spec in opened.leaves.items()
  }
  leaves['embedding'] = Spec((V + 4, D), np.float32)
  source = opened.provenance['source']
  with hf.writer(tmp_path / 'b', config, leaves, source=source) as put:
    for name, spec in leaves.items():
      put(name, np.ones(spec.shape, np.float32))
  facts = json.loads((tmp_path / 'b' / 'config.json').read_text())
  expected = hf_tiny.CONFIGS['gemma2'] | {
    'torch_dtype': 'float32',
    'vocab_size': V + 4,
  }
  assert facts == expected
  assert hf.read(tmp_path / 'b').config.vocab_size == V + 4


def test_files_travel(tmp_path):
  path, _ = hf_tiny.model(tmp_path / 'a', 'gemma')
  travels = ['tokenizer.model', 'chat_template.jinja', 'generation_config.json']
  for name in (*travels, 'README.md', 'training_args.bin'):
    (path / name).write_text(name)
  opened = hf.read(path)
  assert opened.tokenizer == path / 'tokenizer.model'
  assert {file.name for file in opened.files} == set(travels)
  out = rewrite(opened, tmp_path / 'b')
  assert (out / 'chat_template.jinja').read_text() == 'chat_template.jinja'
  assert not (out / 'README.md').exists()
  bare = hf.read(hf_tiny.model(tmp_path / 'c', 'gemma')[0])
  assert bare.tokenizer is None and bare.files == ()


# What is wrong with a directory.


def refused(path, *parts):
  with pytest.raises(UserError) as caught:
    hf.read(path)
  for part in parts:
    assert part in str(caught.value), str(caught.value)
  assert '\n' not in str(caught.value)


def test_no_model(tmp_path):
  refused(tmp_path / 'none', 'no directory', 'none')
  refused(tmp_path, 'no config.json')
  (tmp_path / 'config.json').write_text('{')
  refused(tmp_path, 'config.json is not JSON')
  (tmp_path / 'config.json').write_text('[]')
  refused(tmp_path, 'not a JSON object')
  (tmp_path / 'config.json').write_text('{"model_type": "bert"}')
  refused(tmp_path, 'bert', 'gemma2')
  (tmp_path / 'config.json').write_text('{"model_type": "gemma"}')
  refused(tmp_path, 'no *.safetensors')


class Bomb:
  def __reduce__(self):
    return exec, ("open('/dev/null'); raise SystemExit('opened')",)


@pytest.mark.parametrize('name', ['pytorch_model.bin', 'model.pt', 'a.ckpt'])
def test_a_pickle_is_never_opened(tmp_path, name):
  path, _ = hf_tiny.model(tmp_path / 'a', 'gemma')
  (path / name).write_bytes(pickle.dumps(Bomb()))
  hf.read(path)  # beside sound weights it does not matter
  (path / 'model.safetensors').unlink()
  refused(path, name, 'pickle', 'never opened', 'safetensors')
  # Nor under a name that it should not have.
  shutil.copy(path / name, path / 'model.safetensors')
  refused(path, 'not a safetensors file')


def test_truncated_file(tmp_path):
  path, _ = hf_tiny.model(tmp_path / 'a', 'gemma')
  file = path / 'model.safetensors'
  size = file.stat().st_size
  file.write_bytes(file.read_bytes()[:-8])
  refused(path, str(file), 'truncated', str(size), str(size - 8), "'model.")


def test_missing_extra_and_misshaped_are_listed_at_once(tmp_path):
  tensors = hf_tiny.values(hf_tiny.shapes('gemma2'))
  del tensors['model.layers.1.mlp.up_proj.weight']
  del tensors['model.norm.weight']
  tensors['model.layers.0.self_attn.q_proj.bias'] = np.zeros(3)
  tensors['score.weight'] = np.zeros(3)
  name = 'model.layers.2.self_attn.k_proj.weight'
  tensors[name] = np.zeros((7, D), np.float32)
  tensors['model.layers.2.input_layernorm.weight'] = np.zeros(D, np.int8)
  path = hf_tiny.write(tmp_path / 'a', hf_tiny.CONFIGS['gemma2'], tensors)
  refused(
    path,
    '2 missing: model.layers.1.mlp.up_proj.weight, model.norm.weight',
    '2 not expected: model.layers.0.self_attn.q_proj.bias, score.weight',
    f'{name} is (7, {D}), expected ({H}, {D})',
    'model.layers.2.input_layernorm.weight is int8, expected a float',
  )


def test_long_lists_are_cut_and_counted(tmp_path):
  path, _ = hf_tiny.model(tmp_path / 'a', 'gemma', num_hidden_layers=6)
  refused(path, '36 missing', 'and 16 more')


@pytest.mark.parametrize(
  'change, tensor',
  [
    ({'vocab_size': V + 1}, 'embed_tokens.weight is (20, 16), expected (21'),
    ({'head_dim': 8}, 'q_proj.weight is (12, 16), expected (16, 16)'),
    ({'intermediate_size': 11}, 'down_proj.weight is (16, 10), expected (16,'),
    ({'num_key_value_heads': 2}, 'v_proj.weight is (6, 16), expected (12, 16)'),
  ],
)
def test_config_contradicts_tensors(tmp_path, change, tensor):
  path, _ = hf_tiny.model(tmp_path / 'a', 'gemma', **change)
  refused(path, 'config.json', tensor)


def test_vision_tensors_belong_to_gemma3_only(tmp_path):
  tensors = hf_tiny.values({**hf_tiny.shapes('gemma3_text'), **VISION})
  config = hf_tiny.CONFIGS['gemma3_text']
  path = hf_tiny.write(tmp_path / 'a', config, tensors)
  refused(path, '4 not expected', 'vision_tower.')


@pytest.mark.parametrize('tied', [True, False, None])
def test_a_head_of_its_own_is_refused(tmp_path, tied):
  tensors = hf_tiny.values(hf_tiny.shapes('gemma'))
  head = tensors['model.embed_tokens.weight'].copy()
  config = hf_tiny.CONFIGS['gemma'] | {'tie_word_embeddings': tied}
  good = hf_tiny.write(
    tmp_path / 'a', config, {**tensors, 'lm_head.weight': head}
  )
  assert 'lm_head.weight' not in hf.read(good).extra
  head = head.copy()
  head.view(np.uint8)[-1, -1] ^= 1
  bad = hf_tiny.write(
    tmp_path / 'b', config, {**tensors, 'lm_head.weight': head}
  )
  refused(bad, 'lm_head.weight', 'model.embed_tokens.weight', 'not supported')


def sharded(tmp_path):
  tensors = hf_tiny.values(hf_tiny.shapes('gemma'))
  path = hf_tiny.write(tmp_path / 'a', hf_tiny.CONFIGS['gemma'], tensors, 2)
  index = path / 'model.safetensors.index.json'
  return path, index, json.loads(index.read_text())


def test_index_names_an_absent_file(tmp_path):
  path, index, _ = sharded(tmp_path)
  absent = path / 'model-00002-of-00002.safetensors'
  absent.unlink()
  refused(path, str(index), absent.name, 'not there')
  absent.symlink_to(tmp_path / 'nowhere')
  refused(path, str(index), absent.name, 'not there')


def test_index_contradicts_headers(tmp_path):
  path, index, facts = sharded(tmp_path)
  of = facts['weight_map']
  first, second = sorted(set(of.values()))
  of['model.norm.weight'] = (
    first if of['model.norm.weight'] == second else (second)
  )
  of['ghost'] = first
  del of['model.embed_tokens.weight']
  index.write_text(json.dumps(facts))
  refused(
    path,
    'contradicts',
    'ghost (in no file, expected in model-00001',
    'model.norm.weight (in model-0000',
    'model.embed_tokens.weight (in model-00001-of-00002.safetensors, expected'
    ' in none)',
  )


@pytest.mark.parametrize(
  'weight_map', [None, [], {'a': 3}, {'a': '../x.safetensors'}, {'a': 'x.bin'}]
)
def test_malformed_index(tmp_path, weight_map):
  path, index, _ = sharded(tmp_path)
  index.write_text(json.dumps({'weight_map': weight_map}))
  refused(path, str(index), 'weight_map')


def test_several_files_without_an_index(tmp_path):
  path, index, _ = sharded(tmp_path)
  expected = hf.read(path)
  index.unlink()
  assert hf.read(path).leaves == expected.leaves
  shutil.copy(
    path / 'model-00001-of-00002.safetensors', path / 'other.safetensors'
  )
  refused(path, 'other.safetensors', 'another file')


# What is written is written whole.


def test_an_old_directory_survives_an_error(tmp_path):
  opened = hf.read(hf_tiny.model(tmp_path / 'a', 'gemma')[0])
  out = rewrite(opened, tmp_path / 'b')
  before = {file.name: file.read_bytes() for file in out.iterdir()}
  with pytest.raises(UserError, match='--overwrite'):
    rewrite(opened, out)
  broken = opened._replace(load=lambda name: 1 / 0)
  with pytest.raises(ZeroDivisionError):
    rewrite(broken, out, overwrite=True)
  with pytest.raises(ZeroDivisionError):
    rewrite(broken, tmp_path / 'c')
  assert {file.name: file.read_bytes() for file in out.iterdir()} == before
  assert sorted(file.name for file in tmp_path.iterdir()) == ['a', 'b']
  rewrite(opened, out, overwrite=True, shard_bytes=1000)
  assert not (out / 'model.safetensors').exists()
  (tmp_path / 'mine').mkdir()
  (tmp_path / 'mine' / 'thesis.tex').write_text('')
  with pytest.raises(UserError, match='not overwritten'):
    rewrite(opened, tmp_path / 'mine', overwrite=True)


def test_disk_full(tmp_path, monkeypatch):
  opened = hf.read(hf_tiny.model(tmp_path / 'a', 'gemma')[0])

  def full(name):
    raise OSError(28, 'No space left on device')

  with pytest.raises(UserError, match='disk full while writing'):
    rewrite(opened._replace(load=full), tmp_path / 'b')
  usage = shutil.disk_usage(tmp_path)
  monkeypatch.setattr(
    shutil, 'disk_usage', lambda path: usage._replace(free=100)
  )
  with pytest.raises(UserError, match='disk full: .* needs'):
    rewrite(opened, tmp_path / 'b')
  assert [file.name for file in tmp_path.iterdir()] == ['a']


def test_a_decoder_that_is_no_gemma_is_not_written(tmp_path):
  opened = hf.read(hf_tiny.model(tmp_path / 'a', 'gemma')[0])
  config = opened.config.__class__(
    **{**opened.config.__dict__, 'final_softcap': 3.0}
  )
  with pytest.raises(UserError, match='final_softcap'):
    rewrite(opened._replace(config=config), tmp_path / 'b', source=False)
  assert not (tmp_path / 'b').exists()


MEMORY = """
import sys, threading, time
from alignjax.interop import hf

def anonymous():
  with open('/proc/self/status') as file:
    return next(int(x.split()[1]) for x in file if x.startswith('RssAnon'))

top = 0
def watch():
  global top
  while True:
    top = max(top, anonymous())
    time.sleep(0.001)

opened = hf.read(sys.argv[1])
opened.load('final_norm')
start = anonymous()
threading.Thread(target=watch, daemon=True).start()
with hf.writer(sys.argv[2], opened.config, opened.leaves,
               source=opened.provenance['source'],
               shard_bytes=10**8) as put:
  for name in opened.leaves:
    put(name, opened.load(name))
print((max(top, anonymous()) - start) * 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
def test_memory_is_that_of_a_few_tensors(tmp_path):
  width, layers, rows, heads = 1024, 5, 20_000, 4
  config = hf_tiny.CONFIGS['gemma'] | dict(
    hidden_size=width,
    num_hidden_layers=layers,
    vocab_size=rows,
    intermediate_size=4 * width,
    head_dim=width // heads,
    num_attention_heads=heads,
    num_key_value_heads=heads,
  )
  turned = {V: rows, D: width, F: 4 * width, N * H: width, K * H: width}
  shapes = {}
  for name, shape in hf_tiny.shapes('gemma').items():
    for i in range(layers if 'layers.0' in name else 1):
      if 'layers.1' not in name:
        shapes[name.replace('layers.0', f'layers.{i}')] = tuple(
          turned[n] for n in shape
        )
  tensors = {
    name: np.full(shape, 0.5, np.float32) for name, shape in shapes.items()
  }
  path = hf_tiny.write(tmp_path / 'a', config, tensors, shards=3)
  total = sum(x.nbytes for x in tensors.values())
  largest = max(x.nbytes for x in tensors.values())
  assert total > 4e8 and total > 5 * largest
  del tensors
  script = tmp_path / 'script.py'
  script.write_text(MEMORY)
  out = subprocess.run(
    [sys.executable, script, path, tmp_path / 'b'],
    capture_output=True,
    text=True,
    check=True,
  )
  peak = int(out.stdout)
  print(f'{total / 1e6:.0f} MB, largest {largest / 1e6:.0f}, {peak / 1e6:.0f}')
  assert peak < 2.5 * largest
