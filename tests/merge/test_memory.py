import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.core import naming, tree
from alignjax.core.errors import UserError
from alignjax.merge.gram import task_gram
from alignjax.merge.memory import merge
from alignjax.merge.methods.slerp import coefficients, slerp


def model(seed, dtype=np.float32):
  draw = np.random.default_rng(seed).normal
  leaf = lambda *shape: jnp.asarray(draw(size=shape), dtype)  # noqa: E731
  return {
    'embed': {'table': leaf(7, 3)},
    'layer_0': {'attn': {'q': leaf(3, 2)}, 'ffw': {'up': leaf(3, 5)}},
    'layer_1': {'attn': {'q': leaf(3, 2)}, 'ffw': {'up': leaf(3, 5)}},
  }


def flat(t, *leaves):
  return np.concatenate([np.ravel(tree.named(t)[name]) for name in leaves])


@pytest.mark.parametrize(
  ('group', 'together'),
  [
    ('layer', ['layer_1/attn/q', 'layer_1/ffw/up']),
    ('tensor', ['layer_1/ffw/up']),
    ('all', list(tree.named(model(0)))),
  ],
)
def test_a_group_has_one_angle(group, together):
  base, a, b = map(model, range(3))
  merged = merge('slerp', base=base, models=[a, b], t=0.3, group=group)
  base, a, b, merged = (flat(t, *together) for t in (base, a, b, merged))
  stats = coefficients(task_gram(base, [a, b], None), t=0.3)
  expected = slerp(base, [a, b], stats=stats)
  np.testing.assert_allclose(merged, expected, atol=1e-5)


def test_groups_differ():
  base, a, b = map(model, range(3))
  merged = [
    flat(merge('slerp', base=base, models=[a, b], group=g), 'layer_0/ffw/up')
    for g in ('layer', 'tensor', 'all')
  ]
  assert not np.allclose(merged[0], merged[1], atol=1e-4)
  assert not np.allclose(merged[0], merged[2], atol=1e-4)


def test_under_jit():
  base, a, b = map(model, range(3))
  compiled = jax.jit(lambda t: merge('slerp', base=base, models=[a, b], t=t))
  eager = merge('slerp', base=base, models=[a, b], t=0.3)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5),
    compiled(0.3),
    eager,
  )


def test_arithmetic_is_float32_and_the_dtype_that_of_the_base():
  base = model(0, jnp.bfloat16)
  moved = jax.tree.map(lambda x: x.astype(jnp.float32) * 1.001, base)
  half = merge('liti', base=base, models=[moved], liti_rate=0.5)
  assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(half))
  base32 = jax.tree.map(lambda x: x.astype(jnp.float32), base)
  half = merge('liti', base=base32, models=[moved], liti_rate=0.5)
  np.testing.assert_allclose(
    half['embed']['table'], base32['embed']['table'] * 1.0005, rtol=1e-6
  )


def test_integers_must_agree():
  base = {'w': jnp.ones(2), 'n': jnp.array([1, 2])}
  merged = merge('lerp', base=base, models=[base, base])
  np.testing.assert_array_equal(merged['n'], [1, 2])
  with pytest.raises(UserError, match="'n' is int32 and differs"):
    merge('lerp', base=base, models=[base, {**base, 'n': jnp.array([1, 3])}])


def test_every_mismatch_is_listed_at_once():
  base, a, b = map(model, range(3))
  a['embed']['table'] = jnp.zeros((8, 3))
  del b['layer_0']['attn']
  b['extra'] = jnp.ones(1)
  with pytest.raises(UserError) as error:
    merge('slerp', base=base, models=[a, b])
  for part in (
    'embed/table is [7, 3] in base and [8, 3] in model 0',
    'layer_0/attn/q is missing in model 1',
    'extra of model 1 is missing in base',
  ):
    assert part in str(error.value)


def test_opposite_task_vectors_are_refused():
  base, a = model(0), model(1)
  b = jax.tree.map(lambda x, y: x - (y - x), base, a)
  with pytest.raises(UserError, match='opposite'):
    merge('slerp', base=base, models=[a, b])


def test_stacked_layers_are_refused():
  stacked = tree.stack(model(0), 1)
  with pytest.raises(UserError, match='canonical'):
    merge('lerp', base=stacked, models=[stacked, stacked])


@pytest.mark.parametrize('jitted', [False, True])
@pytest.mark.parametrize(
  ('method', 'numbers'),
  [('slerp', {'t': 0.3}), ('linear', {'weights': [1.0, 3.0]})],
)
def test_sharded_is_streamed(method, numbers, jitted):
  def wide(seed):
    draw = np.random.default_rng(seed).normal
    shapes = {'embedding': (64, 8), 'layer_0/attn/q': (8, 4, 2)}
    return naming.nested(
      {name: draw(size=s).astype('f4') for name, s in shapes.items()}
    )

  base, *models = map(wide, range(3))
  expected = merge(method, base=base, models=models, **numbers)
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ('fsdp',))
  sharding = jax.sharding.NamedSharding(
    mesh, jax.sharding.PartitionSpec('fsdp')
  )
  base, *models = jax.device_put([base, *models], sharding)

  def merged(base, models):
    return merge(method, base=base, models=models, **numbers)

  found = (jax.jit(merged) if jitted else merged)(base, models)
  for name, x in tree.named(found).items():
    assert len(x.sharding.device_set) == 4
    y = tree.named(expected)[name]
    np.testing.assert_allclose(x, y, atol=1e-6 * np.abs(y).max())
