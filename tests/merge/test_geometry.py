import jax
import numpy as np
import pytest

from alignjax.core import naming, tree
from alignjax.interop.open import open as open_model
from alignjax.merge import blocks
from alignjax.merge.geometry import geometry
from alignjax.models.config import to_json
from alignjax.models.gemma import gemma
from alignjax.models.shapes import shapes
from alignjax.system import model_dir

CONFIG = gemma(
  family='gemma2',
  vocab_size=30,
  width=8,
  hidden=12,
  layers=2,
  heads=2,
  kv_heads=1,
  head_dim=4,
)


@pytest.mark.parametrize('items', [2**18, 10])
def test_geometry_is_that_of_the_definitions(tmp_path, monkeypatch, items):
  monkeypatch.setattr(blocks, 'ITEMS', items)
  trees = []
  for seed in range(4):
    draw = np.random.default_rng(seed).normal
    trees.append(
      jax.tree.map(
        lambda x, draw=draw: draw(size=x.shape).astype('f4'),
        naming.nested(shapes(CONFIG)),
      )
    )
    if seed:  # some items have not moved
      here = np.random.default_rng(9 + seed).random
      trees[seed] = jax.tree.map(
        lambda x, y, here=here: np.where(here(x.shape) < 0.3, y, x),
        trees[seed],
        trees[0],
      )
    model_dir.write(
      tmp_path / str(seed),
      config=to_json(CONFIG),
      params={'policy': trees[seed]},
      provenance={},
    )
  base, *models = (open_model(tmp_path / str(seed)) for seed in range(4))
  found = geometry(base, models)
  assert set(found) == {'embedding', 'final_norm', 'layer_0', 'layer_1', 'all'}
  for group, of in found.items():
    vectors = [
      np.concatenate(
        [
          np.ravel(x).astype('f8')
          for name, x in tree.named(one).items()
          if group == 'all' or name.split('/')[0] == group
        ]
      )
      for one in trees
    ]
    deltas = np.array(vectors[1:]) - vectors[0]
    norms = np.linalg.norm(deltas, axis=1)
    np.testing.assert_allclose(of.norms, norms, rtol=1e-5)
    np.testing.assert_allclose(of.weights, np.linalg.norm(vectors[0]), 1e-5)
    cosines = deltas @ deltas.T / np.outer(norms, norms)
    angles = np.degrees(np.arccos(cosines))
    pairs = [angles[0, 1], angles[0, 2], angles[1, 2]]
    np.testing.assert_allclose(of.angles, pairs, atol=1e-2)
    apart = np.linalg.norm(np.subtract(vectors[2], vectors[3]))
    np.testing.assert_allclose(of.distances[2, 3], apart, rtol=1e-5)
    np.testing.assert_allclose(of.distances[0, 1:], norms, rtol=1e-5)
    both = ((deltas > 0).any(0)) & ((deltas < 0).any(0))
    several = (deltas != 0).sum(0) >= 2
    assert (of.moved, of.torn) == (several.sum(), both.sum())
    assert of.conflicts == both.sum() / several.sum()
