"""`alignjax plan`: tables, records, exit codes, bad input in one sentence."""

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from alignjax.cli import config as configs
from alignjax.cli import plan
from alignjax.core.errors import UserError
from alignjax.core.lookup import defaults
from alignjax.plan import compile as compiling

ROOT = Path(__file__).parents[2]


def settings(**changes):
  config = {
    'seed': 0,
    'tokenizer': '',
    'mesh': {'data': 2, 'fsdp': 2},
    'model': defaults(
      'models',
      'gemma',
      vocab_size=512,
      width=128,
      hidden=256,
      layers=6,
      heads=4,
      kv_heads=2,
      head_dim=64,
      window=64,
      dtype='bfloat16',
      remat='full',
    ),
    'start': {},
    'recipe': defaults('recipes', 'sft'),
    'source': {'name': 'sources.text', 'length': 128},
    'optimizer': defaults('system', 'optimizer'),
    'steps': 100,
    'batch_size': 8,
    'microbatches': 1,
  }
  return config | changes


def online():
  recipe = defaults('recipes', 'jbond', max_new_tokens=16)
  return settings(
    recipe=recipe,
    source={'name': 'sources.prompts', 'prompt_tokens': 16},
    reward=defaults('rewards', 'verify.python_code'),
  )


@pytest.fixture
def written(tmp_path):
  def write(config):
    file = tmp_path / 'config.json'
    file.write_text(configs.to_json(config))
    return f'--config={file}'

  return write


def run(*argv):
  return plan.main([*argv, '--analytic'])


def test_an_estimate_says_so(written, capsys, tmp_path):
  out = tmp_path / 'plan.json'
  code = run(written(settings()), '--topology=v5e:2x2', f'--json={out}')
  assert code == 0
  shown = capsys.readouterr().out
  for word in ('fits', 'estimate', 'of 15.75 GiB', 'MFU', 'chip-hours'):
    assert word in shown
  (record,) = json.loads(out.read_text())['records']
  assert record['source'] == 'estimate' and record['fits'] is True
  assert record['mesh'] == {'data': 2, 'fsdp': 2}
  low, high = record['seconds']['low'], record['seconds']['high']
  assert 0 < low < high
  assert record['tokens_per_s'][1] == pytest.approx(8 * 128 / low)
  assert record['chip_hours'][0] == pytest.approx(100 * low * 4 / 3600)
  # Adam keeps two moments of every float32 master.
  hbm = record['hbm']
  assert hbm['optimizer'] == pytest.approx(2 * hbm['parameters'], abs=64)
  assert 'ESTIMATE' in record['assumptions'][0]


def test_without_libtpu_it_is_an_estimate(written, capsys, monkeypatch):
  monkeypatch.setattr(compiling, 'available', lambda: None)
  assert plan.main([written(settings()), '--topology=v5e:2x2']) == 0
  shown = capsys.readouterr()
  assert 'libtpu is not installed' in shown.err
  assert 'the TPU compiler was not asked' in shown.out


def test_all_programs_of_an_online_run(written, capsys, tmp_path):
  out = tmp_path / 'plan.json'
  config = written(online())
  run(config, '--topology=v5e:2x2', '--step=all', f'--json={out}')
  records = json.loads(out.read_text())['records']
  steps = [record['step'] for record in records]
  assert steps == ['rollout', 'stage ref_logp', 'train']
  rollout = records[0]
  assert rollout['hbm']['cache'] > 0 and rollout['hbm']['resident'] > 0
  assert 'caches' in capsys.readouterr().out


def test_too_large_by_how_much(written, capsys):
  config = settings(source={'name': 'sources.text', 'length': 1 << 20})
  config['model'].remat = 'none'
  assert run(written(config), '--topology=v5e:2x2') == plan.DOES_NOT_FIT
  assert 'does not fit' in capsys.readouterr().out


def test_a_search_ranks(written, capsys, tmp_path):
  out = tmp_path / 'plan.json'
  config = written(settings())
  run(config, '--topology=v5e:2x2', '--search', '--top=3', f'--json={out}')
  records = json.loads(out.read_text())['records']
  times = [record['seconds']['high'] for record in records]
  assert len(times) == 3 and times == sorted(times)
  assert 'fastest first' in capsys.readouterr().out


@pytest.mark.parametrize(
  'changes, topology, words',
  [
    ({}, 'v5p:3x3x3', 'near ones: v5p:2x4x4'),
    ({}, 'v5q:4x4x4', "no TPU generation 'v5q'"),
    ({'mesh': {'data': 3}}, 'v5e:2x2', 'does not fill the 4 devices'),
    ({'mesh': {'rows': 4}}, 'v5e:2x2', "no axis 'rows'"),
    (
      {'mesh': {'tensor': 4}},
      'v5e:2x2',
      'mesh axis tensor of size 4 does not divide .*attn/k',
    ),
    ({'batch_size': 9}, 'v5e:2x2', 'batch_size = 9 is not a multiple'),
    ({'source': {'name': 'mine'}}, 'v5e:2x2', "source 'mine' says neither"),
  ],
)
def test_bad_input_is_one_sentence(written, changes, topology, words):
  config = settings() | changes
  with pytest.raises(UserError, match=words) as error:
    run(written(config), f'--topology={topology}')
  assert '\n' not in str(error.value)


def test_a_graph_of_jobs_is_told(written):
  with pytest.raises(UserError, match='config of one training run'):
    run(written({'seed': 0}), '--topology=v5e:2x2')


def test_an_sft_run_has_no_rollout(written):
  with pytest.raises(UserError, match='no rollout'):
    run(written(settings()), '--topology=v5e:2x2', '--step=rollout')


@pytest.mark.parametrize(
  'name', sorted(f.stem for f in (ROOT / 'configs' / 'plan').glob('[!c_]*.py'))
)
def test_configs_plan_the_slice_in_their_command(name, monkeypatch, capsys):
  monkeypatch.chdir(ROOT)
  monkeypatch.syspath_prepend(str(ROOT))
  file = ROOT / 'configs' / 'plan' / f'{name}.py'
  words = file.read_text().split('COMMAND:')[1].split('"""')[0].split()
  assert words[:2] == ['alignjax', 'plan']
  argv = words[2 : words.index('--topology') + 2]
  step = ['--step', 'rollout'] if 'rollout' in words else []
  assert run(*argv, *step, '--layers', '6') == 0
  assert 'fits' in capsys.readouterr().out


def libtpu() -> bool:
  try:
    return bool(metadata.version('libtpu'))
  except metadata.PackageNotFoundError:
    return False


@pytest.mark.slow
@pytest.mark.skipif(not libtpu(), reason='needs libtpu')
def test_the_compiler_and_the_formula_agree(written, tmp_path):
  out = tmp_path / 'plan.json'
  config = written(settings())
  records = []
  for extra in ([], ['--analytic']):
    done = subprocess.run(
      [sys.executable, '-m', 'alignjax.cli.plan', config]
      + ['--topology=v5e:2x2', f'--json={out}', *extra],
      capture_output=True,
      text=True,
      timeout=900,
    )
    assert done.returncode == 0, done.stderr
    records += json.loads(out.read_text())['records']
  compiled, estimate = records
  assert compiled['source'] == 'compiler' and compiled['fits']
  for kind in ('parameters', 'optimizer', 'batch'):
    assert compiled['hbm'][kind] == estimate['hbm'][kind]
  # Tiles pad the arguments of a model this small.
  assert compiled['hbm']['peak'] > compiled['hbm']['parameters']
  assert compiled['flops']['model'] == estimate['flops']['model']
