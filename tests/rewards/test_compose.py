"""Rewards of rewards: their arithmetic, their places, and their failures."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.core.errors import UserError
from alignjax.data.tokenizer import ByteTokenizer
from alignjax.rewards import compose
from alignjax.stages.overlap import overlap
from alignjax.stages.score import score
from alignjax.system import mesh as meshes

TOKENS = ByteTokenizer()
CONTEXT = {'tokens': TOKENS}
KEY = jax.random.key(0)
HERE = 'tests.rewards.test_compose'


def first_id(tokens, *, scale: float = 1.0):
  """On the host: the first token of a response, and its place."""

  def reward(bundle, batch, key):
    assert isinstance(batch['response'], np.ndarray)
    first = batch['response'][..., 0].astype(np.float32)
    return np.stack([scale * first, np.ones_like(first)], axis=-1)

  reward.host = True
  reward.names = ('first', 'one')
  return reward


def tokens_of(tokens):
  """On the device: how many tokens a response has."""

  def reward(bundle, batch, key):
    assert isinstance(batch['mask'], jax.Array)
    return jnp.sum(batch['mask'], axis=-1).astype(jnp.float32)[..., None]

  reward.names = ('tokens',)
  return reward


def slow(tokens):
  """Row 1 hangs, 2 raises, 3 has NaN for a score, 4 has too many scores."""

  def reward(bundle, batch, key):
    (row,) = batch['id']
    while row == 1:
      try:
        time.sleep(0.01)
      except Exception:  # stubborn
        pass
    if row == 2:
      raise ZeroDivisionError('by nothing')
    shape = (1, 2, 2 if row == 4 else 1)
    return np.full(shape, np.nan if row == 3 else 0.5, np.float32)

  reward.host = True
  reward.names = ('half',)
  return reward


def section(name, **numbers):
  return {'name': f'{HERE}.{name}', **numbers}


def batch_of(rows=8):
  rng = np.random.default_rng(0)
  lengths = rng.integers(1, 5, (rows, 2))
  return {
    'id': jnp.arange(rows),
    'prompt': jnp.ones((rows, 3), jnp.int32),
    'response': jnp.asarray(rng.integers(6, 200, (rows, 2, 4)), jnp.int32),
    'mask': jnp.asarray(np.arange(4) < lengths[..., None]),
  }


def scored(reward, batch, stages=None):
  for stage in stages or [score(reward)]:
    batch = stage({}, batch, KEY)
  return np.asarray(batch['rewards'])


STACK = {
  'name': 'compose.stack',
  'parts': {'a': section('first_id', scale=2.0), 'b': section('tokens_of')},
  'weights': {'a': 0.5, 'b': -1.0},
}


def test_a_stack_of_host_and_device_is_their_weighted_sum():
  reward, batch = compose.build(STACK, CONTEXT), batch_of()
  assert reward.names == ('reward', 'a', 'b', 'a/one')
  found = scored(reward, batch)
  first = np.asarray(batch['response'])[..., 0]
  count = np.asarray(batch['mask']).sum(-1)
  want = np.stack([first - count, 2 * first, count, np.ones_like(count)], -1)
  np.testing.assert_array_equal(found, want.astype(np.float32))
  stages = overlap(lambda b, x, k: x, score(reward), chunks=2)
  np.testing.assert_array_equal(scored(reward, batch, stages), found)
  mesh = meshes.make({'data': 4})
  placed = jax.device_put(batch, meshes.rows(mesh))
  np.testing.assert_array_equal(scored(reward, placed), found)


def test_functions_of_rewards():
  part, batch = section('tokens_of'), batch_of()
  count = np.asarray(batch['mask']).sum(-1).astype(np.float32)

  def found(name, **numbers):
    made = compose.build({'name': name, 'part': part, **numbers}, CONTEXT)
    assert made.names == ('tokens',)
    return scored(made, batch)[..., 0]

  np.testing.assert_allclose(
    found('compose.affine', scale=2.0, shift=-1.0), 2 * count - 1
  )
  np.testing.assert_allclose(
    found('compose.clipped', low=1.5, high=2.5), np.clip(count, 1.5, 2.5)
  )
  np.testing.assert_allclose(
    found('compose.standardised', mean=2.0, std=0.5), (count - 2) / 0.5
  )
  np.testing.assert_allclose(
    found('compose.transformed', fn='jax.numpy.square'), count**2
  )


@pytest.mark.parametrize('inner', ['first_id', 'tokens_of'])  # host, device
def test_a_calibrated_reward_is_the_chance_to_beat_the_reference(inner):
  batch = batch_of()
  plain = scored(compose.build(section(inner), CONTEXT), batch)
  reference = np.sort(np.random.default_rng(1).integers(1, 200, (8, 5)), 1)
  batch['ref_reward'] = jnp.asarray(reference, jnp.float32)
  reward = compose.build(
    {'name': 'compose.calibrated', 'part': section(inner)}, CONTEXT
  )
  found = scored(reward, batch)
  assert (
    reward.names[0] == 'calibrated' and len(reward.names) == (found.shape[-1])
  )
  mine, theirs = plain[:, :, :1], reference[:, None, :]
  want = np.mean((theirs < mine) + 0.5 * (theirs == mine), axis=-1)
  np.testing.assert_allclose(found[..., 0], want, rtol=1e-6)
  np.testing.assert_array_equal(found[..., 1:], plain)
  # Of any increasing function of the reward it is the same; Phi comes after.
  part = {'name': 'compose.affine', 'part': section(inner), 'scale': 3.0}
  batch['ref_reward'] *= 3
  exp = {'transform': 'exp', 'scale': 4.0}
  made = compose.build(
    {'name': 'compose.calibrated', 'part': part, **exp}, CONTEXT
  )
  np.testing.assert_allclose(
    scored(made, batch)[..., 0], np.expm1(4 * want) / np.expm1(4), rtol=1e-5
  )
  stages = overlap(lambda b, x, k: x, score(made), chunks=2)
  np.testing.assert_array_equal(
    scored(made, batch, stages), scored(made, batch)
  )


def test_a_calibrated_reward_needs_calibrated_rows():
  part = section('tokens_of')
  reward = compose.build({'name': 'compose.calibrated', 'part': part}, CONTEXT)
  with pytest.raises(UserError, match='rows without ref_reward'):
    scored(reward, batch_of())
  bad = {'name': 'compose.calibrated', 'part': part, 'transform': 'expp'}
  with pytest.raises(
    UserError, match='transform: found .expp.; did you mean .exp.'
  ):
    compose.build(bad, CONTEXT)


def test_statistics_of_a_calibration(tmp_path):
  np.save(tmp_path / 'rewards.npy', np.array([[1.0, 3.0], [2.0, 6.0]]))
  reward = compose.build(
    {
      'name': 'compose.standardised',
      'part': section('tokens_of'),
      'path': str(tmp_path),
    },
    CONTEXT,
  )
  batch = batch_of()
  count = np.asarray(batch['mask']).sum(-1)
  want = (count - 3) / np.std([1, 3, 2, 6])
  np.testing.assert_allclose(scored(reward, batch)[..., 0], want, rtol=1e-6)


def test_failures_are_bounded_and_named(capsys):
  reward = compose.build(
    {
      'name': 'compose.bounded',
      'part': section('slow'),
      'limit_s': 0.2,
      'score': -1.0,
    },
    CONTEXT,
  )
  batch = batch_of(6)
  batch['prompt'] = jnp.asarray([TOKENS.encode(f'ask{i}') for i in range(6)])
  found = scored(reward, batch)
  assert reward.names == ('half', 'failed')
  np.testing.assert_array_equal(found[[0, 5]], [[[0.5, 0]] * 2] * 2)
  np.testing.assert_array_equal(found[1:5], [[[-1, 1]] * 2] * 4)
  told = capsys.readouterr().err.splitlines()
  for line, words in zip(
    told,
    ['no score after 0.2 s', 'by nothing', 'not a finite', 'of shape'],
    strict=True,
  ):
    assert words in line
  assert [f"'ask{i}'" in line for i, line in enumerate(told, 1)] == [True] * 4


def test_what_a_reward_needs_is_given_by_name():
  facts = [{'name': str(i), 'answer': str(i)} for i in range(9)]

  class Source:
    def records(self, ids):
      return [facts[i] for i in ids]

  part = {'name': 'text.answer'}
  stacked = {'name': 'compose.stack', 'parts': {'right': part}}
  reward = compose.build(stacked, CONTEXT | {'source': Source()})
  batch = batch_of(8)
  ids = [TOKENS.encode(str(i)) + [TOKENS.stop[0]] for i in range(8)]
  batch['response'] = jnp.asarray(ids)[:, None]
  batch['mask'] = jnp.ones((8, 1, 2), bool)
  np.testing.assert_array_equal(scored(reward, batch), np.ones((8, 1, 2)))
  with pytest.raises(UserError, match="'text.answer' needs 'source', which"):
    compose.build(stacked, CONTEXT)


@pytest.mark.parametrize(
  'changes, words',
  [
    ({'parts': {}}, 'nothing to stack'),
    ({'weights': {'aa': 1.0}}, r"no part 'aa'.*'a'"),
    (
      {'parts': {'a': {'name': 'text.patern'}}, 'weights': {}},
      "no 'text.patern' in rewards",
    ),
    ({'name': 'compose.affine'}, 'no field'),
  ],
)
def test_bad_sections_are_one_sentence(changes, words):
  with pytest.raises(UserError, match=words):
    compose.build(STACK | changes, CONTEXT)


@pytest.mark.parametrize(
  'name, numbers, words',
  [
    ('clipped', dict(low=1.0, high=1.0), 'low = 1.0 is not below'),
    ('standardised', dict(mean=0.0), 'needs mean and std, or path'),
    ('standardised', dict(mean=1.0, std=0.0), 'always 1.0 has no scale'),
    ('standardised', dict(path='nowhere'), 'nowhere/rewards.npy'),
    ('bounded', {}, 'only a reward of the host'),
  ],
)
def test_bad_numbers_are_one_sentence(name, numbers, words):
  part = section('tokens_of')
  with pytest.raises(UserError, match=words):
    compose.build({'name': f'compose.{name}', 'part': part, **numbers}, CONTEXT)


def test_wrong_answers_end_the_run():
  batch = batch_of(4)

  def host(values):
    def reward(bundle, batch, key):
      return values

    reward.host = True
    return score(reward)

  with pytest.raises(UserError, match=r'shape \(4, 2\), expected \[B, N, K\]'):
    host(np.zeros((4, 2), np.float32))({}, batch, KEY)
  values = np.zeros((4, 2, 1), np.float32)
  values[2, 1] = np.nan
  with pytest.raises(
    UserError, match='response 1 to the prompt of row 2 .* nan'
  ):
    host(values)({}, batch, KEY)


def test_a_constant_reward_is_told_once(capsys):
  stage = score(
    compose.build(section('slow'), CONTEXT)
  )  # 0.5, whatever is written
  batch = batch_of(1)
  for _ in range(8):
    stage({}, batch, KEY)
  said = capsys.readouterr().err
  assert said.count('has the reward 0.5: where all are alike') == 1
