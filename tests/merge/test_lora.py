"""Adapters cut out of fine-tunes, and folded back."""

import json

import jax
import numpy as np
import pytest

from alignjax.core import naming
from alignjax.core.errors import UserError
from alignjax.interop import convert
from alignjax.interop.open import open as open_model
from alignjax.merge import lora
from alignjax.models.config import to_json
from alignjax.models.gemma import gemma
from alignjax.models.shapes import shapes
from alignjax.system import model_dir

CONFIG = gemma(
  family='gemma2',
  vocab_size=64,
  width=24,
  hidden=40,
  layers=2,
  heads=2,
  kv_heads=1,
  head_dim=8,
)


def write(path, weights):
  params = {'policy': naming.nested(weights)}
  model_dir.write(path, config=to_json(CONFIG), params=params, provenance={})
  return open_model(path)


@pytest.fixture
def base(tmp_path):
  draw = np.random.default_rng(0).normal
  weights = {
    name: draw(size=x.shape).astype('f4') for name, x in shapes(CONFIG).items()
  }
  return write(tmp_path / 'base', weights), weights


def tuned(weights, rank, seed=1):
  """The weights with a product of that rank on every linear map."""
  draw = np.random.default_rng(seed).normal
  out = dict(weights)
  for name, x in weights.items():
    if x.ndim > 1 and name != 'embedding':
      matrix = lora.inputs.outputs_first(name, x)
      rows, columns = matrix.shape
      step = draw(size=(rows, rank)) @ draw(size=(rank, columns)) / 10
      matrix = matrix + step.astype('f4')
      out[name] = np.ascontiguousarray(
        lora.inputs.stored_again(name, matrix, x.shape)
      )
  return out


def contents(opened):
  return {name: opened.load(name) for name in opened.leaves}


@pytest.mark.parametrize('kind', ['alignjax', 'hf'])
def test_what_has_the_rank_comes_back(base, tmp_path, kind):
  first, weights = base
  model = write(tmp_path / 'model', tuned(weights, 3))
  if kind == 'hf':
    for name in ('base', 'model'):
      plan = convert.plan(
        open_model(tmp_path / name), tmp_path / f'{name}_hf', to='hf'
      )
      convert.run(plan)
    first, model = (open_model(tmp_path / f'{x}_hf') for x in ('base', 'model'))
  kept = lora.extract(first, model, tmp_path / 'adapter', rank=3)
  assert len(kept.energy) == 14 and kept.lost == []
  np.testing.assert_allclose([*kept.energy.values()], 1, atol=1e-6)
  facts = json.loads((tmp_path / 'adapter' / lora.CONFIG).read_text())
  assert facts['r'] == facts['lora_alpha'] == 3
  assert 'q_proj' in facts['target_modules']
  folded = lora.folded(first, tmp_path / 'adapter')
  expected = contents(model)
  for name, x in contents(folded).items():
    np.testing.assert_allclose(x, expected[name], atol=2e-5)
  convert.run(convert.plan(folded, tmp_path / 'out', to='alignjax'))
  assert open_model(tmp_path / 'out').leaves.keys() == first.leaves.keys()


def test_a_lower_rank_is_the_best_there_is(base, tmp_path):
  first, weights = base
  model = write(tmp_path / 'model', tuned(weights, 6))
  kept = lora.extract(first, model, tmp_path / 'adapter', rank=2)
  found = contents(lora.folded(first, tmp_path / 'adapter'))
  for name in kept.energy:
    old, new, near = (
      lora.inputs.outputs_first(name, x[name]).astype('f8')
      for x in (weights, contents(model), found)
    )
    s = np.linalg.svd(new - old, compute_uv=False) ** 2
    assert kept.energy[name] == pytest.approx(s[:2].sum() / s.sum(), abs=1e-5)
    left = np.sum((new - near) ** 2)
    assert left == pytest.approx(s[2:].sum(), rel=1e-3)


def test_the_randomised_factors_are_nearly_the_best():
  draw = np.random.default_rng(2).normal
  s = 0.9 ** np.arange(200.0)
  u, v = (np.linalg.qr(draw(size=(n, 200)))[0] for n in (300, 400))
  delta = ((u * s) @ v.T).astype('f4')
  b, a = lora.factors(delta, 8)
  best = np.sqrt(np.sum(s[8:] ** 2))
  assert np.linalg.norm(delta - b @ a) < 1.001 * best
  again = lora.factors(delta, 8)
  np.testing.assert_array_equal(b, again[0])
  # Scaled alike: neither factor is out of the range of the other.
  np.testing.assert_allclose(
    np.linalg.norm(b, axis=0), np.linalg.norm(a, axis=1), rtol=1e-4
  )


def test_what_has_no_adapter_is_told(base, tmp_path):
  first, weights = base
  moved = tuned(weights, 1)
  moved['final_norm'] = moved['final_norm'] + 1
  model = write(tmp_path / 'model', moved)
  kept = lora.extract(
    first, model, tmp_path / 'adapter', rank=30, leaves=r'layer_0/attn/[qk]'
  )
  assert set(kept.energy) == {'layer_0/attn/k', 'layer_0/attn/q'}
  assert 'final_norm' in kept.lost and 'layer_1/ffw/up' in kept.lost
  assert kept.energy['layer_0/attn/k'] == pytest.approx(1)  # 8 x 24 is whole


def changed(path, **facts):
  file = path / lora.CONFIG
  file.write_text(json.dumps(json.loads(file.read_text()) | facts))


def test_bad_adapters_are_refused(base, tmp_path):
  first, weights = base
  model = write(tmp_path / 'model', tuned(weights, 1))
  path = tmp_path / 'adapter'
  with pytest.raises(UserError, match='rank = 0'):
    lora.extract(first, model, path, rank=0)
  with pytest.raises(UserError, match="matches 'x'"):
    lora.extract(first, model, path, rank=1, leaves='x')
  assert not path.exists()
  lora.extract(first, model, path, rank=2)
  with pytest.raises(UserError, match='exists already'):
    lora.extract(first, model, path, rank=2)
  for facts, message in (
    ({'use_dora': True}, 'use_dora adapters are not folded'),
    ({'peft_type': 'IA3'}, "'IA3' is no LORA"),
    ({'r': 4}, r'q_proj is .*expected \[16, 4\] x \[4, 24\]'),
    ({'rank_pattern': {'q': 3}}, 'ranks must be one'),
  ):
    before = (path / lora.CONFIG).read_text()
    changed(path, **facts)
    with pytest.raises(UserError, match=message):
      lora.folded(first, path)
    (path / lora.CONFIG).write_text(before)
  changed(path, lora_alpha=1)  # half as much
  half = contents(lora.folded(first, path))['layer_0/ffw/up']
  middle = (weights['layer_0/ffw/up'] + contents(model)['layer_0/ffw/up']) / 2
  np.testing.assert_allclose(half, middle, atol=1e-5)
  assert jax.tree.leaves(half)[0].dtype == np.float32
