"""Every merging method against float64, and what holds for all of them."""

from functools import partial

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from alignjax.core import lookup
from alignjax.core.errors import UserError
from alignjax.merge import arrays, blocks, method
from tests.merge import references
from tests.merge.references import adding, compiled, electing, streamed

SHAPE = (19, 24)
W = {'weights': [0.5, 1.5, 0.25]}

# (method, numbers, models), each against the function of that name.
CASES = [
  ('linear', {}, 3),
  ('linear', W, 3),
  ('linear', {'t': 0.3}, 2),
  ('liti', {'liti_rate': 0.3}, 1),
  ('slerp', {}, 4),
  ('slerp', {'t': 0.2}, 2),
  ('task_arithmetic', {}, 3),
  ('task_arithmetic', {'weights': [0.5, -1.5, 0.25], 'scale': 0.7}, 3),
  ('ties', {}, 3),
  ('ties', {'density': 0.35, 'scale': 0.7, **W}, 3),
  ('ties', {'density': 0.0}, 2),
  ('ties', {'density': 1.0}, 2),
  ('breadcrumbs.linear', {}, 3),
  ('breadcrumbs.linear', {'density': 0.5, 'gamma': 0.2, **W}, 3),
  ('breadcrumbs.linear', {'density': 0.9, 'gamma': 0.2, 'scale': 0.3}, 2),
  ('breadcrumbs.ties', {'density': 0.5, 'gamma': 0.1, 'scale': 1.3, **W}, 3),
  ('dare.linear', {}, 3),
  ('dare.linear', {'density': 0.3, 'seed': 5, 'scale': 0.4, **W}, 3),
  ('dare.ties', {'density': 0.3, 'seed': 5, **W}, 3),
  ('della.linear', {}, 3),
  ('della.linear', {'density': 0.3, 'epsilon': 0.3, 'seed': 2, **W}, 3),
  ('della.ties', {'density': 0.4, 'epsilon': 0.2, 'scale': 0.6, **W}, 3),
  ('sce', {}, 3),
  ('sce', {'density': 0.6, 'scale': 0.5}, 4),
  ('model_stock', {}, 2),
  ('model_stock', {}, 4),
  ('karcher', {}, 3),
  ('karcher', W, 3),
  ('multislerp', {}, 4),
  ('multislerp', W, 3),
  ('slerp_raw', {}, 2),
  ('slerp_raw', {'t': 0.2}, 2),
  ('nearswap', {'t': 0.01}, 1),
  ('nearswap', {}, 1),
  ('arcee_fusion', {}, 1),
  ('ram', {'epsilon': 0.02}, 3),
  ('ram_plus', {'epsilon': 0.02, 'r': 0.5, 'alpha': 2.0}, 3),
  ('ram_plus', {'epsilon': 0.01}, 3),
  ('ema', {}, 4),
  ('ema', {'rate': 0.6}, 3),
]
NAMES = sorted({name for name, _, _ in CASES})
# Block sizes change the order in which inner products are summed.
SUMMED = ('slerp', 'sce', 'model_stock', 'karcher', 'multislerp', 'slerp_raw')


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
  monkeypatch.setattr(blocks, 'ITEMS', 5 * SHAPE[1])


def inputs(models, seed=0, shape=SHAPE):
  """A base and models that have moved alike, and each for itself."""
  draw = np.random.default_rng(seed).normal
  base = draw(size=shape)
  shared = 0.02 * draw(size=shape)
  found = [base + shared + 0.02 * draw(size=shape) for _ in range(models)]
  return base.astype(np.float32), [m.astype(np.float32) for m in found]


def expected(name, base, models, **numbers):
  file, _, kind = name.partition('.')
  fn = getattr(references, file)
  if kind:
    fn = partial(fn, join=adding if kind == 'linear' else electing)
  return fn(np.float64(base), models, **numbers)


def of(name):
  """(models, numbers) with which a method runs."""
  how = method.method(name)
  return 1 if how.models[1] == 1 else max(2, how.models[0])


def near(found, exact, tolerance=1e-6):
  assert np.isfinite(found).all()
  error = np.abs(np.float64(found) - exact).max()
  assert error <= tolerance * max(np.abs(exact).max(), 1e-30), error


@pytest.mark.parametrize('way', [streamed, compiled])
@pytest.mark.parametrize(('name', 'numbers', 'models'), CASES)
def test_methods_follow_their_definitions(name, numbers, models, way):
  base, leaves = inputs(models, seed=len(name))
  exact = expected(name, base, leaves, **numbers)
  near(way(name, base, leaves, **numbers), exact)


@pytest.mark.parametrize(('name', 'numbers', 'models'), CASES)
def test_bfloat16_is_merged_to_its_rounding(name, numbers, models):
  base, leaves = inputs(models, seed=7)
  base, *leaves = (x.astype(ml_dtypes.bfloat16) for x in (base, *leaves))
  wide = [np.float32(x) for x in (base, *leaves)]
  if name == 'arcee_fusion':
    pytest.skip('many importances of bfloat16 are at the quartiles')
  found = arrays.rounded(streamed(name, base, leaves, **numbers), base.dtype)
  exact = expected(name, wide[0], wide[1:], **numbers)
  gap = np.abs(np.float64(found) - exact)
  assert (gap <= 2**-8 * np.abs(exact) + 1e-6 * np.abs(exact).max()).all()


@pytest.mark.parametrize('name', NAMES)
def test_blocks_do_not_change_the_result(name, monkeypatch):
  base, leaves = inputs(of(name))
  found = streamed(name, base, leaves)
  for items in (1, 2**17):
    monkeypatch.setattr(blocks, 'ITEMS', items)
    other = streamed(name, base, leaves)
    if name in SUMMED:
      near(found, other)
    else:
      assert found.tobytes() == other.tobytes()


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('shape', [(1, 1), (1, 7), (7, 1)])
def test_leaves_of_one_row_or_column(name, shape):
  base, leaves = inputs(of(name), shape=shape)
  # All in one direction: the only other one of a single item is opposite.
  leaves = [base + abs(leaf - base) for leaf in leaves]
  merged = streamed(name, base, leaves)
  near(merged, compiled(name, base, leaves), 2e-6)
  assert merged.shape == shape


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('way', [streamed, compiled])
def test_models_equal_to_the_base_give_the_base(name, way):
  base, _ = inputs(1)
  near(way(name, base, [base] * of(name)), base)


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('way', [streamed, compiled])
def test_zeros_never_give_nan(name, way):
  base, leaves = inputs(of(name))
  zero = 0 * base
  assert not way(name, zero, [zero] * len(leaves)).any()
  for moved in (leaves, [base, *leaves[1:]], [*leaves[:-1], zero]):
    assert np.isfinite(way(name, base, moved)).all()
    assert np.isfinite(way(name, zero, moved)).all()


@pytest.mark.parametrize(
  'name', [n for n in NAMES if method.method(n).models[1] is None]
)
def test_the_order_of_models_does_not_matter(name):
  if name == 'ema' or method.method(name).random:
    pytest.skip('depends on the order')
  base, leaves = inputs(2 if name == 'slerp' else 4)
  found = streamed(name, base, leaves)
  near(found, streamed(name, base, leaves[::-1]))


@pytest.mark.parametrize(
  ('name', 'numbers', 'models', 'same'),
  [
    ('linear', {}, 1, 1),
    ('linear', {'weights': [0.0, 2.0]}, 2, 2),
    ('linear', {'t': 1.0}, 2, 2),
    ('task_arithmetic', {}, 1, 1),
    ('task_arithmetic', {'weights': [0.0, 1.0]}, 2, 2),
    ('task_arithmetic', {'scale': 0.0}, 2, 0),
    ('ties', {'density': 1.0}, 1, 1),
    ('ties', {'density': 1.0, 'weights': [0.0, 0.3]}, 2, 2),
    ('ties', {'density': 0.0}, 2, 0),
    ('ties', {'scale': 0.0}, 2, 0),
    ('dare.linear', {'density': 1.0}, 1, 1),
    ('dare.linear', {'density': 0.0}, 2, 0),
    ('dare.ties', {'density': 1.0, 'weights': [0.7, 0.0]}, 2, 1),
    ('della.linear', {'density': 1.0, 'epsilon': 0.0}, 1, 1),
    ('della.ties', {'density': 0.0, 'epsilon': 0.0}, 2, 0),
    ('breadcrumbs.linear', {'density': 1.0}, 1, 1),
    ('breadcrumbs.linear', {'density': 0.0}, 2, 0),
    ('breadcrumbs.ties', {'density': 1.0}, 1, 1),
    ('sce', {'density': 1.0}, 1, 1),
    ('sce', {'density': 0.0}, 2, 0),
    ('karcher', {}, 1, 1),
    ('karcher', {'weights': [0.0, 1.0]}, 2, 2),
    ('multislerp', {}, 1, 1),
    ('multislerp', {'weights': [1.0, 0.0]}, 2, 1),
    ('slerp', {'t': 0.0}, 2, 1),
    ('slerp', {'t': 1.0}, 2, 2),
    ('slerp_raw', {'t': 0.0}, 2, 1),
    ('slerp_raw', {'t': 1.0}, 2, 2),
    ('liti', {'liti_rate': 1.0}, 1, 1),
    ('nearswap', {'t': 0.0}, 1, 0),
    ('nearswap', {'t': 1e9}, 1, 1),
    ('ram', {'epsilon': 0.0}, 1, 1),
    ('ram', {'epsilon': 1e9}, 2, 0),
    ('ram_plus', {'epsilon': 0.0}, 1, 1),
    ('ema', {'rate': 0.0}, 3, 1),
    ('ema', {'rate': 1.0}, 3, 3),
  ],
)
@pytest.mark.parametrize('way', [streamed, compiled])
def test_ends_are_the_inputs_bit_for_bit(name, numbers, models, same, way):
  base, leaves = inputs(models, seed=3)
  if same == 0:
    base[0, 0] = -0.0
  found = way(name, base, leaves, **numbers)
  assert found.tobytes() == [base, *leaves][same].tobytes()


@pytest.mark.parametrize(
  ('name', 'models', 'numbers', 'message'),
  [
    ('slerp', 1, {}, r'slerp takes 2 or more model\(s\), not 1'),
    ('slerp', 3, {'t': 0.5}, 'slerp takes t for two models only'),
    ('slerp', 2, {'t': 1.5}, 't must be a number from 0 to 1, found 1.5'),
    ('slerp', 2, {'t': float('nan')}, 't must be a number from 0 to 1'),
    ('slerp', 2, {'t': 'half'}, "found 'half'"),
    ('slerp', 2, {'lam': 0.5}, "the method 'slerp' has no number 'lam'"),
    ('liti', 2, {}, r'liti takes 1 model\(s\), not 2'),
    ('liti', 1, {'liti_rat': 0.5}, "did you mean 'liti_rate'"),
    ('linear', 2, {'weights': [1.0]}, '1 weights for 2 models'),
    ('linear', 2, {'weights': [0.0, 0.0]}, 'must not all be 0'),
    ('linear', 2, {'weights': [1.0, -1.0]}, 'must not sum to 0'),
    ('karcher', 2, {'weights': [2.0, -1.0]}, 'must not be negative'),
    ('linear', 2, {'weights': 0.5}, 'must be a list of numbers'),
    ('linear', 2, {'weights': [0.5, 0.5], 't': 0.5}, 't or weights, not both'),
    ('lerp', 3, {'t': 0.5}, 'linear takes t for two models only, not 3'),
    ('ties', 2, {'density': 1.2}, 'density must be a number from 0 to 1'),
    ('ties', 2, {'scale': float('inf')}, 'scale must be a number'),
    ('sce', 2, {'scale': float('nan')}, 'scale must be a number'),
    ('task_arithmetic', 2, {'weights': [1.0, float('inf')]}, 'a weight must'),
    ('ties', 2, {'weights': [1.0, -1.0]}, 'must not be negative'),
    ('dare.linear', 2, {'seed': 0.5}, 'seed must be a whole number'),
    ('dare.linear', 2, {'seed': 2**70}, 'seed must be a whole number'),
    ('dare.ties', 2, {'density': -0.1}, 'density must be a number from 0'),
    ('della.ties', 2, {'density': 0.9, 'epsilon': 0.2}, 'must lie from 0 to'),
    ('breadcrumbs.ties', 2, {'gamma': 2}, 'gamma must be a number from 0'),
    ('sce', 2, {'weights': [1.0, 1.0]}, "has no number 'weights'"),
    ('model_stock', 1, {}, r'takes 2 or more model\(s\), not 1'),
    ('slerp_raw', 3, {}, r'takes 2 model\(s\), not 3'),
    ('nearswap', 1, {'t': -1.0}, 't must be a number from 0 to inf'),
    ('arcee_fusion', 2, {}, r'takes 1 model\(s\), not 2'),
    ('ram', 2, {'epsilon': -1.0}, 'epsilon must be a number from 0'),
    ('ema', 2, {'rate': 1.5}, 'rate must be a number from 0 to 1'),
  ],
)
def test_bad_numbers_are_named(name, models, numbers, message):
  base, leaves = inputs(models)
  with pytest.raises(UserError, match=message):
    streamed(name, base, leaves, **numbers)


@pytest.mark.parametrize(
  'name', ['slerp', 'slerp_raw', 'karcher', 'multislerp']
)
def test_opposite_vectors_are_refused(name):
  base, (model,) = inputs(1)
  base = 0 * base
  with pytest.raises(UserError, match="(opposite|cancel).*group 'layer_0'"):
    streamed(name, base, [model, -model])
  with pytest.raises(UserError, match='leaf .layer_0.* has NaN or infinite'):
    streamed(name, base, [model, np.where(model > 1, np.inf, model)])


@pytest.mark.parametrize('name', ['karcher', 'multislerp'])
def test_weights_that_leave_opposite_vectors_are_refused(name):
  base, (model, other) = inputs(2)
  base, weights = 0 * base, [1.0, 1.0, 0.0]
  models = [model, -model, other]
  with pytest.raises(UserError, match='with these weights .* cancel'):
    streamed(name, base, models, weights=weights)
  assert np.isnan(compiled(name, base, models, weights=weights)).any()


def test_every_method_is_listed_and_told_of():
  assert sorted(lookup.names('merge.methods')) == NAMES
  for name in NAMES:
    how = method.method(name)
    assert how.about and how.about[0].islower() and how.fn.__doc__
  with pytest.raises(UserError, match="no 'slrp'.*did you mean 'slerp'"):
    method.method('slrp')


def test_numbers_of_jax_are_taken_as_they_are():
  base, leaves = inputs(2)
  found = compiled('dare.linear', base, leaves, density=0.4)
  other = streamed('dare.linear', base, leaves, density=0.4)
  near(found, other)
  near(
    streamed('slerp', base, leaves, t=jnp.float32(0.25)),
    streamed('slerp', base, leaves, t=0.25),
  )
