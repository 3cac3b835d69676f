"""`alignjax perplexity`: models of several formats and sizes, kills, errors."""

import json

import pytest

from alignjax.cli import perplexity
from alignjax.core.errors import UserError
from alignjax.data import tokenizer as tokenizers
from alignjax.interop import convert
from alignjax.interop.open import open as open_model
from configs.papers import distill
from tests.cli.test_papers import graph_of, strings
from tests.cli.test_teach import model


@pytest.fixture(scope='module')
def where(tmp_path_factory):
  path = tmp_path_factory.mktemp('perplexity')
  (path / 'text').mkdir()
  for i in range(24):
    lines = [f'def f_{i}_{j}(x):\n  return x + {j}\n\n' for j in range(6)]
    (path / 'text' / f'file_{i:02}.py').write_text(''.join(lines))
  model(path / 'ours')
  # Larger, with rows that are no tokens, and written by someone else.
  model(path / 'large', layers=2, width=24, vocab_size=288)
  convert.run(convert.plan(open_model(path / 'large'), path / 'hf', to='hf'))
  return path


def settings(where, **changes):
  return {
    'tokenizer': '',
    'mesh': {'data': -1},
    'batch_size': 4,
    'seed': 0,
    'source': {
      'name': 'sources.text',
      'path': str(where / 'text'),
      'length': 48,
      'part': 'held_out',
      'held_out': 0.3,
    },
    'models': [
      {'name': 'ours', 'kind': 'run', 'path': str(where / 'ours')},
      {'name': 'large', 'path': str(where / 'large'), 'series': 'big'},
      {'name': 'hf', 'path': str(where / 'hf'), 'series': 'big'},
    ],
    'reference': 'ours',
  } | changes


def run(config, folder):
  folder.mkdir(exist_ok=True)
  file = folder / 'job.json'
  file.write_text(json.dumps(config))
  perplexity.main([f'--config={file}', f'--workdir={folder / "work"}'])
  return json.loads((folder / 'work' / 'perplexity.json').read_text())


def test_models_of_any_size_and_format(where, tmp_path, capsys):
  found = run(settings(where), tmp_path)
  ours, large, hf = found['models']
  assert found['rows'] > 4 and found['tokens'] > found['rows']
  assert large['nll'] == hf['nll'] and large['parameters'] == hf['parameters']
  assert ours['gain']['mean'] == 0 and ours['parameters'] < large['parameters']
  assert ours['nll']['low'] < ours['nll']['mean'] < ours['nll']['high']
  difference = ours['nll']['mean'] - large['nll']['mean']
  assert large['gain']['mean'] == pytest.approx(difference)
  assert 'large: perplexity ' in capsys.readouterr().out


def test_what_was_read_is_kept_and_only_while_it_holds(
  where, tmp_path, monkeypatch
):
  config = settings(where)
  first = run(config, tmp_path)
  read = []
  original = perplexity._read

  def counted(opened, *rest):
    read.append(opened.path.name)
    return original(opened, *rest)

  monkeypatch.setattr(perplexity, '_read', counted)
  assert run(config, tmp_path) == first and not read
  # A killed command: the second model had not been read.
  (tmp_path / 'work' / 'rows' / 'large.npz').write_bytes(b'half')
  assert run(config, tmp_path) == first and read == ['large']
  config['source']['length'] = 32
  assert run(config, tmp_path)['rows'] != first['rows']
  assert read == ['large', 'ours', 'large', 'hf']


def test_bad_input_is_told_before_anything_is_read(where, tmp_path):
  text = ['def f(x):\n  return x\n'] * 50
  tokenizers.train(text, tmp_path / 'tokenizer.model')
  base = settings(where)
  prompts = {
    'name': 'sources.prompts',
    'path': base['source']['path'],
    'prompt_tokens': 32,
  }
  twice = [base['models'][0]] * 2
  model(tmp_path / 'wide', vocab_size=600)
  wide = [{'name': 'ours', 'path': str(tmp_path / 'wide')}]
  other = {'tokenizer': str(tmp_path / 'tokenizer.model'), 'models': wide}
  lost = [{'name': 'ours', 'path': str(where / 'nowhere')}]
  for changes, message in (
    ({'reference': 'init'}, "reference: 'init' is none of the models"),
    ({'models': twice}, 'models: two have one name'),
    ({'models': lost}, 'no model at .*nowhere'),
    ({'batch_size': 0}, 'batch_size = 0'),
    (other, 'models: ours: .*wide has another tokenizer'),
    ({'source': prompts}, 'expected at least two rows of text'),
  ):
    with pytest.raises(UserError, match=message):
      run(base | changes, tmp_path / 'bad')
    assert not (tmp_path / 'bad' / 'work').exists(), message


def test_the_experiment_compares_arms_from_one_init():
  c = distill.get_config()
  c.teacher.path = 'TEACHER'
  *runs, text, report = graph_of(distill, c)
  assert (text.verb, report.verb) == ('perplexity', 'report')
  assert len(runs) == 3 * 2 * 3 == len(text.needs)
  shared = {}
  for job in runs:
    arm, width, seed = job.name.rsplit('_', 2)
    own = {k: v for k, v in job.config.items() if k != 'recipe'}
    assert own == shared.setdefault((width, seed), own)
    assert own['start'] == {} and own['source']['part'] == 'train'
    recipe = job.config['recipe']
    assert recipe['name'] == ('sft' if arm == 'scratch' else 'distill')
  assert text.config['source'] == runs[0].config['source'] | {
    'part': 'held_out'
  }
  named = {s[1:].split('/')[0] for s in strings(text.config) if s[:1] == '@'}
  assert named == set(text.needs)
