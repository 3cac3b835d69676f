"""`alignjax calibrate`, and the source that reads what it leaves."""

import json

import jax
import numpy as np
import pytest

from alignjax import evaluate
from alignjax.cli import calibrate
from alignjax.cli import config as configs
from alignjax.core import lookup
from alignjax.core.errors import UserError
from alignjax.core.lookup import defaults
from alignjax.data.tokenizer import ByteTokenizer
from alignjax.models.config import to_json
from alignjax.system import model_dir
from tests import tiny
from tests.chaos.programs import write_text

SOURCE = {'name': 'sources.prompts', 'prompt_tokens': 24}


@pytest.fixture(scope='module')
def config(tmp_path_factory):
  folder = tmp_path_factory.mktemp('calibrate')
  shape = tiny.config()
  params = tiny.bundle(tiny.model(), 'policy')['policy']
  from alignjax.models import decoder

  model_dir.write(
    folder / 'model',
    config=to_json(shape),
    params={'policy': jax.device_get(decoder.canonical(params))},
    provenance={},
  )
  return {
    'tokenizer': '',
    'model': {'name': 'start'},
    'start': {'policy': str(folder / 'model')},
    'source': SOURCE | {'path': str(write_text(folder / 'text'))},
    'reward': {'name': 'tests.cli.test_calibrate.letters'},
    'responses': 3,
    'batch_size': 16,
    'max_new_tokens': 5,
    'temperature': 1.0,
    'seed': 0,
  }


def letters(tokens):
  del tokens

  def reward(bundle, batch, key):
    return (batch['response'] % 7).sum(-1, keepdims=True).astype(np.float32)

  return reward


def undefined(tokens):
  del tokens

  def reward(bundle, batch, key):
    scores = np.ones((*batch['mask'].shape[:2], 1), np.float32)
    scores[3] = np.nan
    return scores

  return reward


def run(config, folder, **changes):
  folder.mkdir(exist_ok=True)
  file = folder / 'config.json'
  file.write_text(json.dumps(config | changes))
  work = folder / 'work'
  assert calibrate.main([f'--config={file}', f'--workdir={work}']) == 0
  return work


def joined(config, work, **changes):
  of = config['source'] | changes
  section = {'name': 'calibrated', 'path': str(work), 'rows': of}
  return lookup.build('data', section, ByteTokenizer(), 4, 0)


def test_every_prompt_has_its_rewards(config, tmp_path, capsys):
  work = run(config, tmp_path)
  assert '3 rewards of' in capsys.readouterr().out
  rows = joined(config, work)
  plain = lookup.build('data', config['source'], ByteTokenizer(), 4, 0)
  batch = rows.batch(0)
  assert batch['ref_reward'].shape == (4, 3)
  assert (np.diff(batch['ref_reward'], axis=1) >= 0).all()
  np.testing.assert_array_equal(batch['prompt'], plain.batch(0)['prompt'])
  # By the row's own key: the same from any batch.
  again = run(config, tmp_path / 'again', batch_size=5)
  np.testing.assert_array_equal(
    np.load(again / 'rewards.npy'), np.load(work / 'rewards.npy')
  )


def test_what_was_done_is_not_done_again(config, tmp_path, monkeypatch):
  whole = run(config, tmp_path / 'whole')
  real = evaluate.reference_rewards

  def killed(write, bundle, rows, reward, key, *, into, advance):
    def stop(done, text):
      if done > 20:
        raise KeyboardInterrupt

    real(write, bundle, rows, reward, key, into=into, advance=stop)

  monkeypatch.setattr(evaluate, 'reference_rewards', killed)
  with pytest.raises(KeyboardInterrupt):
    run(config, tmp_path / 'cut')
  work = tmp_path / 'cut' / 'work'
  assert not (work / 'rewards.npy').exists()
  with pytest.raises(UserError, match='rewards.npy is missing'):
    joined(config, work)
  began = []

  def resumed(write, bundle, rows, reward, key, *, into, advance):
    began.append(int(np.isfinite(into).all(1).sum()))
    real(write, bundle, rows, reward, key, into=into, advance=advance)

  monkeypatch.setattr(evaluate, 'reference_rewards', resumed)
  run(config, tmp_path / 'cut')
  assert began[0] >= 20
  np.testing.assert_array_equal(
    np.load(work / 'rewards.npy'), np.load(whole / 'rewards.npy')
  )


def test_bad_input(config, tmp_path):
  work = run(config, tmp_path / 'one')
  with pytest.raises(UserError, match='other prompts'):
    joined(config, work, prompt_tokens=20)
  with pytest.raises(UserError, match='no calibration at'):
    joined(config, tmp_path / 'nowhere')
  with pytest.raises(UserError, match='holds another calibration'):
    run(config, tmp_path / 'one', responses=4)
  with pytest.raises(UserError, match='prompt 3 is not a finite number'):
    run(
      config,
      tmp_path / 'two',
      reward={'name': 'tests.cli.test_calibrate.undefined'},
    )
  rewards = np.load(work / 'rewards.npy')
  np.save(work / 'rewards.npy', rewards[:-1])
  with pytest.raises(UserError, match='expected .* rows'):
    joined(config, work)


def test_the_config_of_the_paper_is_sound(monkeypatch):
  from configs.papers import infalign

  config = infalign.get_config('tiny')
  graph = list(infalign.jobs(config))
  assert [job.verb for job in graph] == (
    ['calibrate'] + ['train'] * 3 + ['evaluate', 'report']
  )
  assert (
    configs.plain(graph[1].config)['source']['rows']
    == graph[0].config['source']
  )
  names = set(defaults('recipes', 'infalign'))
  assert names == set(graph[1].config['recipe'])
