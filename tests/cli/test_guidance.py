"""The real `train` and `evaluate`: an encoder, and a run that it rewards."""

import json

import pytest

from alignjax.cli import config as configs
from alignjax.cli import evaluate, train
from alignjax.core.errors import UserError
from alignjax.core.lookup import defaults
from tests.cli.test_teach import model, rows_of, run, settings


@pytest.fixture(scope='module')
def where(tmp_path_factory):
  path = tmp_path_factory.mktemp('guidance')
  (path / 'text').mkdir()
  for i in range(24):
    lines = [f'def f_{i}_{j}(x):\n  return x + {j}\n\n' for j in range(12)]
    (path / 'text' / f'file_{i:02}.py').write_text(''.join(lines))
  model(path / 'student')
  numbers = dict(path=str(path / 'text'), part='all')
  config = settings(
    path,
    # Smaller than the policy, and of another family.
    model=defaults('models', 'gemma', **small()),
    start={},
    recipe=defaults('recipes', 'embed', size=6),
    source=defaults('data', 'segments', length=12, documents=3, **numbers),
    steps=2,
  )
  del config['teacher']
  assert run(train, path, config, 'encoder') == 0
  return path


def small():
  numbers = dict(family='gemma3', vocab_size=270, width=8, hidden=12, layers=1)
  return numbers | dict(heads=1, kv_heads=1, head_dim=8, window=4)


def guided(where, **changes):
  config = settings(
    where,
    start={'policy': str(where / 'student'), 'teacher': '@policy'},
    embedding={'path': str(where / 'encoder/model'), 'tokenizer': ''},
    recipe=defaults(
      'recipes', 'cfg_distill', diversity_coef=5.0, max_new_tokens=4
    ),
    source=prompts(where),
    steps=2,
  )
  del config['teacher']
  return configs.plain(config | changes)


def prompts(where, **changes):
  numbers = dict(path=str(where / 'text'), part='all', prompt_tokens=24)
  numbers |= dict(uncond='') | changes
  return defaults('data', 'sources.prompts', **numbers)


def test_the_encoder_is_a_model_of_its_own(where, tmp_path):
  facts = json.loads((where / 'encoder/model/model.json').read_text())
  assert facts['head'] == 'embedding(6)'
  assert set(rows_of(where / 'encoder')[-1]) >= {'positive', 'negative'}
  assert run(train, tmp_path, guided(where), 'run') == 0
  rows = rows_of(tmp_path / 'run')
  assert len(rows) == 2
  for row in rows:
    assert row['kl'] >= 0 and 0 <= row['diversity'] <= 2
    assert row['logprob_gap'] < 1e-4
  start = json.loads((tmp_path / 'run/start.json').read_text())
  assert set(start) == {'policy', 'embedding'}
  # What was trained is the policy alone.
  assert not (tmp_path / 'run/model_teacher').exists()


@pytest.mark.slow
def test_the_reference_is_the_start_under_guidance(where, tmp_path):
  models = [
    {'name': 'init', 'kind': 'init', 'guidance_scale': 3.0},
    {'name': 'plain', 'kind': 'unguided'},
  ]
  config = guided(where) | {
    'models': [{'path': str(where / 'student')} | m for m in models],
    'reference': 'init',
    'reward': defaults('rewards', 'verify.python_code'),
    'prompts': 8,
    'responses': 3,
    'reference_responses': 2,
    'temperature': 1.0,
    'max_new_tokens': 4,
    'samples': 1,
  }
  config = configs.plain(config)
  assert run(evaluate, tmp_path, config, 'evaluation') == 0
  file = tmp_path / 'evaluation/evaluation.json'
  found = {m['name']: m for m in json.loads(file.read_text())['models']}
  # The reference is the start under guidance, and is so scored.
  assert abs(found['init']['kl']['mean']) < 1e-4
  assert found['plain']['kl']['mean'] > 1e-2
  for row in found.values():
    assert 0 < row['diversity']['mean'] < 2
    assert 'diversity' not in row['indicators']
    assert row['logprob_gap'] < 1e-4
  config['source'] = configs.plain(prompts(where, uncond=None))
  with pytest.raises(UserError, match='set source.uncond'):
    run(evaluate, tmp_path, config, 'other')


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'embedding': {'path': ''}}, 'embedding.path: no model is named'),
    ({'embedding': {'path': 'student'}}, 'not an embedding model'),
    ({'start': {'policy': 'encoder/model'}}, 'not a plain language model'),
    ({'start': {'policy': 'student'}}, 'start.teacher: the recipe never'),
  ],
)
def test_bad_words_before_any_compute(where, tmp_path, changes, message):
  config = guided(where)
  for section, fields in changes.items():
    config[section] = {
      name: str(where / path) if path else '' for name, path in fields.items()
    }
  with pytest.raises(UserError, match=message):
    run(train, tmp_path, config, 'run')
  assert not (tmp_path / 'run').exists()


def test_without_diversity_no_encoder_is_read(where, tmp_path):
  config = guided(where, embedding={'path': '', 'tokenizer': ''}, steps=1)
  config['recipe']['diversity_coef'] = 0.0
  assert run(train, tmp_path, config, 'run') == 0
  assert 'diversity' not in rows_of(tmp_path / 'run')[-1]
