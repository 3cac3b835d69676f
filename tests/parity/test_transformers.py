"""Our numbers against those of transformers, through `aj.load` and `aj.apply`.

Tiny random models of every family it has; `tests/golden` holds what it
computed. The window of its RecurrentGemma counts the query's own key, which
that of the released weights' own code does not: here the config says so.
"""

import dataclasses

import jax
import numpy as np
import pytest

import alignjax as aj
from tests.parity import golden

FAMILIES = ['gemma1', 'gemma2', 'gemma3', 'recurrentgemma']
ATTENTION_ONLY = FAMILIES[:3]


def load(folder):
  return aj.load(folder, window_self=True)


@pytest.fixture(scope='module')
def models(tmp_path_factory):
  """Family -> the model, loaded from a directory of the peer's format."""
  folder = tmp_path_factory.mktemp('hugging_face')

  def one(family):
    found = golden.read(family)
    return load(golden.hugging_face(folder / family, found, found.tensors))

  return {family: one(family) for family in FAMILIES}


@pytest.mark.parametrize('family', FAMILIES)
def test_logits(models, family):
  golden.check_plain(models[family], golden.read(family))


# RecurrentGemma's are left out: there, transformers lets earlier documents
# and pads reach the convolution and the state.
@pytest.mark.parametrize('family', ATTENTION_ONLY)
def test_packed_documents(models, family):
  golden.check_packed(models[family], golden.read(family))


@pytest.mark.parametrize('family', ATTENTION_ONLY)
def test_padded_rows(models, family):
  golden.check_padded(models[family], golden.read(family))


@pytest.mark.parametrize('family', FAMILIES)
def test_gradients(models, family, tmp_path):
  found = golden.read(family)
  folder = golden.hugging_face(tmp_path / 'gradient', found, found.gradients)
  golden.check_gradient(models[family], found, load(folder))


@pytest.mark.parametrize('family', FAMILIES)
def test_greedy_continuations(models, family):
  golden.check_greedy(models[family], golden.read(family))


@pytest.mark.parametrize('family', FAMILIES)
def test_a_directory_of_ours_computes_the_same(models, family, tmp_path):
  aj.save(models[family], tmp_path / 'ours')
  tokens = golden.read(family).data['plain/tokens']
  np.testing.assert_array_equal(
    aj.apply(aj.load(tmp_path / 'ours'), tokens),
    aj.apply(models[family], tokens),
  )


# Each of these is a mistake that the comparison above must be able to see.
@pytest.mark.parametrize(
  'family, changes',
  [
    ('gemma2', dict(window_self=False)),
    ('gemma3', dict(window_self=False)),
    ('recurrentgemma', dict(window_self=False)),
    ('gemma2', dict(attn_softcap=None)),
    ('gemma2', dict(final_softcap=None)),
    ('gemma2', dict(query_scale=8**-0.5)),
    ('gemma2', dict(pattern=('global', 'local'))),
    ('gemma3', dict(rope_scale=1.0)),
    ('gemma3', dict(rope_base=10_000.0)),
    ('recurrentgemma', dict(rope_fraction=1.0)),
    ('recurrentgemma', dict(round_embed_scale=False)),
  ],
)
def test_a_wrong_number_is_seen(models, family, changes):
  model, found = models[family], golden.read(family)
  wrong = model._replace(config=dataclasses.replace(model.config, **changes))
  logits = aj.apply(wrong, found.data['plain/tokens'])
  assert golden.differs(logits, found.data['plain/logits']) > 1e-3


@pytest.mark.parametrize('family', FAMILIES)
def test_bfloat16_stays_close(models, family):
  model, found = models[family], golden.read(family)
  config = dataclasses.replace(model.config, dtype='bfloat16')
  rough = aj.apply(model._replace(config=config), found.data['plain/tokens'])
  exact = found.data['plain/logits']
  p, q = jax.nn.log_softmax(exact), jax.nn.log_softmax(rough)
  kl = np.sum(np.exp(p) * (p - q), axis=-1)
  assert kl.mean() < 1e-3 and kl.max() < 1e-2
  # Where the likeliest token leads clearly, it stays the likeliest.
  second, first = np.sort(exact, axis=-1)[..., -2:].transpose(2, 0, 1)
  clear = first - second > 0.1
  same = np.argmax(rough, axis=-1) == np.argmax(exact, axis=-1)
  assert clear.mean() > 0.5 and same[clear].all()
