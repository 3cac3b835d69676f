"""Runs and evaluations of models that are merged where they are used."""

import json
import shutil

import jax
import numpy as np
import pytest

from alignjax.cli import config as configs
from alignjax.cli import evaluate, starts, train
from alignjax.cli import merge as merging
from alignjax.core import tree
from alignjax.core.errors import UserError
from alignjax.core.lookup import defaults
from alignjax.merge import driver, placed, planning
from alignjax.models import decoder
from alignjax.models.config import to_json
from alignjax.system import metrics, model_dir
from tests import tiny
from tests.chaos.programs import write_text

CONFIG = tiny.config(layers=1)


def write(path, seed, head='tied'):
  init = jax.jit(lambda key: decoder.init(CONFIG, key))
  params = dict(init(jax.random.key(seed)))
  if head != 'tied':
    shape = (CONFIG.width, 1)
    params['scalar_head'] = jax.random.normal(jax.random.key(seed), shape)
  model_dir.write(
    path,
    config=to_json(CONFIG),
    params={'policy': jax.device_get(decoder.canonical(params))},
    provenance={},
    head=head,
  )


def written(spec, out):
  fields = {'base': None} | spec
  (path,) = driver.run(planning.plan(fields.pop('method'), **fields, out=out))
  return path


@pytest.fixture(scope='module')
def where(tmp_path_factory):
  path = tmp_path_factory.mktemp('starts')
  write_text(path / 'text')
  for i, name in enumerate(('base', 'a', 'b')):
    write(path / name, i)
    write(path / f'judge_{name}', 5 + i, 'scalar(1)')
  return path


def slerp(where, **more):
  models = [str(where / name) for name in 'ab']
  base = str(where / 'base')
  return {'method': 'slerp', 'base': base, 'models': models, 't': 0.3} | more


def liti(where, rate=0.4):
  return {
    'method': 'liti',
    'base': str(where / 'base'),
    'models': [slerp(where)],
    'liti_rate': rate,
  }


def mean(where):
  models = [str(where / f'judge_{name}') for name in ('base', 'a', 'b')]
  return {'method': 'linear', 'models': models}


def settings(where, policy, **changes):
  """A run against a fixed reference, scored by a mean of reward models."""
  config = {
    'tokenizer': '',
    'model': {'name': 'start'},
    'start': {'policy': policy, 'reference': '@policy'},
    'reward_model': {'path': mean(where), 'tokenizer': ''},
    'reward': {'name': 'model'},
    'recipe': defaults(
      'recipes', 'grpo', response_count=2, max_new_tokens=4, updates=1
    ),
    'source': defaults(
      'data', 'sources.prompts', path=str(where / 'text'), prompt_tokens=12
    ),
    'optimizer': defaults('system', 'optimizer', lr=1e-2, warmup_steps=1),
    'mesh': {'fsdp': -1},
    'seed': 3,
    'steps': 4,
    'batch_size': 4,
    'microbatches': 1,
    'log_every': 1,
    'save_every': 2,
    'keep': 2,
    'max_bad_steps': 3,
    'verify_every': 0,
  }
  return configs.plain(config | changes)


def run(verb, folder, config, *more):
  folder.mkdir(exist_ok=True)
  file = folder / 'config.json'
  file.write_text(json.dumps(config))
  return verb.main([f'--config={file}', f'--workdir={folder / "run"}', *more])


@pytest.fixture(scope='module')
def trained(where, tmp_path_factory):
  """From LITI after SLERP, merged on a mesh of four devices."""
  folder = tmp_path_factory.mktemp('trained')
  assert run(train, folder, settings(where, liti(where))) == 0
  return folder / 'run'


def weights(path):
  return tree.named(model_dir.load(model_dir.read(path)))


def test_a_run_from_a_merge_is_the_run_from_its_directory(
  where, trained, tmp_path
):
  init = written(liti(where), tmp_path / 'init')
  judge = written(mean(where), tmp_path / 'judge')
  config = settings(
    where,
    str(init),
    reward_model={'path': str(judge), 'tokenizer': ''},
    steps=1,
    save_every=1,
  )
  assert run(train, tmp_path / 'files', config) == 0
  row, other = (
    metrics.read(path / 'metrics.jsonl')[0]
    for path in (tmp_path / 'files' / 'run', trained)
  )
  assert set(row) == set(other)
  for name, number in row.items():
    assert other[name] == pytest.approx(number, rel=1e-4, abs=1e-5), name


def test_a_run_says_what_it_was_merged_of(where, trained):
  start = json.loads((trained / 'start.json').read_text())
  policy, judge = start['policy'], start['reward_model']
  assert policy['merge']['method'] == 'liti'
  assert policy['merge']['numbers'] == {'liti_rate': 0.4}
  inner = policy['merge']['models'][0]['merge']
  assert inner['numbers'] == {'t': 0.3}
  for source in (inner['base'], *inner['models'], *judge['merge']['models']):
    found = model_dir.digest(model_dir.read(source['path']))
    assert source['digest'] == found
  said = model_dir.read(trained / 'model').provenance['init']
  assert said == policy


def test_a_resumed_run_is_the_same_and_merges_what_is_fixed(
  where, trained, tmp_path, monkeypatch
):
  shutil.copytree(trained, tmp_path / 'run')
  shutil.rmtree(tmp_path / 'run' / 'checkpoints' / '4')
  shutil.rmtree(tmp_path / 'run' / 'model')
  merged = []
  onto = placed.onto

  def noted(model, *rest):
    merged.append(model.merge.method.name)
    return onto(model, *rest)

  monkeypatch.setattr(placed, 'onto', noted)
  assert run(train, tmp_path, settings(where, liti(where))) == 0
  # The reference is a copy of the init: it is in no checkpoint.
  assert sorted(merged) == ['linear', 'liti']
  rows = [
    (p / 'metrics.jsonl').read_bytes() for p in (trained, tmp_path / 'run')
  ]
  assert rows[0] == rows[1]
  one, two = (weights(p / 'model') for p in (trained, tmp_path / 'run'))
  for name, x in one.items():
    np.testing.assert_array_equal(x, two[name])


def test_what_a_checkpoint_holds_is_not_merged_again(
  where, tmp_path, monkeypatch
):
  config = settings(
    where,
    json.dumps(slerp(where)),  # as from the command line
    start={'policy': json.dumps(slerp(where))},
    recipe=defaults('recipes', 'sft'),
    source=defaults(
      'data', 'sources.text', path=str(where / 'text'), length=16
    ),
  )
  del config['reward'], config['reward_model']
  assert run(train, tmp_path, config) == 0
  shutil.rmtree(tmp_path / 'run' / 'checkpoints' / '4')
  before = (tmp_path / 'run' / 'metrics.jsonl').read_bytes()

  def fail(*rest):
    raise AssertionError('merged again')

  monkeypatch.setattr(placed, 'onto', fail)
  assert run(train, tmp_path, config) == 0
  assert (tmp_path / 'run' / 'metrics.jsonl').read_bytes() == before
  # Without checkpoints it begins again.
  shutil.rmtree(tmp_path / 'run' / 'checkpoints')
  with pytest.raises(AssertionError, match='merged again'):
    run(train, tmp_path, config)


def test_sources_that_have_changed_are_noticed(where, trained, tmp_path):
  for name in ('base', 'a', 'b'):
    shutil.copytree(where / name, tmp_path / name)
  config = settings(
    where, slerp(tmp_path), start={'policy': slerp(tmp_path), 'reference': ''}
  )
  config |= {'steps': 1, 'save_every': 1}
  assert run(train, tmp_path, config) == 0
  shutil.rmtree(tmp_path / 'b')
  shutil.copytree(where / 'base', tmp_path / 'b')
  with pytest.raises(UserError, match='start.policy: the weights have changed'):
    run(train, tmp_path, config)


@pytest.mark.parametrize(
  ('changes', 'words'),
  [
    ({'method': 'slurp'}, "no 'slurp' in merge.methods"),
    ({'t': 3}, 't must be a number from 0 to 1'),
    ({'models': ['nowhere', 'either']}, 'no model at .*nowhere'),
  ],
)
def test_a_bad_merge_is_refused_before_there_is_a_workdir(
  where, tmp_path, changes, words
):
  for policy in (slerp(where, **changes), liti(where)):
    config = settings(where, policy)
    if policy['method'] == 'liti':
      config['start']['policy']['models'] = [slerp(where, **changes)]
    with pytest.raises(UserError, match=words):
      run(train, tmp_path, config)
  config = settings(where, liti(where))
  config['reward_model']['path'] = mean(where) | {
    'models': [str(where / 'judge_a'), str(where / 'a')]
  }
  with pytest.raises(UserError, match='different kinds of models'):
    run(train, tmp_path, config)
  assert not (tmp_path / 'run').exists()


def test_a_merge_of_runs_knows_where_they_began(where, trained, tmp_path):
  config = settings(where, liti(where), seed=4)
  assert run(train, tmp_path, config | {'steps': 2}) == 0
  models = [str(trained / 'model'), str(tmp_path / 'run' / 'model')]

  def merge(base, out):
    file = tmp_path / f'{out}.json'
    fields = {'method': 'slerp', 'base': base, 'models': models}
    file.write_text(json.dumps(fields))
    return merging.main([f'--config={file}', f'--out={tmp_path / out}'])

  assert merge(liti(where), 'merged') == 0
  said = model_dir.read(tmp_path / 'merged').provenance['merge']
  assert said['base']['merge']['method'] == 'liti'
  assert said['base']['digest'] == said_init(trained)
  for base in (str(where / 'base'), liti(where, rate=0.5)):
    with pytest.raises(UserError, match='different bases'):
      merge(base, 'other')


def said_init(workdir):
  return model_dir.read(workdir / 'model').provenance['init']['checksum']


def test_an_evaluation_of_merges_is_that_of_their_directories(where, tmp_path):
  models = [
    ('init', str(where / 'base')),
    ('liti', liti(where)),
    ('end', liti(where, 1)),
    ('slerp', slerp(where)),
  ]
  files = {
    'liti': written(liti(where), tmp_path / 'liti'),
    'end': written(liti(where, 1), tmp_path / 'end'),
    'slerp': written(slerp(where), tmp_path / 'slerp'),
  }

  def evaluated(folder, models, judge):
    config = settings(where, str(where / 'base'))
    config |= dict(
      reward_model={'path': judge, 'tokenizer': ''},
      models=[
        {'name': name, 'kind': 'model', 'path': path} for name, path in models
      ],
      **dict(reference='init', prompts=4, responses=2, reference_responses=2),
      **dict(batch_size=4, max_new_tokens=4, temperature=1.0, samples=1),
    )
    assert run(evaluate, tmp_path / folder, config) == 0
    file = tmp_path / folder / 'run' / 'evaluation.json'
    return json.loads(file.read_text())

  memory = evaluated('memory', models, mean(where))
  judge = str(written(mean(where), tmp_path / 'judge'))
  paths = [(name, str(files.get(name, path))) for name, path in models]
  assert memory == evaluated('files', paths, judge)


def test_roles_that_are_copied_are_kept_for_those_that_are_fixed():
  found = {'policy': 'P', 'value': 'V', 'reference': '@policy', 'anchor': 'A'}
  assert starts._kept(found, ['reference']) == {
    'policy': 'P',
    'reference': '@policy',
  }
  assert starts._kept(found, []) == {}
