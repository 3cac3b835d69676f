"""Our numbers against those of DeepMind's own recurrentgemma package.

Its rules are the released weights': a query sees W earlier keys and itself,
and neither convolution nor state crosses a document's start. The trees carry
no numbers, so a tiny model's window and cap are said here.
"""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

import alignjax as aj
from alignjax.models import decoder, recurrent
from tests.parity import golden

NAME = 'recurrentgemma_deepmind'


def load(folder):
  model = aj.load(folder)
  config = dataclasses.replace(model.config, window=8, final_softcap=3.0)
  return model._replace(config=config)


@pytest.fixture(scope='module')
def model(tmp_path_factory):
  folder = tmp_path_factory.mktemp('deepmind') / 'tree'
  found = golden.read(NAME)
  return load(golden.deepmind(folder, found, found.tensors))


def test_the_tree_tells_the_rest(model):
  numbers = golden.read(NAME).facts['config']
  assert not model.config.window_self and model.config.round_embed_scale
  assert model.config.lru_width == numbers['lru_width']
  assert model.config.hidden == numbers['mlp_expanded_width']
  kinds = [model.config.kind(i)[0] for i in range(model.config.layers)]
  assert kinds == ['r', 'r', 'l', 'r']


def test_logits(model):
  golden.check_plain(model, golden.read(NAME))


def test_packed_documents(model):
  golden.check_packed(model, golden.read(NAME))


def test_left_padded_rows(model):
  golden.check_padded(model, golden.read(NAME))


def test_gradients(model, tmp_path):
  found = golden.read(NAME)
  folder = golden.deepmind(tmp_path / 'gradient', found, found.gradients)
  golden.check_gradient(model, found, load(folder))


def test_greedy_continuations(model):
  golden.check_greedy(model, golden.read(NAME))


def test_the_other_window_is_seen(model):
  found = golden.read(NAME)
  config = dataclasses.replace(model.config, window_self=True)
  logits = aj.apply(model._replace(config=config), found.data['plain/tokens'])
  assert golden.differs(logits, found.data['plain/logits']) > 1e-3


@pytest.mark.parametrize('part', ['convolution', 'state', 'attention'])
def test_a_document_that_leaks_is_seen(model, part, monkeypatch):
  # Each mistake alone must be far outside of what the comparison allows.
  data = golden.read(NAME).data
  position, segment = data['packed/position'], data['packed/segment']
  if part == 'convolution':
    right = recurrent.conv

    def conv(x, w, b, position, history=None):
      # From position 3 on, no tap is left out.
      return right(x, w, b, position + len(w) - 1, history)

    monkeypatch.setattr(recurrent, 'conv', conv)
  elif part == 'state':
    right = recurrent.rg_lru

    def rg_lru(u, i, a, p, position, *rest, **options):
      column = jnp.arange(u.shape[1])
      position = jnp.where(column == 0, position, position + 1)
      return right(u, i, a, p, position, *rest, **options)

    monkeypatch.setattr(recurrent, 'rg_lru', rg_lru)
  else:
    segment = jnp.ones_like(segment)

  @jax.jit
  def run(params):
    params = decoder.stacked(model.config, params)
    return decoder.apply(
      model.config, params, data['packed/tokens'], position, segment
    )

  logits = run(model.params)
  assert golden.differs(logits, data['packed/logits']) > 1e-3
