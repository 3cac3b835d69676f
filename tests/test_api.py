import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import alignjax as aj
from alignjax import api
from alignjax.core import naming, tree
from alignjax.core.errors import UserError
from alignjax.data import tokenizer
from alignjax.data.tokenizer import ByteTokenizer
from alignjax.interop.open import open as open_
from alignjax.models import decoder
from tests import tiny
from tests.interop import hf_tiny, trees

CONFIG = dataclasses.replace(trees.CONFIGS['gemma2'], window=5)
LEAVES = trees.leaves(CONFIG)
FORMATS = ('alignjax', 'hf', 'deepmind')


def model(dtype=np.float32, config=CONFIG):
  leaves = {k: jnp.asarray(x.astype(dtype)) for k, x in LEAVES.items()}
  return api.LoadedModel(config, naming.nested(leaves))


def tokens(rows=2, length=12):
  return np.random.default_rng(0).integers(0, 40, (rows, length), np.int32)


@pytest.mark.parametrize('dtype', [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize('format', FORMATS)
def test_every_format_is_saved_and_loaded(tmp_path, format, dtype):
  aj.save(model(dtype), tmp_path / 'm', format=format)
  assert open_(tmp_path / 'm').format == format
  loaded = aj.load(tmp_path / 'm', dtype='float32')
  assert loaded.tokenizer is None and loaded.files == ()
  assert loaded.config == CONFIG
  found = tree.named(loaded.params)
  assert found.keys() == LEAVES.keys()
  for name, leaf in LEAVES.items():
    expected = leaf.astype(dtype)
    assert found[name].dtype == expected.dtype, name
    assert np.asarray(found[name]).tobytes() == expected.tobytes(), name
  np.testing.assert_array_equal(
    aj.apply(loaded, tokens()), aj.apply(model(dtype), tokens())
  )


def test_the_dtype_to_compute_in(tmp_path):
  aj.save(model(), tmp_path / 'm')
  exact = aj.load(tmp_path / 'm')
  rounded = aj.load(tmp_path / 'm', dtype='bfloat16')
  assert (exact.config.dtype, rounded.config.dtype) == ('float32', 'bfloat16')
  assert rounded.params['embedding'].dtype == jnp.float32
  a, b = aj.apply(exact, tokens()), aj.apply(rounded, tokens())
  assert a.dtype == b.dtype == jnp.float32
  assert 1e-4 < float(jnp.abs(a - b).max()) < 1
  with pytest.raises(UserError, match='dtype'):
    aj.load(tmp_path / 'm', dtype='int8')
  assert aj.load(tmp_path / 'm', window_self=False).config.span == 6


def test_logits_are_raw_and_packing_is_told(tmp_path):
  rows = tokens(1, 12)
  position = np.concatenate([np.arange(7), np.arange(5)])[None]
  segment = np.repeat([[1, 2]], [7, 5], axis=1)
  packed = aj.apply(model(), rows, positions=position, segment_ids=segment)
  alone = [aj.apply(model(), rows[:, :7]), aj.apply(model(), rows[:, 7:])]
  tiny.check_logits(packed, jnp.concatenate(alone, 1))
  expected = decoder.apply(
    CONFIG, decoder.stacked(CONFIG, model().params), jnp.asarray(rows)
  )
  tiny.check_logits(aj.apply(model(), rows), expected)
  assert float(jnp.abs(expected).max()) < 1e3  # nothing is masked


def test_repeated_calls_do_not_trace_again(monkeypatch):
  traced = []
  apply, begin = decoder.apply, api.draw

  def counted_apply(*args):
    traced.append('apply')
    return apply(*args)

  def counted_draw(*args, **more):
    traced.append('sample')
    return begin(*args, **more)

  monkeypatch.setattr(decoder, 'apply', counted_apply)
  monkeypatch.setattr(api, 'draw', counted_draw)
  config = tiny.config(layers=2, window=9)  # of no other test
  params = decoder.canonical(
    jax.jit(decoder.init, static_argnums=0)(config, jax.random.key(0))
  )
  one = api.LoadedModel(config, params, ByteTokenizer())
  for _ in range(3):
    aj.apply(one, np.ones((1, 5), np.int32))
  for prompt in ('ab', 'other', 'one that is longer'):
    aj.sample(one, [prompt], max_new_tokens=2)
  assert traced == ['apply', 'sample']


def test_greedy_samples_are_the_likeliest_tokens():
  config = tiny.config(layers=2)
  params = decoder.canonical(
    jax.jit(decoder.init, static_argnums=0)(config, jax.random.key(1))
  )
  # Only printable bytes have logits, so that a text tells its tokens.
  printable = np.zeros((config.vocab_size, 1), np.float32)
  printable[6 + 32 : 6 + 127] = 1
  params['embedding'] = params['embedding'] * printable
  bytes_ = ByteTokenizer()
  one = api.LoadedModel(config, params, bytes_)
  prompts = ['ab', 'longer']
  texts = aj.sample(one, prompts, max_new_tokens=4, temperature=0)
  for prompt, (text,) in zip(prompts, texts):
    ids = np.zeros((1, 12), np.int32)
    start = len(prompt) + 1
    written = [bytes_.bos, *bytes_.encode(prompt + text)]
    assert len(written) == start + 4
    ids[0, : len(written)] = written
    best = jnp.argmax(aj.apply(one, ids)[0], axis=-1)
    assert best[start - 1 : start + 3].tolist() == written[start:]
  with pytest.raises(UserError, match='no tokenizer'):
    aj.sample(model(), ['ab'])


def test_files_and_provenance_travel(tmp_path):
  texts = ['hello there, general; nothing more to say\n' * 3]
  size = tokenizer.train(texts, tmp_path / 't', vocab_size=400).size
  config = dataclasses.replace(CONFIG, vocab_size=size)
  wide = np.ones((size, 16), np.float32)
  first = model(config=config)
  first = first._replace(params={**first.params, 'embedding': wide})
  aj.save(first, tmp_path / 'a', format='hf')
  (tmp_path / 'a/tokenizer.model').write_bytes((tmp_path / 't').read_bytes())
  (tmp_path / 'a/chat_template.jinja').write_text('{{ x }}')
  loaded = aj.load(tmp_path / 'a')
  assert loaded.tokenizer.size == size
  for format in FORMATS:
    aj.save(loaded, tmp_path / format, format=format)
    again = aj.load(tmp_path / format)
    assert again.tokenizer.size == size
    names = {file.name for file in again.files}
    assert names == {'tokenizer.model', 'chat_template.jinja'}
    assert again.provenance['source']['format'] == 'hf'


def test_a_tokenizer_with_too_many_ids(tmp_path):
  texts = ['hello there, general; nothing more to say\n' * 3]
  tokenizer.train(texts, tmp_path / 't', vocab_size=400)
  aj.save(model(), tmp_path / 'm')
  (tmp_path / 'm/tokenizer.model').write_bytes((tmp_path / 't').read_bytes())
  with pytest.raises(UserError, match='ids and the embedding .* 40 rows'):
    aj.load(tmp_path / 'm')


def test_a_vision_tower_is_saved_along(tmp_path):
  names = hf_tiny.shapes('gemma3', prefix='language_model.model.')
  tensors = hf_tiny.values(names | hf_tiny.VISION)
  hf_tiny.write(tmp_path / 'a', hf_tiny.CONFIGS['gemma3'], tensors)
  loaded = aj.load(tmp_path / 'a')
  aj.save(loaded, tmp_path / 'b')
  aj.save(aj.load(tmp_path / 'b'), tmp_path / 'c', format='hf')
  found = hf_tiny.stored(tmp_path / 'c')
  assert found.keys() == tensors.keys()
  for name, expected in tensors.items():
    assert found[name].tobytes() == expected.tobytes(), name


def test_params_that_do_not_fit(tmp_path):
  broken = model()
  broken.params['layer_1']['ffw']['up'] = jnp.ones((3, 4))
  del broken.params['final_norm']
  with pytest.raises(UserError) as error:
    aj.save(broken, tmp_path / 'm', format='hf')
  assert 'final_norm is missing' in str(error.value)
  assert 'layer_1/ffw/up is [3, 4], expected [16, 24]' in str(error.value)
  with pytest.raises(UserError, match='expected one of'):
    aj.save(model(), tmp_path / 'm', format='torch')
  aj.save(model(), tmp_path / 'm')
  with pytest.raises(UserError, match='exists already'):
    aj.save(model(), tmp_path / 'm')
  aj.save(model(), tmp_path / 'm', overwrite=True)
  assert [file.name for file in tmp_path.iterdir()] == ['m']
