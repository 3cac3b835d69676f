import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.core import naming, tree
from alignjax.core.errors import UserError


@pytest.fixture
def params():
  key = np.random.default_rng(0)
  return {
    'layer_0': {'attn': {'q': jnp.asarray(key.normal(size=(3, 2)), 'float32')}},
    'embed': jnp.asarray(key.normal(size=4), 'float32'),
  }


def test_named_and_nested_are_inverse(params):
  leaves = tree.named(params)
  assert set(leaves) == {'layer_0/attn/q', 'embed'}
  assert leaves['embed'] is params['embed']
  back = naming.nested(leaves)
  assert back['layer_0']['attn']['q'] is params['layer_0']['attn']['q']
  assert set(back) == set(params)


def test_map_named_sees_names_and_all_trees(params):
  got = tree.map_named(lambda name, a, b: (name, a is b), params, params)
  assert got['layer_0']['attn']['q'] == ('layer_0/attn/q', True)


def test_lookup_first_full_match_wins():
  table = [('layer_.*/q', 1), ('layer_.*', 2), ('embed', 3)]
  assert naming.lookup(table, 'layer_0/attn/q', 'lr') == 1
  assert naming.lookup(table, 'layer_0/attn/k', 'lr') == 2
  with pytest.raises(UserError, match="lr: no rule matches .*'embedding'"):
    naming.lookup(table, 'embedding', 'lr')


def test_lerp_is_exact_at_both_ends(params):
  other = tree.map_named(lambda _, x: x * 1e6 + 0.1, params)
  for rate, end in [(0.0, params), (1.0, other)]:
    for got, want in zip(
      tree.named(tree.lerp(params, other, rate)).values(),
      tree.named(end).values(),
    ):
      np.testing.assert_array_equal(got, want)


def test_lerp_moves_towards_new_and_keeps_the_dtype_of_old():
  old = {'x': jnp.zeros(2, jnp.bfloat16)}
  new = {'x': jnp.ones(2, jnp.float32)}
  got = tree.lerp(old, new, 0.25)['x']
  assert got.dtype == jnp.bfloat16
  np.testing.assert_array_equal(got.astype('float32'), [0.25, 0.25])


def test_norm_is_global_and_float32():
  got = tree.norm(
    {'a': jnp.asarray([3.0]), 'b': jnp.asarray([4.0], 'bfloat16')}
  )
  assert got == 5.0 and got.dtype == jnp.float32
  assert tree.norm({}) == 0.0


def test_cast_leaves_integers_alone():
  got = tree.cast({'w': jnp.ones(2), 'ids': jnp.ones(2, 'int32')}, 'bfloat16')
  assert got['w'].dtype == jnp.bfloat16 and got['ids'].dtype == jnp.int32


def test_size(params):
  assert tree.size(params) == 10
