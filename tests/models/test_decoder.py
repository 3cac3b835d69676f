"""The decoder: cached equals whole, scanned equals unrolled, layouts agree."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.core import tree
from alignjax.core.errors import UserError
from alignjax.models import decoder
from alignjax.models.config import Config, from_json, to_json
from tests import tiny


@functools.partial(jax.jit, static_argnums=0)
def apply(config, *arrays):
  return decoder.apply(config, *arrays)


def setup(**changes):
  config = tiny.config(**changes)
  params = jax.jit(lambda key: decoder.init(config, key))(jax.random.key(0))
  # Norm scales start at 0; nothing may hide behind that.
  params = tree.map_named(
    lambda name, x: x + 0.3 if name.endswith('norm') else x, params
  )
  tokens = jax.random.randint(jax.random.key(1), (3, 40), 6, 262)
  return config, params, tokens


@pytest.mark.parametrize('family', ['gemma1', 'gemma2', 'gemma3'])
@pytest.mark.parametrize(
  'chunks', [[40], [1] * 40, [7, 5, 1, 1, 13, 13], [9, *[1] * 31]]
)
def test_cached_decoding_equals_the_full_pass(family, chunks):
  # 40 columns wrap the ring of 8 slots four times over.
  config, params, tokens = setup(family=family, layers=7)
  full = apply(config, params, tokens)
  cache = decoder.empty_cache(config, 3, 40)
  layers = decoder.turned(params)
  extend = jax.jit(
    lambda tokens, position, cache: decoder.extend(
      config, layers, tokens, position, cache
    )
  )
  parts, column = [], 0
  for length in chunks:
    columns = slice(column, column + length)
    position = jnp.broadcast_to(jnp.arange(40)[columns], (3, length))
    x, cache = extend(tokens[:, columns], position, cache)
    parts.append(x)
    column += length
  cached = decoder.unembed(config, params, jnp.concatenate(parts, axis=1))
  tiny.check_logits(cached, full)


def test_local_layers_keep_a_ring_and_global_ones_everything():
  config = tiny.config(family='gemma3', layers=7)
  cache = decoder.empty_cache(config, 2, 40)
  slots = [layer['position'].shape[1] for layer in cache['layers']]
  assert slots == [8, 8, 8, 8, 8, 40, 8]
  short = decoder.empty_cache(config, 2, 5)
  assert {layer['position'].shape[1] for layer in short['layers']} == {5}


@pytest.mark.parametrize('remat', ['products', 'outputs', 'full'])
def test_remat_changes_nothing(remat):
  config, params, tokens = setup(layers=5)
  import dataclasses

  def loss(config):
    def fn(params):
      return jnp.mean(apply(config, params, tokens) ** 2)

    return jax.jit(jax.value_and_grad(fn))(params)

  value, grads = loss(config)
  other, other_grads = loss(dataclasses.replace(config, remat=remat))
  np.testing.assert_allclose(value, other, rtol=1e-6)
  for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(other_grads)):
    np.testing.assert_allclose(a, b, atol=1e-6 + 1e-4 * np.abs(a).max())


def test_scan_equals_the_unrolled_layers():
  # A pattern as long as the model leaves nothing to scan twice.
  config, params, tokens = setup(layers=6)
  import dataclasses

  unrolled = dataclasses.replace(
    config, pattern=('local', 'global') * 3 + ('local',)
  )
  canonical = decoder.canonical(params)
  same = decoder.stacked(unrolled, canonical)
  assert 'groups' in params and 'groups' not in same
  tiny.check_logits(
    apply(config, params, tokens), apply(unrolled, same, tokens)
  )


def test_layouts_convert_back_and_forth():
  config, params, _ = setup(layers=5)
  canonical = decoder.canonical(params)
  names = set(tree.named(canonical))
  assert 'layer_4/attn/q' in names and 'layer_0/ffw/down' in names
  assert not any(name.startswith('groups') for name in names)
  again = decoder.stacked(config, canonical)
  assert jax.tree.structure(again) == jax.tree.structure(params)
  jax.tree.map(np.testing.assert_array_equal, again, params)
  held = tree.canonical_names(params)
  assert held['groups/1/attn/q'] == ('layer_1/attn/q', 'layer_3/attn/q')
  assert {n for group in held.values() for n in group} == names


def test_packed_documents_do_not_see_each_other():
  config, params, tokens = setup()
  first, second = tokens[:1, :15], tokens[:1, 15:]
  packed = apply(
    config,
    params,
    tokens[:1],
    jnp.concatenate([jnp.arange(15), jnp.arange(25)])[None],
    jnp.concatenate([jnp.full(15, 1), jnp.full(25, 2)])[None],
  )
  alone = [apply(config, params, x) for x in (first, second)]
  tiny.check_logits(packed, jnp.concatenate(alone, axis=1))


def test_the_window_counts_the_query_itself():
  config, params, tokens = setup(layers=1)  # one local layer of 8 keys
  base = apply(config, params, tokens)
  far = apply(config, params, tokens.at[:, 20].set(7))
  changed = np.abs(np.asarray(far - base)).max(axis=(0, 2)) > 1e-7
  assert changed[20:28].all() and not changed[28:].any()
  assert not changed[:20].any()  # causal


def test_bfloat16_compute_is_close():
  import dataclasses

  config, params, tokens = setup()
  exact = apply(config, params, tokens)
  rough = apply(dataclasses.replace(config, dtype='bfloat16'), params, tokens)
  assert rough.dtype == jnp.float32
  assert np.abs(exact - rough).max() < 0.1 * np.abs(exact).max()


def test_bad_shapes_are_told_in_one_sentence():
  with pytest.raises(UserError, match='heads = 4 is not a multiple'):
    tiny.config(kv_heads=3)
  with pytest.raises(UserError, match='remat'):
    tiny.config(remat='some')
  with pytest.raises(UserError, match="family: found 'gemma9'"):
    tiny.config(family='gemma9')
  values = to_json(tiny.config())
  assert from_json(values) == tiny.config()
  with pytest.raises(UserError, match='no such fields'):
    from_json(values | {'depth': 3})


def test_norms_and_decays_are_not_rounded():
  config = Config(
    vocab_size=64,
    width=32,
    hidden=48,
    layers=4,
    heads=4,
    kv_heads=1,
    head_dim=8,
    pattern=('recurrent', 'local'),
    bias=True,
    dtype='bfloat16',
  )
  params = decoder.cast(config, decoder.init(config, jax.random.key(0)))
  dtypes = {name: x.dtype for name, x in tree.named(params).items()}
  exact = {name for name, dtype in dtypes.items() if dtype == jnp.float32}
  assert exact == {
    name for name in dtypes if name.endswith(('_norm', 'a_param'))
  }
  assert 'groups/0/recurrent/a_param' in exact and 'final_norm' in exact
  logits = decoder.apply(config, params, jnp.zeros((1, 5), jnp.int32))
  assert logits.dtype == jnp.float32 and bool(jnp.isfinite(logits).all())
