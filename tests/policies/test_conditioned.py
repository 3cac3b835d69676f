"""Mixed copies of a decoder's leaves: what is copied, ends, and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.core import tree
from alignjax.core.errors import UserError
from alignjax.losses.logprob import token_logp
from alignjax.models import decoder
from alignjax.policies import conditioned, lm
from alignjax.policies.sample import sample
from tests import tiny


def ends_of(copied, **changes):
  """A role whose two copies differ, and its model."""
  model = tiny.model(**changes)
  plain = tiny.bundle(model, 'a')['a']
  role = conditioned.split(plain, 2, copied)
  role['copies']['1'] = jax.tree.map(lambda x: 1.1 * x, role['copies']['1'])
  return model, plain, role


@pytest.mark.parametrize(
  'copied, holds, lacks',
  [
    ('full', 'embedding', 'unembedding'),
    ('attention', 'groups/0/attn/q', 'groups/0/ffw/up'),
    ('logits', 'unembedding', 'embedding'),
    (r'.*/ffw/(up|down)', 'groups/1/ffw/up', 'groups/1/ffw/gate'),
  ],
)
def test_what_is_copied(copied, holds, lacks):
  _, plain, role = ends_of(copied)
  names = set(tree.named(role['copies']['0']))
  assert holds in names and lacks not in names
  shared = set(tree.named(role.get('shared', {})))
  assert shared | (names - {'unembedding'}) == set(tree.named(plain))
  assert not shared & names
  # Every table of names still speaks of them.
  from alignjax.models import sharding

  for name, x in tree.named(role).items():
    assert len(sharding.spec(name, x)) == x.ndim


@pytest.mark.parametrize('copied', ['full', 'attention', 'logits'])
def test_ends_are_plain_models_and_sampler_meets_scorer(copied):
  model, plain, role = ends_of(copied)
  policy = conditioned.conditioned(model.policy, 'policy')
  batch = tiny.batch(4)
  key = jax.random.key(0)

  def drawn(condition):
    rows = batch | {'condition': jnp.tile(jnp.array(condition), (4, 1))}
    weights = policy.view({'policy': role}, rows)
    out = sample(policy, weights, rows, key, count=2, max_new_tokens=5)
    logp = token_logp(policy, weights, rows | out)
    gap = jnp.abs(logp - out['sample_logp']).max()
    assert gap < 1e-4
    return out

  base = model.policy('policy')
  weights = base.view({'policy': plain}, batch)
  expected = sample(base, weights, batch, key, count=2, max_new_tokens=5)
  np.testing.assert_array_equal(
    drawn([1.0, 0.0])['response'], expected['response']
  )
  other = drawn([0.3, 0.7])['sample_logp']
  assert np.abs(other - expected['sample_logp']).max() > 1e-4


def test_mixing_the_last_layer_mixes_logits():
  config = tiny.config(family='gemma1')  # without a soft cap
  policy = conditioned.conditioned(lambda role: lm.lm(config, role), 'policy')
  plain = decoder.init(config, jax.random.key(0))
  role = conditioned.split(plain, 2, 'logits')
  role['copies']['1'] = jax.tree.map(jnp.flip, role['copies']['1'])

  def logits(condition):
    batch = tiny.batch(2) | {
      'condition': jnp.tile(jnp.array(condition), (2, 1))
    }
    return policy.start(policy.view({'policy': role}, batch), batch, 12)[0]

  mixed = 0.3 * logits([1.0, 0.0]) + 0.7 * logits([0.0, 1.0])
  np.testing.assert_allclose(logits([0.3, 0.7]), mixed, atol=2e-5)


def test_no_such_leaf():
  model = tiny.model()
  plain = tiny.bundle(model, 'a')['a']
  with pytest.raises(UserError, match="'attn': no leaf has such a name"):
    conditioned.split(plain, 2, 'attn')
  with pytest.raises(UserError, match='are one stack'):
    conditioned.split(
      tiny.bundle(tiny.model(layers=4), 'a')['a'], 2, 'layer_0/.*'
    )
