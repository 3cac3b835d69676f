"""Composed rewards through the real verbs: a reward model beside verifiers."""

import json

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from alignjax.cli import calibrate, train
from alignjax.cli import config as configs
from alignjax.core import lookup
from alignjax.core.errors import UserError
from alignjax.core.lookup import defaults
from alignjax.data.tokenizer import ByteTokenizer
from alignjax.models import decoder
from alignjax.models.config import to_json
from alignjax.policies import lm
from alignjax.rewards.model import model as reward_model
from alignjax.system import metrics, model_dir
from tests import tiny
from tests.chaos.programs import write_text


def write(path, config, head):
  init = jax.jit(lambda key: decoder.init(config, key))
  params = dict(init(jax.random.key(3)))
  if head != 'tied':
    kind, size = head.removesuffix(')').split('(')
    shape = (config.width, int(size))
    params[f'{kind}_head'] = jax.random.normal(jax.random.key(4), shape)
  canonical = jax.device_get(decoder.canonical(params))
  model_dir.write(
    path,
    config=to_json(config),
    params={'policy': canonical},
    provenance={},
    head=head,
  )
  return params


@pytest.fixture(scope='module')
def where(tmp_path_factory):
  path = tmp_path_factory.mktemp('rewards')
  write_text(path / 'text')
  write(path / 'policy', tiny.config(layers=1), 'tied')
  # Wider than the policy, and with fewer rows that are no tokens.
  write(
    path / 'judge', tiny.config(layers=1, width=40, vocab_size=264), 'scalar(1)'
  )
  return path


def settings(where, **changes):
  stack = defaults(
    'rewards',
    'compose.stack',
    parts={
      'judge': {'name': 'model'},
      'short': {
        'name': 'compose.bounded',
        'part': {'name': 'text.length', 'target': 4, 'tolerance': 4},
      },
    },
    weights={'judge': 0.5},
  )
  config = {
    'tokenizer': '',
    'model': {'name': 'start'},
    'start': {'policy': str(where / 'policy'), 'reference': '@policy'},
    'reward_model': {'path': str(where / 'judge'), 'tokenizer': ''},
    'reward': stack,
    'recipe': defaults(
      'recipes', 'grpo', response_count=2, max_new_tokens=6, updates=1
    ),
    'source': defaults(
      'data', 'sources.prompts', path=str(where / 'text'), prompt_tokens=16
    ),
    'optimizer': defaults('system', 'optimizer', warmup_steps=1),
    'mesh': {'data': -1},
    'seed': 3,
    'steps': 2,
    'batch_size': 4,
    'microbatches': 1,
    'log_every': 1,
    'save_every': 2,
    'keep': 1,
    'max_bad_steps': 3,
    'verify_every': 0,
  }
  return configs.plain(config | changes)


def run(verb, tmp_path, config):
  tmp_path.mkdir(exist_ok=True)
  file = tmp_path / 'config.json'
  file.write_text(json.dumps(config))
  return verb.main([f'--config={file}', f'--workdir={tmp_path / "run"}'])


def test_a_run_with_a_reward_model(where, tmp_path):
  assert run(train, tmp_path, settings(where)) == 0
  rows = metrics.read(tmp_path / 'run' / 'metrics.jsonl')
  for row in rows:
    total = 0.5 * row['reward/judge'] + row['reward/short']
    np.testing.assert_allclose(row['reward'], total, rtol=1e-5)
    assert row['reward/short/failed'] == 0
    assert abs(row['reward/judge']) > 1e-3
  # It is read from its own files, and only what moves is written.
  folders = sorted(x.name for x in (tmp_path / 'run').glob('model*'))
  assert folders == ['model']
  start = json.loads((tmp_path / 'run' / 'start.json').read_text())
  assert {'policy', 'reward_model'} <= set(start)


def test_a_calibration_with_a_reward_model(where, tmp_path):
  config = settings(where, reward={'name': 'model'})
  config['source']['prompt_tokens'] = 12
  del config['start']['reference']
  for name in ('recipe', 'optimizer', 'steps', 'microbatches', 'save_every'):
    del config[name]
  config |= dict(responses=2, batch_size=16, max_new_tokens=4, temperature=1.0)
  assert run(calibrate, tmp_path, config) == 0
  found = np.load(tmp_path / 'run' / 'rewards.npy')
  assert found.shape[1] == 2 and np.ptp(found) > 1e-3
  config['reward_model']['path'] = ''
  with pytest.raises(UserError, match='reward_model.path: no model is named'):
    run(calibrate, tmp_path / 'other', config | {'seed': 4})
  assert not (tmp_path / 'other' / 'run').exists()


def test_what_was_saved_is_what_scores(where):
  config = tiny.config(layers=1, width=40, vocab_size=264)
  params = write(where / 'again', config, 'scalar(1)')
  tokens = ByteTokenizer()
  reward = reward_model(tokens, lm.model(config, tokens))
  batch = tiny.batch(4)
  batch['response'] = jax.random.randint(jax.random.key(0), (4, 2, 5), 6, 262)
  batch['mask'] = np.ones((4, 2, 5), bool)
  from alignjax.cli import parts

  found = parts.opened(
    str(where / 'again'), config, 'reward_model.path', head='scalar'
  )
  loaded = parts.load_params(found, config)
  np.testing.assert_array_equal(
    reward({'reward_model': loaded}, batch, None),
    reward({'reward_model': params}, batch, None),
  )


def test_a_copy_of_the_policy_is_no_reward_model(where, tmp_path):
  config = settings(where)
  config['start']['reward_model'] = '@policy'
  config['reward_model']['path'] = ''
  words = (
    r"start.reward_model = '@policy': .* no scalar_head.* expected "
    r"reward_model.path = .* 'scalar'"
  )
  with pytest.raises(UserError, match=words):
    run(train, tmp_path, config)
  assert not (tmp_path / 'run').exists()


def started(where, folder, **changes):
  """PPO's state before the first step, where `start.value` is a folder."""
  from alignjax.cli import starts
  from alignjax.step import init_state
  from alignjax.system.optimizer import optimizer

  shape, tokens = tiny.config(layers=1), ByteTokenizer()
  recipe = lookup.build(
    'recipes',
    defaults('recipes', 'ppo', max_new_tokens=4),
    lm.model(shape, tokens),
    tiny.evenness,
  )
  recipe = recipe._replace(follow=recipe.follow | changes)
  begin = {'policy': str(where / 'policy'), 'reference': '@policy'}
  config = ConfigDict({'start': begin | {'value': str(where / folder)}})
  origins = starts.origins(config, shape, tokens, recipe)
  assert set(starts.facts(origins)) == {'policy', 'value'}
  start = starts.load(origins)
  return init_state(recipe, optimizer(1), 0, start=start).params['value']


def test_a_value_role_starts_from_a_folder_with_or_without_its_head(where):
  shape = tiny.config(layers=1)
  written = write(where / 'value', shape, 'scalar(1)')
  found = started(where, 'value')
  jax.tree.map(np.testing.assert_array_equal, found, written)
  assert np.any(found['scalar_head'])
  plain = dict(started(where, 'policy'))
  assert not np.any(plain.pop('scalar_head'))
  jax.tree.map(
    np.testing.assert_array_equal,
    plain,
    {k: v for k, v in written.items() if k != 'scalar_head'},
  )


def test_heads_that_do_not_fit_are_told(where):
  shape = tiny.config(layers=1)
  write(where / 'two', shape, 'scalar(2)')
  write(where / 'encoder', shape, 'embedding(6)')
  for folder, has in (('two', 'scalar_head.* 2'), ('encoder', 'embedding_')):
    words = rf'start.value: .* has {has}.*one with scalar_head \[32, 1\]'
    with pytest.raises(UserError, match=words):
      started(where, folder)
  # One that is never trained brings its head along.
  with pytest.raises(UserError, match="head is 'tied', expected 'scalar'"):
    started(where, 'policy', value=None)


@pytest.mark.parametrize(
  'path, words',
  [
    ('', r'reward_model.path: no model is named; .* kind .scalar'),
    ('policy', "head is 'tied', expected 'scalar'"),
    ('nowhere', 'no model at'),
  ],
)
def test_no_reward_model_is_one_sentence(where, tmp_path, path, words):
  path = str(where / path) if path else ''
  changes = {'reward_model': {'path': path, 'tokenizer': ''}}
  with pytest.raises(UserError, match=words):
    run(train, tmp_path, settings(where, **changes))
