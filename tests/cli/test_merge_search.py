"""`alignjax merge search`, whole: trials, the merge, what held out, resume."""

import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from alignjax import evaluate as measuring
from alignjax.cli import merge, merge_search_show, report
from alignjax.core import tree
from alignjax.core.errors import UserError
from alignjax.models import decoder
from alignjax.models.config import to_json
from alignjax.system import model_dir
from tests import tiny

CONFIG = tiny.config(layers=3, width=16, hidden=24)
SETTINGS = {
  'tokenizer': '',
  'model': {'name': 'start'},
  'start': {'policy': 'base'},
  'source': {
    'name': 'sources.prompts',
    'path': 'prompts.jsonl',
    'prompt_tokens': 8,
    'whole': True,
  },
  'reward': {'name': 'text.pattern', 'regex': '[ -~]{2}'},
  'responses': 2,
  'reference_responses': 2,
  'prompts': 12,
  'batch_size': 3,
  'max_new_tokens': 6,
  'temperature': 1.0,
  'samples': 1,
  'seed': 0,
}
TRIALS = 10


@pytest.fixture(scope='module')
def made(tmp_path_factory):
  """A folder with a base, two models, prompts and a config."""
  path = tmp_path_factory.mktemp('search')
  base = decoder.init(CONFIG, jax.random.key(0))
  for seed, (name, far) in enumerate([('base', 0), ('a', 0.4), ('b', 0.9)]):
    noise = decoder.init(CONFIG, jax.random.key(seed))
    weights = jax.tree.map(lambda x, y, f=far: x + f * (y - x), base, noise)
    model_dir.write(
      path / name,
      config=to_json(CONFIG),
      params={'policy': jax.tree.map(np.asarray, tree.unstack(weights))},
      provenance={},
    )
  words = [f'{chr(97 + i)}{i}' for i in range(14)]
  (path / 'prompts.jsonl').write_text(
    ''.join(json.dumps({'text': word}) + '\n' for word in words)
  )
  (path / 'job.json').write_text(json.dumps(SETTINGS))
  return path


@pytest.fixture(autouse=True)
def here(made, monkeypatch):
  monkeypatch.chdir(made)


def search(workdir, *more, method='slerp', numbers='t', trials=TRIALS):
  words = f'search {method} --base base --models a b --evaluation job.json'
  words += f' --workdir {workdir} --numbers {numbers} --groups 3'
  words += f' --trials {trials} --population 4'
  return merge.main([*words.split(), *more])


@pytest.fixture(scope='module')
def whole(made):
  """A search that nothing interrupted."""
  with pytest.MonkeyPatch.context() as patch:
    patch.chdir(made)
    assert search('whole') == 0
  return made / 'whole'


def rows(workdir):
  text = (workdir / 'search.jsonl').read_text()
  return [json.loads(line) for line in text.splitlines()]


def same(one, other):
  assert rows(one) == rows(other)
  for file in ('search.jsonl', 'evaluation.json', 'config.json'):
    told = [(x / file).read_text().replace(str(x), 'W') for x in (one, other)]
    assert told[0] == told[1], file
  digests = [
    model_dir.digest(model_dir.read(x / 'model')) for x in (one, other)
  ]
  assert digests[0] == digests[1]


def test_the_best_trial_is_what_is_written_and_evaluated(whole):
  trials = rows(whole)
  document = json.loads((whole / 'evaluation.json').read_text())
  found = document['search']
  best = max(trials, key=lambda row: row['objective'])
  assert len(trials) == found['trials'] == TRIALS
  assert (found['trial'], found['numbers']) == (best['trial'], best['numbers'])
  assert len({row['objective'] for row in trials}) > 5 and best['trial'] > 1
  for row in trials:
    np.testing.assert_allclose(
      row['objective'], row['reward'] - 0.1 * row['kl'], rtol=1e-12
    )
  # Merged on disk and evaluated on the same prompts: the very same number.
  names = ['base', 'a', 'b', 'default merge', 'best']
  assert [model['name'] for model in document['models']] == names
  searched = found['searched']
  np.testing.assert_allclose(searched['best'], best['objective'], rtol=1e-12)
  # The first trial, the middle, is the merge with default numbers.
  assert trials[0]['numbers'] == {'t': [0.5, 0.5, 0.5]}
  np.testing.assert_allclose(
    searched['default merge'], trials[0]['objective'], rtol=1e-6
  )
  base = document['models'][0]
  assert base['kind'] == 'init' and abs(base['kl']['mean']) < 1e-4
  assert document['prompts'] == 6


def test_the_model_says_how_to_make_it_again(whole):
  made = model_dir.read(whole / 'model')
  record = made.provenance['merge']
  found = json.loads((whole / 'evaluation.json').read_text())['search']
  assert record['where'] == found['where'] and len(record['where']) == 3
  out = whole.parent / 'rebuilt'
  assert merge.main(['--rebuild', str(whole / 'model'), '--out', str(out)]) == 0
  assert model_dir.digest(model_dir.read(out)) == model_dir.digest(made)


def test_held_out_prompts_are_others(whole):
  kept = measuring.Responses._fields
  with np.load(whole / 'responses' / 'best.npz') as arrays:
    every = measuring.Responses(**{name: arrays[name] for name in kept})
  document = json.loads((whole / 'evaluation.json').read_text())
  (best,) = [m for m in document['models'] if m['name'] == 'best']
  objective = every.rewards[..., 0] - 0.1 * every.kl
  np.testing.assert_allclose(
    best['objective']['mean'], objective[6:].mean(), rtol=1e-5
  )
  np.testing.assert_allclose(
    document['search']['searched']['best'], objective[:6].mean(), rtol=1e-5
  )
  with np.load(whole / 'responses' / 'default_merge.npz') as arrays:
    other = arrays['rewards'][..., 0] - 0.1 * arrays['kl']
  gain = document['search']['gains']['default merge']
  paired = (objective - other).mean(axis=1)
  np.testing.assert_allclose(
    gain['held_out']['mean'], paired[6:].mean(), rtol=1e-4, atol=1e-6
  )
  np.testing.assert_allclose(
    gain['searched'], paired[:6].mean(), rtol=1e-4, atol=1e-6
  )


def test_the_report_reads_it(whole, tmp_path):
  out = tmp_path / 'report.html'
  assert report.main([str(whole), '--out', str(out)]) == 0
  page = out.read_text()
  assert 'The search for the numbers' in page and 'best so far' in page
  document = json.loads((whole / 'evaluation.json').read_text())
  for gain in document['search']['gains'].values():
    assert gain['verdict'] in page


def test_an_interrupted_search_goes_on(whole, made, monkeypatch, capsys):
  calls = []
  responses = measuring.responses

  def stopped(*args, **more):
    calls.append(args)
    if len(calls) == 7:
      raise KeyboardInterrupt
    return responses(*args, **more)

  monkeypatch.setattr(measuring, 'responses', stopped)
  assert search('stopped') == 75
  assert 'the same command continues' in capsys.readouterr().err
  assert len(rows(made / 'stopped')) == 6
  with open(made / 'stopped/search.jsonl', 'a') as file:
    file.write('{"trial": 7, "numbe')  # as a kill leaves it
  monkeypatch.setattr(measuring, 'responses', responses)
  assert search('stopped') == 0
  same(whole, made / 'stopped')
  # Once more: all is there.
  assert search('stopped') == 0
  same(whole, made / 'stopped')


def test_another_search_in_the_folder_is_refused(whole, made):
  shutil.copytree(whole, made / 'taken')
  before = (made / 'taken/config.json').read_text()
  for more, message in (
    (['--seed', '1'], 'taken holds another search: seed: 0 -> 1'),
    (['--kl_coef', '0.2'], 'kl_coef: 0.1 -> 0.2'),
    (['--over', 't=0.1:1'], r'search.t: \[0.0, 1.0\] -> \[0.1, 1.0\]'),
    (['--evaluation.temperature=0.5'], 'evaluation.temperature: 1.0 -> 0.5'),
    (['--trials', '5'], '--trials 5: .* has 10 already'),
  ):
    with pytest.raises(UserError, match=message):
      search('taken', *more)
  assert (made / 'taken/config.json').read_text() == before
  (made / 'taken/config.json').unlink()
  with pytest.raises(UserError, match='has trials, but no config.json'):
    search('taken')


def test_weights_of_each_model_and_fixed_numbers(made, capsys):
  more = ['--density', '0.5', '--over', 'weights=0.2:1', 'scale=0.5:1']
  more += ['--held_out', '0.2', '--kl_coef', '0']
  assert search('ties', *more, method='ties', numbers='weights scale') == 0
  first = rows(made / 'ties')[0]
  assert first['numbers'] == {'weights': [[0.6, 0.6]] * 3, 'scale': [0.75] * 3}
  assert first['objective'] == first['reward']
  said = capsys.readouterr().out
  assert '9 variable(s), layers 0, 1, 2' in said
  assert 'trials on 9 prompts' in said and 'best on 3 held-out' in said
  record = model_dir.read(made / 'ties/model').provenance['merge']
  assert record['numbers'] == {'density': 0.5}
  assert 'weights=[' in record['where'][0] and 'scale=' in record['where'][0]


def test_twins_of_searched_prompts_are_not_held_out(made, capsys):
  words = ['same', 'same', 'same', 'same', *(f'w{i}' for i in range(8))]
  (made / 'twins.jsonl').write_text(
    ''.join(json.dumps({'text': word}) + '\n' for word in words)
  )
  more = ['--evaluation.source.path=twins.jsonl', '--dry-run']
  assert search('twins', *more) == 0
  said = capsys.readouterr().out
  assert 'more are twins of searched ones' in said
  (made / 'twins.jsonl').write_text((json.dumps({'text': 'x'}) + '\n') * 12)
  with pytest.raises(UserError, match='0 prompts are held out'):
    search('twins', *more)


def test_a_dry_run_writes_nothing(made, capsys):
  before = sorted(made.iterdir())
  assert search('dry', '--dry-run') == 0
  assert sorted(made.iterdir()) == before
  said = capsys.readouterr().out
  assert 'slerp: t from 0 to 1; 3 variable(s)' in said
  assert search('dry', '--dry-run', trials=4) == 0
  assert 'drawn at random' in capsys.readouterr().out


@pytest.mark.parametrize(
  ('more', 'message'),
  [
    (['--numbers', 'tt'], "no number 'tt'"),
    (['--over', 't=0:2'], 't must be a number from 0 to 1, found 2'),
    (['--groups', '0'], '--groups 0: expected 1 to 3'),
    (['--groups', '4'], '--groups 4: expected 1 to 3'),
    (['--t', '0.5'], '--t is given, and searched'),
    (['--trials', '0'], '--trials 0: expected 1 or more'),
    (['--population', '3'], '--population 3: expected 4 or more'),
    (['--held_out', '0'], '--held_out 0: expected more than 0'),
    (['--held_out', '1'], '--held_out 1: expected'),
    (['--kl_coef', '-1'], '--kl_coef -1: expected 0 or more'),
    (['--kl_coef', 'nan'], '--kl_coef nan: expected 0 or more'),
    (['--evaluation.prompts=3'], 'prompts = 3: expected 6 or more'),
    (['--evaluation.prompts=15'], 'at most the 14 prompts'),
    (['--evaluation.promts=6'], "no field 'promts'.*did you mean 'prompts'"),
    (['--evaluation', 'nowhere.json'], 'nowhere.json'),
    (['--config.seed=1'], "unknown argument '--config.seed=1'"),
    (['--grups=2'], "unknown argument '--grups=2'"),
    (['--models', 'a'], 'slerp takes 2 or more model'),
    (['--models', 'a', 'nowhere'], 'no model at'),
    (['--workdir', 'base'], 'base/model_default lies inside an input'),
  ],
)
def test_bad_input_is_named(made, more, message):
  before = sorted(made.iterdir())
  with pytest.raises(UserError, match=message):
    search('bad', *more)
  assert sorted(made.iterdir()) == before


def test_the_library_or_the_evaluation_is_missing(monkeypatch):
  with pytest.raises(UserError, match='--evaluation=E is missing'):
    words = 'search slerp --base base --models a b --workdir w --numbers t'
    merge.main(words.split())
  monkeypatch.setitem(sys.modules, 'cmaes', None)
  with pytest.raises(UserError, match='pip install'):
    search('bad')


def test_verdicts():
  said = [
    merge_search_show.verdict({'low': low, 'high': high})
    for low, high in ((0.1, 0.2), (-0.1, 0.2), (-0.2, -0.1))
  ]
  assert len({*said}) == 3 and said[0] == 'it holds out'


def test_help_needs_no_jax():
  code = (
    'import sys; from alignjax.cli import merge\n'
    'try: merge.main(["search", "--help"])\n'
    'except SystemExit: pass\n'
    'assert "jax" not in sys.modules and "numpy" not in sys.modules'
  )
  words = [sys.executable, '-c', code]
  said = subprocess.run(words, capture_output=True, text=True, check=True)
  assert '--held_out' in said.stdout and 'KL to the base' in said.stdout


def test_what_the_method_refuses_ends_the_search_at_once(made):
  more = ['--models', 'a', 'b', 'a']
  with pytest.raises(UserError, match='takes t for two models only'):
    search('three', *more)
  assert not (made / 'three/search.jsonl').exists()
