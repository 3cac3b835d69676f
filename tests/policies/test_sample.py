"""Sampling: scores agree with the scorer, prompts share prefill, rows stop."""

import jax
import jax.numpy as jnp
import numpy as np

from alignjax.losses.logprob import token_logp
from alignjax.policies.combine import restrict, sampled, tempered
from alignjax.policies.sample import advance, begin, sample
from tests import tiny

MODEL = tiny.model()
BUNDLE = tiny.bundle(MODEL, 'policy')
WEIGHTS = MODEL.policy('policy').view(BUNDLE, {})


def draw(batch, *, policy=None, count=3, length=20, seed=0, **changes):
  policy = policy or MODEL.policy('policy')
  options = dict(stop=MODEL.stop, pad=MODEL.pad) | changes
  run = jax.jit(
    lambda batch: sample(
      policy,
      policy.view(BUNDLE, batch),
      batch,
      jax.random.key(seed),
      count=count,
      max_new_tokens=length,
      **options,
    )
  )
  return run(batch)


def test_sampler_and_scorer_agree():
  for temperature in (1.0, 0.7):
    policy = tempered(MODEL.policy('policy'), temperature)
    batch = tiny.batch()
    out = draw(batch, policy=policy)
    scored = token_logp(policy, WEIGHTS, batch | out)
    gap = np.abs(np.where(out['mask'], scored - out['sample_logp'], 0)).max()
    assert gap < 1e-4
    assert out['mask'].sum() > 100


def kept_by_sorting(logits, top_k, top_p):
  """The likeliest tokens, token by token."""
  order = np.argsort(-logits, kind='stable')[: top_k or None]
  probs = np.exp(logits[order] - logits.max())
  before = np.cumsum(probs) - probs
  return set(order[before < top_p * probs.sum()])


def test_truncation_keeps_the_likeliest_tokens():
  logits = np.random.default_rng(0).normal(size=(64, 500)) * 3
  for top_k, top_p in [(1, 1.0), (40, 1.0), (0, 0.5), (0, 0.99), (40, 0.8)]:
    policy = sampled(
      MODEL.policy('policy'), temperature=1.0, top_k=top_k, top_p=top_p
    )
    found = policy.limit(jnp.asarray(logits, jnp.float32), None)
    for row, limited in zip(logits, np.asarray(found)):
      assert set(np.flatnonzero(limited > -1e8)) == kept_by_sorting(
        row, top_k, top_p
      )


def test_truncation_at_the_ends():
  ties = jnp.log(jnp.array([[0.25, 0.25, 0.25, 0.125, 0.125]]))
  for numbers, count in [
    (dict(top_p=1e-6), 3),  # as likely as the last of them
    (dict(top_k=2), 3),
    (dict(top_p=0.8), 5),
    (dict(top_k=9, top_p=1.0), 5),
  ]:
    policy = sampled(MODEL.policy('policy'), temperature=1.0, **numbers)
    assert (policy.limit(ties, None) > -1e8).sum() == count
  policy = sampled(MODEL.policy('policy'), temperature=1.0, top_k=1)
  kept = policy.limit(jnp.array([[3.0, 2.0, 1.0]]), jnp.array([2]))
  np.testing.assert_array_equal(kept[0] > -1e8, [True, False, True])
  whole = sampled(MODEL.policy('policy'), temperature=0.7)
  assert whole.limit is MODEL.policy('policy').limit


def test_sampler_and_scorer_agree_on_what_is_truncated():
  for numbers in (dict(top_k=5), dict(top_p=0.6), dict(top_k=50, top_p=0.9)):
    policy = sampled(MODEL.policy('policy'), temperature=0.8, **numbers)
    batch = tiny.batch()
    out = draw(batch, policy=policy, count=4)
    scored = token_logp(policy, WEIGHTS, batch | out)
    gap = np.abs(np.where(out['mask'], scored - out['sample_logp'], 0))
    # Rounding may have the last token of a nucleus in one and not in the other.
    assert (gap > 1e-4).sum() <= 1 and gap.max() < 0.02
    plain = token_logp(MODEL.policy('policy'), WEIGHTS, batch | out)
    assert (np.asarray(scored - plain)[np.asarray(out['mask'])] > 0.1).any()
  few = draw(
    tiny.batch(),
    policy=sampled(MODEL.policy('policy'), temperature=1.0, top_k=1),
    count=8,
  )['response']
  np.testing.assert_array_equal(few, few[:, :1].repeat(8, 1))


def test_illegal_tokens_never_appear_and_carry_no_mass():
  out = draw(tiny.batch(), count=16)
  drawn = np.asarray(out['response'])[np.asarray(out['mask'])]
  assert not set(drawn) & set(tiny.TOKENS.illegal)
  assert drawn.max() < tiny.TOKENS.size
  policy = MODEL.policy('policy')
  logits, _ = policy.start(WEIGHTS, tiny.batch(), 20)
  probs = jax.nn.softmax(logits)
  illegal = [*tiny.TOKENS.illegal, *range(tiny.TOKENS.size, 272)]
  assert float(probs[:, jnp.array(illegal)].max()) == 0.0
  np.testing.assert_allclose(probs.sum(-1), 1, rtol=1e-5)


def test_a_prompts_responses_do_not_depend_on_its_batch():
  whole = draw(tiny.batch(8))
  part = {name: x[2:5] for name, x in tiny.batch(8).items()}
  np.testing.assert_array_equal(draw(part)['response'], whole['response'][2:5])


def test_the_stop_token_ends_a_response_and_belongs_to_it():
  # Everything but three tokens is illegal, one of them stops.
  legal, stop = (10, 11, 12), 12
  illegal = [i for i in range(272) if i not in legal]
  policy = restrict(MODEL.policy('policy'), illegal)
  out = draw(tiny.batch(), policy=policy, count=8, stop=(stop,))
  for row, mask in zip(
    np.asarray(out['response']).reshape(-1, 20),
    np.asarray(out['mask']).reshape(-1, 20),
  ):
    length = mask.sum()
    assert mask[:length].all() and (row[length:] == MODEL.pad).all()
    assert stop not in row[: length - 1]
    assert length == 20 or row[length - 1] == stop


def test_the_loop_ends_when_every_row_has_stopped():
  calls = []

  def counted(policy):
    def step(weights, cache, tokens):
      jax.debug.callback(lambda: calls.append(1))
      return policy.step(weights, cache, tokens)

    return policy._replace(step=step)

  legal = (10, 12)
  illegal = [i for i in range(272) if i not in legal]
  policy = counted(restrict(MODEL.policy('policy'), illegal))
  out = draw(tiny.batch(2), policy=policy, count=2, length=200, stop=(12,))
  jax.effects_barrier()
  longest = int(out['mask'].sum(-1).max())
  assert longest < 200
  assert len(calls) == longest - 1  # the first token needs no step


def test_blocks_of_the_loop_are_the_loop():
  policy, batch = MODEL.policy('policy'), tiny.batch()
  ending = dict(stop=MODEL.stop, pad=MODEL.pad)
  state = jax.jit(
    lambda batch: begin(
      policy,
      WEIGHTS,
      batch,
      jax.random.key(0),
      count=3,
      max_new_tokens=20,
      **ending,
    )
  )(batch)
  step = jax.jit(
    lambda state, steps: advance(policy, WEIGHTS, state, steps, **ending)
  )
  lengths = [int(state.length)]
  for steps in (1, 3, 0, 9, 100):
    state = step(state, steps)
    lengths.append(int(state.length))
  assert lengths == [1, 2, 5, 5, 14, 20]
  whole = draw(batch)
  for name, x in state.out.items():
    np.testing.assert_array_equal(x.reshape(whole[name].shape), whole[name])
  # Nothing more to draw: nothing changes.
  again = step(state, 5)
  np.testing.assert_array_equal(again.out['mask'], state.out['mask'])
  assert int(again.length) == 20


def test_greedy_takes_the_likeliest_token():
  batch = tiny.batch(2)
  out = draw(batch, count=1, length=5, greedy=True)
  policy = MODEL.policy('policy')
  features, _ = policy.features(WEIGHTS, batch | out)
  logits = policy.head(WEIGHTS, features)
  np.testing.assert_array_equal(jnp.argmax(logits, -1), out['response'])


def test_left_padding_is_invisible():
  batch = tiny.batch(1)
  wide = {
    'id': batch['id'],
    'prompt': jnp.pad(batch['prompt'], ((0, 0), (9, 0))),
  }
  np.testing.assert_array_equal(draw(batch)['response'], draw(wide)['response'])
