"""Presets: every number as published, counted from the trees' own shapes."""

import functools
import math

import pytest

from alignjax.core import lookup, naming
from alignjax.core.errors import UserError
from alignjax.models import preset
from alignjax.models.config import from_json, to_json
from alignjax.models.shapes import shapes
from alignjax.models.sharding import TABLE

# name: layers, width, heads, kv_heads, head_dim, hidden, rows, global layers,
# window, query scale, rope base and scale of global layers
GEMMA = {
  'gemma1-2b': (18, 2048, 8, 1, 256, 16384, 256128, 18, None, 256, 1e4, 1),
  'gemma1-7b': (28, 3072, 16, 16, 256, 24576, 256128, 28, None, 256, 1e4, 1),
  'gemma2-2b': (26, 2304, 8, 4, 256, 9216, 256128, 13, 4096, 256, 1e4, 1),
  'gemma2-9b': (42, 3584, 16, 8, 256, 14336, 256128, 21, 4096, 256, 1e4, 1),
  'gemma2-27b': (46, 4608, 32, 16, 128, 36864, 256128, 23, 4096, 144, 1e4, 1),
  'gemma3-270m': (18, 640, 4, 1, 256, 2048, 262144, 3, 512, 256, 1e6, 1),
  'gemma3-1b': (26, 1152, 4, 1, 256, 6912, 262144, 4, 512, 256, 1e6, 1),
  'gemma3-4b': (34, 2560, 8, 4, 256, 10240, 262144, 5, 1024, 256, 1e6, 8),
  'gemma3-12b': (48, 3840, 16, 8, 256, 15360, 262144, 8, 1024, 256, 1e6, 8),
  'gemma3-27b': (62, 5376, 32, 16, 128, 21504, 262144, 10, 1024, 168, 1e6, 8),
}
# name: layers, width, heads, attention layers, hidden
GRIFFIN = {
  'recurrentgemma-2b': (26, 2560, 10, 8, 7680),
  'recurrentgemma-9b': (38, 4096, 16, 12, 12288),
}
# Parameters as published: embedding and the rest, in units of the last digit.
PRINTED = {
  'gemma1-2b': ('0.52', '1.98', 1e9),
  'gemma1-7b': ('0.79', '7.75', 1e9),
  'gemma2-2b': ('0.59', '2.02', 1e9),
  'gemma2-9b': ('0.92', '8.32', 1e9),
  'gemma2-27b': ('1.18', '26.05', 1e9),
  'gemma3-270m': ('168', '100', 1e6),
  'gemma3-1b': ('302', '698', 1e6),
  'gemma3-4b': ('0.67', '3.21', 1e9),
  'gemma3-12b': ('1.01', '10.76', 1e9),
  'gemma3-27b': ('1.41', '25.60', 1e9),
  'recurrentgemma-2b': ('0.66', '2.03', 1e9),
  'recurrentgemma-9b': ('1.05', '7.53', 1e9),
}


@functools.cache
def leaves_of(name):
  return shapes(preset.SHAPES[name])


def gemma_shapes(name):
  """The tensors of DeepMind's Gemma tree, written out."""
  layers, width, heads, kv, head, hidden, rows, *_ = GEMMA[name]
  out = [(rows, width), (width,)]
  for _ in range(layers):
    if heads == kv:
      out += [(3, heads, width, head)]
    else:
      out += [(heads, width, head), (2, kv, width, head)]
    out += [(heads, head, width), (2, hidden, width), (hidden, width)]
    out += [(width,)] * (2 if name.startswith('gemma1') else 4)
    out += [(head,)] * (2 if name.startswith('gemma3') else 0)
  return out


def griffin_shapes(name):
  """The tensors of DeepMind's RecurrentGemma tree, written out."""
  layers, width, heads, _, hidden = GRIFFIN[name]
  head = width // heads
  out = [(256000, width), (width,)]
  for i in range(layers):
    if i % 3 == 2:
      out += [(width, width), (width, head), (width, head)]
      out += [(width, width), (width,)]
    else:
      out += [(width, width), (width,)] * 3  # x, y, out
      out += [(4, width), (width,), (width,)]  # conv, a_param
      out += [(heads, head, head), (heads, head)] * 2
    out += [(width,), (width,)]
    out += [(2, width, hidden), (2, 1, 1, hidden), (hidden, width), (width,)]
  return out


def test_every_released_model_is_there():
  assert [*preset.SHAPES] == [*GEMMA, *GRIFFIN] == [*PRINTED]


@pytest.mark.parametrize('name', PRINTED)
def test_parameters_are_those_of_the_released_trees(name):
  expected = gemma_shapes(name) if name in GEMMA else griffin_shapes(name)
  leaves = leaves_of(name)
  count = sum(math.prod(leaf.shape) for leaf in leaves.values())
  assert count == sum(map(math.prod, expected))
  assert leaves['embedding'].shape == expected[0]
  embedding, body, unit = PRINTED[name]
  table = math.prod(expected[0])
  for printed, found in ((embedding, table), (body, count - table)):
    digits = len(printed.partition('.')[2])
    assert f'{found / unit:.{digits}f}' == printed


@pytest.mark.parametrize('name', GEMMA)
def test_gemma_numbers(name):
  c = preset.SHAPES[name]
  *_, global_layers, window, scalar, base, factor = GEMMA[name]
  assert c.count('global') == global_layers
  assert c.count('local') == c.layers - global_layers
  assert not c.count('local') or (c.window == c.span == window)
  assert math.isclose(c.query_scale, scalar**-0.5, rel_tol=1e-12)
  assert (c.rope_base, c.rope_base_local, c.rope_scale) == (base, 1e4, factor)
  first, second, third = (name.startswith(f'gemma{n}') for n in (1, 2, 3))
  assert c.attn_softcap == (50 if second else None)
  assert c.final_softcap == (30 if second else None)
  assert (c.qk_norm, c.post_norm) == (third, second or third)
  kinds = [c.kind(i) for i in range(c.layers)]
  if first:
    assert set(kinds) == {'global'}
  else:
    period = 2 if second else 6
    for i, kind in enumerate(kinds):
      assert kind == ('global' if i % period == period - 1 else 'local')
  assert not (c.bias or c.round_embed_scale) and c.rope_fraction == 1


@pytest.mark.parametrize('name', GRIFFIN)
def test_recurrentgemma_numbers(name):
  c = preset.SHAPES[name]
  layers, width, heads, attention, _ = GRIFFIN[name]
  assert (c.count('local'), c.count('recurrent')) == (
    attention,
    layers - attention,
  )
  assert [c.kind(i) for i in (0, 1, 2, layers - 1)] == [
    *('recurrent', 'recurrent', 'local', 'recurrent')
  ]
  assert (c.kv_heads, c.head_dim, c.lru_width) == (1, width // heads, width)
  # DeepMind's rule: 2048 earlier keys and the query's own.
  assert (c.window, c.span, c.conv_width) == (2048, 2049, 4)
  assert (c.rope_base_local, c.rope_fraction) == (1e4, 0.5)
  assert (c.final_softcap, c.attn_softcap) == (30, None)
  assert c.bias and c.round_embed_scale and c.init == 'griffin'
  assert not (c.qk_norm or c.post_norm)


def test_a_config_takes_a_preset_by_name():
  section = lookup.defaults('models', 'preset', shape='gemma3-1b')
  section.dtype = 'bfloat16'
  found = lookup.build('models', section)
  assert found.dtype == 'bfloat16' and found.layers == 26
  assert from_json(to_json(found)) == found
  with pytest.raises(UserError, match="did you mean 'gemma3-12b'"):
    preset.preset(shape='gema3-12b')


@pytest.mark.parametrize(
  'name', ['gemma2-2b', 'gemma3-27b', 'recurrentgemma-2b']
)
def test_the_sharding_table_names_every_leaf(name):
  for leaf, spec in leaves_of(name).items():
    axes = naming.lookup(TABLE, leaf, 'TABLE')
    assert len(axes) == len(spec.shape)
