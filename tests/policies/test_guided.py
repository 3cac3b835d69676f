"""Guidance: one policy on two prompts, in full passes and step by step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.core.errors import UserError
from alignjax.losses.logprob import token_logp
from alignjax.models.recurrentgemma import recurrentgemma
from alignjax.policies import lm
from alignjax.policies.combine import (
  ILLEGAL,
  guided,
  restrict,
  tempered,
  under_guidance,
)
from alignjax.policies.sample import sample
from tests import tiny

MODEL = tiny.model()
RECURRENT = recurrentgemma(
  vocab_size=272, width=32, hidden=48, layers=3, heads=2, window=8
)
BUNDLE = tiny.bundle(MODEL, 'policy')


def batch_of(rows=4, **fields):
  batch = tiny.batch(rows)
  uncond = np.zeros(batch['prompt'].shape, np.int32)
  for i, row in enumerate(uncond):  # a negative prompt of its own for each
    row[-2 - i :] = [tiny.TOKENS.bos, *range(70, 71 + i)]
  return batch | {'uncond': jnp.asarray(uncond)} | fields


def draw(policy, batch, *, count=3, length=20, model=MODEL, bundle=BUNDLE):
  return jax.jit(
    lambda batch: sample(
      policy,
      policy.view(bundle, batch),
      batch,
      jax.random.key(0),
      count=count,
      max_new_tokens=length,
      stop=model.stop,
      pad=model.pad,
    )
  )(batch)


def full(policy, batch, bundle=BUNDLE):
  """Logits of a full pass over the responses, [B, N, R, V]."""

  @jax.jit
  def run(bundle, batch):
    weights = policy.view(bundle, batch)
    return policy.head(weights, policy.features(weights, batch)[0])

  return run(bundle, batch)


def stepped(policy, batch, bundle=BUNDLE):
  """The same logits, one cached step after the other."""
  weights = policy.view(bundle, batch)
  rows, count, length = batch['response'].shape
  width = batch['prompt'].shape[1]
  logits, cache = policy.start(weights, batch, width + length)
  repeated = jnp.repeat(jnp.arange(rows), count)
  found, cache = [logits[repeated]], policy.take(cache, repeated)
  step = jax.jit(policy.step)
  for t in range(length - 1):
    tokens = batch['response'][:, :, t].reshape(-1)
    logits, cache = step(weights, cache, tokens)
    found.append(logits)
  return jnp.stack(found, axis=1).reshape(rows, count, length, -1)


@pytest.mark.parametrize('family', ['gemma2', 'recurrentgemma'])
@pytest.mark.parametrize('scale', [0.0, 1.0, 3.0, -0.5])
def test_steps_are_the_full_pass_is_the_formula(scale, family):
  model, bundle = MODEL, BUNDLE
  if family == 'recurrentgemma':
    model = lm.model(RECURRENT, tiny.TOKENS)
    bundle = tiny.bundle(model, 'policy')
  bare = model.bare('policy')
  batch = batch_of()
  batch |= draw(
    model.policy('policy'), batch, length=16, model=model, bundle=bundle
  )
  policy = guided(bare, scale)
  cond = full(bare, batch, bundle)
  uncond = full(bare, batch | {'prompt': batch['uncond']}, bundle)
  expected = scale * cond + (1 - scale) * uncond
  np.testing.assert_allclose(full(policy, batch, bundle), expected, atol=2e-5)
  found = stepped(policy, batch, bundle)
  mask = np.asarray(batch['mask'])
  np.testing.assert_allclose(found[mask], expected[mask], atol=5e-5)
  assert np.abs(cond - uncond).max() > 0.1
  if scale in (0, 1):
    plain = cond if scale else uncond
    np.testing.assert_allclose(full(policy, batch, bundle), plain, atol=1e-5)
  # The equation's normalised form: the same distribution.
  logp = scale * jax.nn.log_softmax(cond) + (1 - scale) * jax.nn.log_softmax(
    uncond
  )
  np.testing.assert_allclose(
    jax.nn.softmax(found)[mask], jax.nn.softmax(logp)[mask], atol=2e-5
  )


def test_sampler_and_scorer_agree():
  batch = batch_of(8)
  for temperature in (1.0, 0.7):
    policy = under_guidance(MODEL, 'policy', 3.0)
    policy = tempered(policy, temperature)
    out = draw(policy, batch)
    scored = token_logp(policy, policy.view(BUNDLE, batch), batch | out)
    gap = np.abs(np.where(out['mask'], scored - out['sample_logp'], 0)).max()
    assert gap < 1e-4
    drawn = np.asarray(out['response'])[np.asarray(out['mask'])]
    assert len(drawn) > 100 and not set(drawn) & set(tiny.TOKENS.illegal)


@pytest.mark.parametrize('scale, field', [(1.0, 'prompt'), (0.0, 'uncond')])
def test_the_ends_draw_what_the_plain_policy_draws(scale, field):
  batch = batch_of()
  policy = MODEL.legal(guided(MODEL.bare('policy'), scale))
  plain = batch | {'prompt': batch[field]}
  np.testing.assert_array_equal(
    draw(policy, batch)['response'],
    draw(MODEL.policy('policy'), plain)['response'],
  )


def test_masks_go_outermost():
  batch = batch_of()
  batch |= draw(MODEL.policy('policy'), batch, length=3)
  bare = MODEL.bare('policy')
  assert float(full(guided(bare, 3.0), batch).min()) > -1e3
  outside = full(restrict(guided(bare, 3.0), [5]), batch)
  assert (np.asarray(outside)[..., 5] == ILLEGAL).all()
  assert np.isfinite(outside).all()
  # Inside a difference, an id that only one part masks would be certain.
  without = batch | {'prompt': batch['uncond']}
  inside = full(restrict(bare, [5]), without)
  wrong = jax.nn.softmax(3 * full(bare, batch) - 2 * inside)
  assert float(wrong[..., 5].min()) == 1


def test_prompts_must_come_in_pairs():
  policy = guided(MODEL.bare('policy'), 3.0)
  with pytest.raises(UserError, match='found {.prompt.: .4, 12.}'):
    draw(policy, tiny.batch(4))
  narrow = tiny.batch(4) | {'uncond': jnp.ones((4, 3), jnp.int32)}
  with pytest.raises(UserError, match='of one width'):
    draw(policy, narrow)
