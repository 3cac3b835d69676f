"""`alignjax evaluate` and `calibrate`: bad numbers are told before any file."""

import json

import pytest

from alignjax.cli import calibrate, evaluate
from alignjax.core.errors import UserError

# Nothing here exists: what is told is told before anything is opened.
SHARED = {
  'tokenizer': 'nowhere.model',
  'model': {'name': 'start'},
  'start': {'policy': 'nowhere'},
  'source': {'name': 'sources.prompts', 'path': 'nowhere'},
  'reward': {'name': 'verify.python_code'},
  'responses': 2,
  'batch_size': 4,
  'max_new_tokens': 5,
  'temperature': 1.0,
  'seed': 0,
}
MODELS = {
  'models': [{'name': 'init', 'kind': 'init', 'path': 'nowhere'}],
  'reference': 'init',
  'prompts': 8,
  'reference_responses': 4,
  'samples': 0,
}
VERBS = {
  'evaluate': (evaluate, SHARED | MODELS),
  'calibrate': (calibrate, SHARED),
}


def run(verb, folder, changes, without=()):
  module, config = VERBS[verb]
  config = {k: v for k, v in (config | changes).items() if k not in without}
  file = folder / 'job.json'
  file.write_text(json.dumps(config))
  module.main([f'--config={file}', f'--workdir={folder / "work"}'])


@pytest.mark.parametrize('verb', VERBS)
@pytest.mark.parametrize(
  'changes, message',
  [
    (
      {'max_new_tokens': 0},
      'max_new_tokens = 0: expected a whole number, 1 or',
    ),
    ({'max_new_tokens': -3}, 'max_new_tokens = -3: expected'),
    ({'max_new_tokens': 2.5}, 'max_new_tokens = 2.5: expected a whole number'),
    ({'max_new_tokens': None}, 'max_new_tokens = None: expected'),
    ({'responses': 0}, 'responses = 0: expected a whole number'),
    ({'responses': True}, 'responses = True: expected a whole number'),
    ({'batch_size': 0}, 'batch_size = 0: expected a whole number, 1 or more'),
    ({'temperature': 0}, 'temperature = 0: expected 1e-06 or more'),
    ({'temperature': 'hot'}, "temperature = 'hot': expected 1e-06 or more"),
  ],
)
def test_bad_numbers(verb, changes, message, tmp_path):
  with pytest.raises(UserError, match=message):
    run(verb, tmp_path, changes)
  assert not (tmp_path / 'work').exists()


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'prompts': 0}, 'prompts = 0: expected a whole number, 2 or more'),
    ({'prompts': 1}, 'prompts = 1: expected'),  # no interval
    ({'reference_responses': 1}, 'reference_responses = 1: expected'),
    ({'samples': -1}, 'samples = -1: expected a whole number, 0 or more'),
    ({'responses': 1, 'embedding': {'path': 'x'}}, 'responses = 1: expected'),
  ],
)
def test_bad_numbers_of_an_evaluation(changes, message, tmp_path):
  with pytest.raises(UserError, match=message):
    run('evaluate', tmp_path, changes)


@pytest.mark.parametrize('verb', VERBS)
def test_a_missing_field_and_good_numbers(verb, tmp_path):
  with pytest.raises(UserError, match="job.json: no 'responses'; it is needed"):
    run(verb, tmp_path, {}, without=['responses'])
  with pytest.raises(UserError, match='nowhere'):
    run(verb, tmp_path, {})
