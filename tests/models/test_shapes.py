"""The written table of shapes against what the modules declare when traced."""

import dataclasses

import jax
import pytest

from alignjax.core import tree
from alignjax.models import decoder, preset
from alignjax.models.shapes import shapes


def _traced(config):
  found = jax.eval_shape(
    lambda key: decoder.canonical(decoder.init(config, key)),
    jax.eval_shape(lambda: jax.random.key(0)),
  )
  return tree.named(found)


@pytest.mark.parametrize('name', preset.SHAPES)
def test_table_is_what_the_modules_declare(name):
  config = dataclasses.replace(preset.SHAPES[name], layers=8)
  for biased in (False, True):
    config = dataclasses.replace(config, bias=biased)
    written, traced = shapes(config), _traced(config)
    assert list(written) == list(traced)
    for leaf, spec in written.items():
      assert (spec.shape, spec.dtype) == (
        traced[leaf].shape,
        traced[leaf].dtype,
      ), leaf


def test_every_number_of_the_table_is_its_own():
  # No two sizes are equal, so that none can stand for another.
  config = dataclasses.replace(
    preset.SHAPES['gemma3-1b'],
    **dict(vocab_size=101, width=14, hidden=22, layers=5, heads=6, kv_heads=2),
    **dict(head_dim=10, bias=True, lru_width=18, conv_width=3),
    pattern=('recurrent', 'local', 'global'),
  )
  written, traced = shapes(config), _traced(config)
  assert {n: x.shape for n, x in written.items()} == {
    n: x.shape for n, x in traced.items()
  }
