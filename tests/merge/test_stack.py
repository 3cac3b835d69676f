"""Layers of several models on top of each other."""

import dataclasses

import numpy as np
import pytest

from alignjax import api
from alignjax.core import naming
from alignjax.core.errors import UserError
from alignjax.interop import convert
from alignjax.interop.open import open as open_model
from alignjax.merge import stack
from alignjax.models.config import to_json
from alignjax.models.gemma import gemma
from alignjax.models.shapes import shapes
from alignjax.system import model_dir

CONFIG = gemma(
  family='gemma2',
  vocab_size=64,
  width=8,
  hidden=12,
  layers=4,
  heads=2,
  kv_heads=1,
  head_dim=4,
  window=4,
)


@pytest.fixture
def models(tmp_path):
  out = []
  for seed in range(2):
    draw = np.random.default_rng(seed).normal
    weights = {
      name: draw(size=x.shape).astype('f4') / 4
      for name, x in shapes(CONFIG).items()
    }
    path = tmp_path / str(seed)
    params = {'policy': naming.nested(weights)}
    model_dir.write(path, config=to_json(CONFIG), params=params, provenance={})
    out.append(open_model(path))
  return out


@pytest.mark.parametrize('to', ['alignjax', 'hf'])
def test_layers_lie_where_they_were_put(models, tmp_path, to):
  a, b = models
  of = stack.spans(['0:0:2', '1:1:4', '0:3:4'])
  found = stack.stacked(a, models, of)
  assert found.config.layers == 6
  # b's layer 1 is global, where the cycle would have a local one.
  kinds = [CONFIG.kind(i) for i in (0, 1, 1, 2, 3, 3)]
  assert [found.config.kind(i) for i in range(6)] == kinds
  convert.run(convert.plan(found, tmp_path / 'out', to=to))
  written = open_model(tmp_path / 'out')
  assert [written.config.kind(i) for i in range(6)] == kinds
  for name, (model, leaf) in {
    'embedding': (a, 'embedding'),
    'final_norm': (a, 'final_norm'),
    'layer_1/attn/q': (a, 'layer_1/attn/q'),
    'layer_2/attn/q': (b, 'layer_1/attn/q'),
    'layer_4/ffw/up': (b, 'layer_3/ffw/up'),
    'layer_5/ffw/up': (a, 'layer_3/ffw/up'),
  }.items():
    np.testing.assert_array_equal(written.load(name), model.load(leaf))
  model = api.load(tmp_path / 'out')
  assert np.isfinite(api.apply(model, np.ones((1, 5), np.int32))).all()


def test_the_whole_model_is_itself(models):
  a, _ = models
  found = stack.stacked(a, [a], stack.spans(['0:0:4']))
  assert found.config == a.config
  assert found.leaves == a.leaves


@pytest.mark.parametrize(
  ('texts', 'message'),
  [
    ([], 'needs --layers'),
    (['0-4'], "'0-4': expected MODEL:START:STOP"),
    (['2:0:1'], 'no model number 2; there are 2'),
    (['0:2:2'], 'has layers 0 to 3'),
    (['1:0:5'], 'has layers 0 to 3'),
  ],
)
def test_layers_that_there_are_not(models, texts, message):
  with pytest.raises(UserError, match=message):
    stack.stacked(models[0], models, stack.spans(texts))


def test_other_architectures(models):
  a, b = models
  other = b._replace(config=dataclasses.replace(CONFIG, hidden=16))
  with pytest.raises(UserError, match='hidden is 12 in .* and 16 in'):
    stack.stacked(a, [a, other], stack.spans(['1:0:1']))
