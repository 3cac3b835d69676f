"""What methods select and draw: exact counts, ties, shares, independence."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from alignjax.core.errors import UserError
from alignjax.merge import arrays, blocks, select
from alignjax.merge.method import Method, stream
from alignjax.merge.methods import arcee_fusion
from tests.merge import references
from tests.merge.references import NAME, compiled, importance, streamed


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
  monkeypatch.setattr(blocks, 'ITEMS', 1000)


def thresholds(x, ranks):
  """The order statistics of |x| through blocks of rows."""
  how = Method(
    'select',
    lambda *_: None,
    '',
    {},
    passes=select.order_statistics(select.magnitudes),
    prepare=lambda size: {'ranks': ranks},
  )
  leaf = blocks.Leaf(NAME, *x.shape, lambda a, b: [0 * x[a:b], x[a:b]])
  return blocks.settled(how, leaf, {})[0][0]


def test_a_share_is_of_the_number_as_it_is_written():
  assert select.share_of(100, 0.29) == 29 != int(0.29 * 100)
  assert select.share_of(10**12, 0.1) == 10**11
  assert select.share_of(7, 1.0) == 7 and select.share_of(7, 0) == 0


def test_a_traced_share_is_refused():
  with pytest.raises(UserError, match='must not be traced'):
    jax.jit(lambda share: select.share_of(10, share))(0.5)


@pytest.mark.parametrize(
  'draw',
  [
    lambda rng, n: rng.normal(size=n),
    lambda rng, n: rng.normal(size=n) * 10.0 ** rng.integers(-40, 38, n),
    lambda rng, n: rng.normal(size=n).astype(ml_dtypes.bfloat16),
    lambda rng, n: rng.integers(-3, 4, n) * 0.125,
    lambda rng, n: 1 + rng.integers(0, 9, n) * 2.0**-23,
  ],
)
def test_order_statistics_are_exact(draw):
  x = np.float32(draw(np.random.default_rng(0), 12000)).reshape(-1, 40)
  ranks = (0, 1, 2, 17, 600, 11999, 12000)
  found = thresholds(x, ranks)
  exact = [np.inf, *(np.sort(abs(x), axis=None)[-k] for k in ranks[1:])]
  assert found.dtype == np.float32
  np.testing.assert_array_equal(found, np.float32(exact))


def test_ties_trims_to_the_density_exactly():
  model = np.random.default_rng(1).normal(size=(50, 40)).astype(np.float32)
  for density, stay in ((0.2, 400), (0.29, 580), (0.0003, 0), (0.0005, 1)):
    merged = streamed('ties', 0 * model, [model], density=density)
    assert np.count_nonzero(merged) == stay
    if stay:
      assert abs(model)[merged == 0].max() < abs(merged)[merged != 0].min()


@pytest.mark.parametrize('way', [streamed, compiled])
def test_items_that_tie_with_the_last_one_stay(way):
  model = np.float32([[3, 2, -2, 2], [1, 1, -1, 0.5]])
  merged = way('ties', 0 * model, [model], density=0.25)  # the 2 largest
  np.testing.assert_array_equal(merged, [[3, 2, -2, 2], [0, 0, 0, 0]])
  merged = way(
    'breadcrumbs.linear', 0 * model, [model], density=0.25, gamma=0.25
  )  # ranks 3 and 4, of which rank 2 is as large
  np.testing.assert_array_equal(merged, [[0, 2, -2, 2], [0, 0, 0, 0]])


@pytest.mark.parametrize('way', [streamed, compiled])
def test_an_elected_sign_by_hand(way):
  base = np.full((1, 4), 10, np.float32)
  steps = np.float32([[1, 2, -1, 1], [3, -1, 0, -1], [-1, -4, -5, 0]])
  models = [base + step for step in steps]
  merged = way('ties', base, models, density=1.0)
  np.testing.assert_allclose(merged - base, [[2, -2.5, -3, 0]], atol=1e-6)
  weights = [4.0, 1.0, 0.5]
  merged = way('ties', base, models, density=1.0, weights=weights)
  np.testing.assert_allclose(
    merged - base, [[7 / 5, 2, -6.5 / 4.5, 1]], atol=2e-6
  )


def drawn(name, shape, models=2, **numbers):
  """What each of the models leaves of a change of 1, if it alone changes."""
  base = np.zeros(shape, np.float32)
  found = []
  for m in range(models):
    leaves = [base + np.float32(m == k) for k in range(models)]
    found.append(streamed(name, base, leaves, **numbers))
  return found


@pytest.mark.parametrize('name', ['dare.linear', 'dare.ties'])
@pytest.mark.parametrize('density', [0.1, 0.5, 0.9])
def test_dare_keeps_its_share_and_rescales(name, density):
  shape = (400, 250)
  for seed in (0, 1):
    for merged in drawn(name, shape, density=density, seed=seed):
      count = np.count_nonzero(merged)
      sigma = (density * (1 - density) * merged.size) ** 0.5
      assert abs(count - density * merged.size) < 4 * sigma
      # Of one model alone, election divides by its own weight only.
      np.testing.assert_allclose(merged[merged != 0], 1 / density, rtol=1e-6)


def test_masks_are_independent():
  shape, density = (400, 250), 0.3
  first, second = drawn('dare.linear', shape, density=density)
  other, _ = drawn('dare.linear', shape, density=density, seed=1)
  again, _ = drawn('dare.linear', shape, density=density, seed=0)
  assert (again == first).all()
  index = np.arange(first.size, dtype=np.uint32).reshape(shape)
  leaf = arrays.uniform(index, stream(0, 'layer_1/ffw/up', 0)) < density
  masks = [first != 0, second != 0, other != 0, leaf]
  shifts = [np.roll(masks[0], k) for k in (1, shape[1])]
  both = density**2
  sigma = (both * (1 - both) / index.size) ** 0.5
  for i, a in enumerate([*masks, *shifts]):
    for b in [*masks, *shifts][:i]:
      assert abs((a & b).mean() - both) < 4 * sigma


def test_draws_are_the_same_by_numpy_and_jax_and_uniform():
  index = np.arange(2**32 - 50000, 2**32, dtype=np.uint32)
  seed = stream(3, NAME, 1)
  found = arrays.uniform(index, seed)
  other = jax.jit(lambda x: arrays.uniform(x, seed))(jnp.asarray(index))
  assert found.tobytes() == np.asarray(other).tobytes()
  assert 0 <= found.min() and found.max() < 1
  ranks = np.sort(found) - (np.arange(len(found)) + 0.5) / len(found)
  assert abs(ranks).max() < 1.95 / len(found) ** 0.5  # Kolmogorov, p = 0.001


def test_dare_is_the_task_vector_on_average():
  draw = np.random.default_rng(2).normal
  base, model = (draw(size=(20, 25)).astype(np.float32) for _ in range(2))
  runs = [
    streamed('dare.linear', base, [model], density=0.4, seed=seed)
    for seed in range(300)
  ]
  sigma = abs(model - base) * (0.6 / 0.4 / len(runs)) ** 0.5
  away = (np.mean(runs, axis=0) - model) / sigma
  assert abs(away).max() < 5 and 0.8 < away.std() < 1.2


def test_della_keeps_more_of_what_is_large_and_is_the_mean_on_average():
  rows, columns, density, epsilon = 3000, 11, 0.5, 0.3
  model = np.random.default_rng(3).normal(size=(rows, columns))
  model = model.astype(np.float32)
  merged = streamed(
    'della.linear', 0 * model, [model], density=density, epsilon=epsilon
  )
  order = np.argsort(abs(model), axis=1)
  stays = np.take_along_axis(merged != 0, order, axis=1)
  share = density + epsilon * np.linspace(-1, 1, columns)
  sigma = (share * (1 - share) / rows) ** 0.5
  assert (abs(stays.mean(0) - share) < 4 * sigma).all()
  scale = np.take_along_axis(merged / model, order, axis=1)
  for k in range(columns):
    np.testing.assert_allclose(scale[stays[:, k], k], 1 / share[k], rtol=1e-5)


def test_della_without_a_window_is_dare():
  draw = np.random.default_rng(4).normal
  base, *models = (draw(size=(20, 25)).astype(np.float32) for _ in range(3))
  for kind in ('linear', 'ties'):
    dare = streamed(f'dare.{kind}', base, models, density=0.3)
    della = streamed(f'della.{kind}', base, models, density=0.3, epsilon=0.0)
    assert dare.tobytes() == della.tobytes()


def test_what_drops_nothing_is_task_arithmetic():
  draw = np.random.default_rng(4).normal
  base, *models = (draw(size=(20, 25)).astype(np.float32) for _ in range(3))
  numbers = {'weights': [0.7, -0.4], 'scale': 0.8}
  found = streamed('task_arithmetic', base, models, **numbers)
  for name, more in (
    ('dare', {}),
    ('della', {'epsilon': 0.0}),
    ('breadcrumbs', {}),
  ):
    other = streamed(
      f'{name}.linear', base, models, density=1.0, **more, **numbers
    )
    assert found.tobytes() == other.tobytes()
  # Where all signs agree, the elected mean is the mean.
  positive = [base + abs(model) for model in models]
  np.testing.assert_allclose(
    streamed('ties', base, positive, density=1.0),
    streamed('linear', base, positive),
    atol=1e-6,
  )


def test_rows_of_one_item_have_the_density():
  column = np.ones((500, 1), np.float32)
  merged = streamed('della.linear', 0 * column, [column], density=0.4)
  assert set(np.unique(merged)) == {0, np.float32(2.5)}


def test_ranks_are_those_of_a_stable_sort():
  x = abs(np.random.default_rng(0).normal(size=(3, 5, 700)))
  x = x.astype(ml_dtypes.bfloat16).astype(np.float32)  # many are equal
  x[0, 0, ::3], x[1] = 0, np.float32(1e-42)
  order = x.argsort(axis=-1, stable=True)
  np.testing.assert_array_equal(arrays.ranks(x), order.argsort(axis=-1))
  np.testing.assert_array_equal(
    arrays.ranks(x[0]), arrays.ranks(jnp.asarray(x[0]))
  )


def test_importance_is_accurate_where_changes_are_small():
  draw = np.random.default_rng(5).normal
  base = draw(size=(30, 64)).astype(np.float32)
  for size in (1e-4, 1e-2, 1.0, 10.0):
    model = (base + size * draw(size=base.shape)).astype(np.float32)
    (found,) = arcee_fusion.importance(base, [model])
    np.testing.assert_allclose(found, importance(base, model), rtol=2e-5)


def test_arcee_fusion_takes_a_share_and_the_rest_is_the_base():
  draw = np.random.default_rng(6).normal
  base = draw(size=(60, 64)).astype(np.float32)
  model = (base + 1e-3 * draw(size=base.shape)).astype(np.float32)
  merged = streamed('arcee_fusion', base, [model])
  taken = merged != base
  assert 0.02 < taken.mean() < 0.3
  assert (merged[taken] == model[taken]).all()


def test_model_stock_by_hand():
  base = np.zeros((1, 3), np.float32)
  models = [np.float32([[1, 0, 0]]), np.float32([[0.6, 0.8, 0]])]
  merged = streamed('model_stock', base, models)
  t = 2 * 0.6 / 1.6
  np.testing.assert_allclose(merged, t * np.mean(models, axis=0), rtol=1e-6)
  apart = [models[0], -models[1]]
  assert not streamed('model_stock', base, apart).any()


def test_model_stock_is_the_centre_of_noise():
  # Models are a centre and noise: the merge is nearer to it than their mean.
  draw = np.random.default_rng(7).normal
  shape = (60, 64)
  base = draw(size=shape).astype(np.float32)
  centre = base + 0.01 * draw(size=shape)
  models = [
    (centre + 0.02 * draw(size=shape)).astype(np.float32) for _ in range(3)
  ]
  merged = streamed('model_stock', base, models)
  away = np.linalg.norm(merged - centre)
  assert away < 0.85 * np.linalg.norm(np.mean(models, axis=0) - centre)


def test_karcher_mean_is_where_the_directions_cancel():
  units = np.eye(4, dtype=np.float32).reshape(4, 2, 2)[:3]
  merged = streamed('karcher', units[0], list(2 * units))
  np.testing.assert_allclose(merged.ravel(), [2 / 3**0.5] * 3 + [0], 1e-6)


@pytest.mark.parametrize('way', [streamed, compiled])
def test_karcher_iterates_until_it_has_the_mean(way):
  draw = np.random.default_rng(9).normal
  models = [draw(size=(5, 6)).astype(np.float32) for _ in range(4)]
  for weights in (None, [3.0, 1.0, 0.5, 2.0]):
    found = way('karcher', models[0], models, weights=weights)
    exact = references.karcher(None, models, weights)
    # Far apart, directions pull by angles of which float32 has six digits.
    np.testing.assert_allclose(found, exact, atol=1e-6 * abs(exact).max() * 2)
    once = references.sphere(np.float64(models), weights, 1)
    assert abs(once - exact).max() > 1e-4


def test_multislerp_of_two_is_slerp_for_equal_norms():
  draw = np.random.default_rng(8).normal
  base, a, b = (draw(size=(10, 12)) for _ in range(3))
  b *= np.linalg.norm(a) / np.linalg.norm(b)
  models = [np.float32(base + a), np.float32(base + b)]
  base = np.float32(base)
  found = streamed('multislerp', base, models, weights=[0.7, 0.3])
  np.testing.assert_allclose(
    found, streamed('slerp', base, models, t=0.3), atol=3e-6
  )


def test_ram_keeps_unique_changes_whole():
  base = np.ones((1, 4), np.float32)
  steps = np.float32([[0.5, 0.5, 0, 0], [0, 1.5, 1, 0]])
  models = [base + step for step in steps]
  merged = streamed('ram', base, models)
  np.testing.assert_allclose(merged - base, [[0.5, 1, 1, 0]])
  # One shared and one unique item each: 1 + 0.5 min(0.6, 1).
  merged = streamed('ram_plus', base, models, r=0.5, alpha=0.6)
  np.testing.assert_allclose(merged - base, [[0.65, 1, 1.3, 0]], rtol=1e-6)
