"""`alignjax merge sweep` on tiny models; its jobs run in this process."""

import contextlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from alignjax.cli import config as configs
from alignjax.cli import evaluate, merge, merge_sweep, report
from alignjax.cloud import local
from alignjax.core import tree
from alignjax.core.errors import UserError
from alignjax.core.lookup import defaults
from alignjax.models import decoder
from alignjax.models.config import to_json
from alignjax.system import model_dir
from tests import tiny

VERBS = {'merge': merge, 'evaluate': evaluate, 'report': report}
GRID = ['--methods', 'slerp', 'lerp', 'linear', 'ties', '--t', '.3', '.7', '.3']
GRID += ['--density', '.5', '--scale', '.5', '1']
POINTS = [
  *('slerp t 0.3', 'slerp t 0.7', 'linear t 0.3', 'linear t 0.7'),
  *('ties density 0.5, scale 0.5', 'ties density 0.5, scale 1'),
]
ran = []


@contextlib.contextmanager
def here():
  """As `local.children`, in this process; what ran is in `ran`."""

  def start(command):
    verb = command[2].removeprefix('alignjax.cli.')
    ran.append(Path(command[4].removeprefix('--workdir=')).name)
    return local.Exit(VERBS[verb].main(command[3:]), False)

  yield start


def in_process(patch, where):
  patch.setattr(local, 'children', here)
  # The runner sets these for its children.
  patch.setenv('JAX_COMPILATION_CACHE_DIR', str(where / 'cache'))
  patch.setenv('GLIBC_TUNABLES', '')
  ran.clear()


@pytest.fixture(autouse=True)
def no_children(monkeypatch, where):
  in_process(monkeypatch, where)


@pytest.fixture(scope='module')
def where(tmp_path_factory):
  """base, a, b, and an evaluation of nothing that is there."""
  path = tmp_path_factory.mktemp('sweep')
  shape = tiny.config(layers=1, width=16, hidden=16, heads=2, kv_heads=1)
  (path / 'text').mkdir()
  for i in range(24):
    lines = [f'def f_{i}_{j}(x):\n  return x + {j}\n\n' for j in range(12)]
    (path / 'text' / f'file_{i:02}.py').write_text(''.join(lines))
  for seed, name in enumerate(('base', 'a', 'b')):
    weights = jax.tree.map(
      np.asarray, tree.unstack(decoder.init(shape, jax.random.key(seed)))
    )
    model_dir.write(
      str(path / name),
      config=to_json(shape),
      params={'policy': weights},
      provenance={'by': name},
    )
  source = dict(path=str(path / 'text'), part='all', prompt_tokens=24)
  config = {
    'tokenizer': '',
    'model': {'name': 'start'},
    'start': {'policy': 'elsewhere'},
    'source': defaults('data', 'sources.prompts', **source),
    'reward': defaults('rewards', 'verify.python_code', min_tokens=1),
    'models': [{'name': 'x', 'kind': 'init', 'path': 'elsewhere'}],
    'reference': 'x',
    'responses': 2,
    'reference_responses': 2,
    'prompts': 16,
    'batch_size': 8,
    'samples': 1,
    'max_new_tokens': 3,
    'temperature': 1.0,
    'seed': 0,
  }
  (path / 'e.json').write_text(configs.to_json(config))
  return path


def words(where, workdir, *more):
  return [
    *('sweep', '--base', str(where / 'base')),
    *('--models', str(where / 'a'), str(where / 'b')),
    *(f'--evaluation={where / "e.json"}', '--evaluation.prompts=8'),
    *('--workdir', str(workdir), *more),
  ]


def small(where, workdir, *more):
  return words(where, workdir, '--methods', 'linear', '--t', '.2', '.8', *more)


@pytest.fixture(scope='module')
def swept(where):
  """One whole sweep: (workdir, what it printed)."""
  import io

  out = io.StringIO()
  with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
    in_process(patch, where)
    assert merge.main(words(where, where / 'w', *GRID)) == 0
  return where / 'w', out.getvalue()


def test_every_method_takes_its_numbers_in_all_combinations(swept):
  workdir, said = swept
  evaluation = json.loads((workdir / 'evaluate/evaluation.json').read_text())
  names = [model['name'] for model in evaluation['models']]
  assert names == ['init', 'a', 'b', *POINTS]
  assert evaluation['reference'] == 'init' and evaluation['prompts'] == 8
  ties = evaluation['models'][-1]
  assert ties['series'] == 'ties' and ties['kind'] == 'merged'
  assert ties['numbers'] == {'density': 0.5, 'scale': 1}
  assert '[4/5] evaluate (evaluate)' in said  # a job a method, then two


def test_the_results_are_told_by_reward(swept):
  workdir, said = swept
  rows = json.loads((workdir / 'sweep.json').read_text())['points']
  assert sorted(row['name'] for row in rows) == sorted(POINTS)
  rewards = [row['reward']['mean'] for row in rows]
  assert rewards == sorted(rewards, reverse=True)
  table = said[said.index('\npoint ') + 1 :].splitlines()
  assert [line.split('  ')[0] for line in table[1:7]] == [
    row['name'] for row in rows
  ]
  for row, line in zip(rows, table[1:]):
    assert line.endswith('front') == row['front']
    low, high = row['kl']['low'], row['kl']['high']
    assert f'{row["kl"]["mean"]:.2f} [{low:.2f}, {high:.2f}]' in line
  assert table[7] == f'report: {workdir}/report.html'


def test_a_point_is_what_merge_gives(swept, where, tmp_path):
  workdir, _ = swept
  inputs = words(where, '')[1:6]
  ties = ['ties', *inputs, '--density', '.5', '--scale', '1']
  for argv, path in (
    (['slerp', *inputs, '--t', '.7'], 'merge_slerp/t_0.70'),
    (ties, 'merge_ties/density_0.50_scale_1.00'),
  ):
    out = str(tmp_path / argv[0])
    assert merge.main([*argv, '--out', out]) == 0
    one, two = (
      model_dir.digest(model_dir.read(p)) for p in (out, workdir / path)
    )
    assert one == two


def test_the_report_has_the_front(swept):
  page = (swept[0] / 'report.html').read_text()
  assert 'are on the Pareto front of mean reward against KL' in page
  assert 'The best merged model by reward is ' in page
  for text in ('>slerp<', '>linear<', '>ties<', '>t 0.7<', '>aligned run<'):
    assert text in page
  assert '>density 0.5, scale 0.5<' in page


def test_a_finished_sweep_is_not_run_again(swept, where):
  rows = (swept[0] / 'sweep.json').read_text()
  assert merge.main(words(where, swept[0], *GRID)) == 0
  assert ran == [] and (swept[0] / 'sweep.json').read_text() == rows


def test_it_goes_on_after_a_kill_and_keeps_the_best(
  where, tmp_path, monkeypatch, capsys
):
  argv = small(where, tmp_path / 'w', '--keep', '1')
  with monkeypatch.context() as patch:
    patch.setattr(evaluate, 'main', lambda argv: 137)
    assert merge.main(argv) == 137
  assert ran == ['merge_linear', 'evaluate']
  assert not (tmp_path / 'w/sweep.json').exists()
  assert merge.main(argv) == 0
  assert ran == ['merge_linear', 'evaluate', 'evaluate', 'report']
  rows = json.loads((tmp_path / 'w/sweep.json').read_text())['points']
  assert [row['kept'] for row in rows] == [True, False]
  left = [path.name for path in (tmp_path / 'w/merge_linear').glob('t_*')]
  assert left == [Path(rows[0]['path']).name]
  # Nothing is missed until something runs again.
  assert merge.main([*argv, '--rerun']) == 0 and len(ran) == 4
  with pytest.raises(UserError, match="job 'evaluate' is finished with anoth"):
    merge.main([*argv, '--evaluation.seed=1'])
  capsys.readouterr()
  again = [*argv, '--evaluation.seed=1', '--rerun', '--dry-run']
  assert merge.main(again) == 0
  assert capsys.readouterr().out.count(': to do again\n') == 3


def test_a_dry_run_writes_nothing(where, tmp_path, capsys):
  assert merge.main(small(where, tmp_path / 'w', '--dry-run')) == 0
  said = capsys.readouterr().out
  assert f'linear t 0.2: {tmp_path}/w/merge_linear/t_0.20\n' in said
  assert '2 merged models; 0.00 GB are to be written' in said
  assert '[3/3] report (report): to do' in said
  assert not (tmp_path / 'w').exists() and ran == []


@pytest.mark.parametrize(
  ('more', 'message'),
  [
    (['--methods', 'slrp'], "did you mean 'slerp'"),
    (['--density', '.5'], '--density: none of the methods linear takes it'),
    (['--scale', '.5', '--methods', 'ties', 'sce', '--t', '1'], '--t: none of'),
    (['--t', '.5', '3'], 't must be a number from 0 to 1, found 3'),
    (
      ['--densty', '.5'],
      "unknown argument '--densty'; did you mean '--density",
    ),
    (['--models', 'nowhere'], 'no model at .*nowhere'),
    (['--evaluation', 'nowhere.json'], 'nowhere.json'),
    (['--evaluation.prompt=8'], "no field 'prompt'.*did you mean 'prompts'"),
    (['--evaluation.prompts=7'], 'prompts = 7: expected a multiple of batch'),
    (['--weights', '1', '2'], 'linear takes t or weights, not both'),
    (['--keep', 'some'], "--keep is 'some', expected a whole number"),
    (['--where', 'x:t=0.5'], 'matches no leaf'),
    (['--workdir', 'another'], 'another is the workdir of another run'),
    (['--workdir', 'full'], 'not empty and no workdir of'),
    (['--workdir', 'graph'], "holds the job 'train'"),
  ],
)
def test_bad_input_is_told_before_anything(
  where, tmp_path, monkeypatch, more, message
):
  monkeypatch.chdir(tmp_path)
  for folder, file in (
    ('another', 'config.json'),
    ('full', 'x'),
    ('graph/.jobs', 'train.json'),
  ):
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / folder / file).touch()
  with pytest.raises(UserError, match=message):
    merge.main(small(where, 'w', *more))
  assert ran == [] and not (tmp_path / 'w').exists()


def test_an_evaluation_without_a_reward(where, tmp_path):
  config = json.loads((where / 'e.json').read_text())
  del config['reward']
  (tmp_path / 'e.json').write_text(json.dumps(config))
  argv = small(where, tmp_path / 'w', '--evaluation', str(tmp_path / 'e.json'))
  with pytest.raises(UserError, match="e.json: no 'reward'; it is needed here"):
    merge.main(argv)
  assert not (tmp_path / 'w').exists()


def test_a_full_disk_is_told_before_anything(where, tmp_path, monkeypatch):
  full = shutil.disk_usage(tmp_path)._replace(free=10)
  monkeypatch.setattr(shutil, 'disk_usage', lambda path: full)
  with pytest.raises(UserError, match='the merged models take .* are free'):
    merge.main(small(where, tmp_path / 'w'))
  assert not (tmp_path / 'w').exists()


def test_runs_are_named_by_their_folders():
  def names(*paths):
    return merge_sweep._run_names(paths, ['init', 'slerp'])

  assert names('/x/one/model', '/x/two') == ['one', 'two']
  assert names('/x/one/model', '/y/one/model') == ['run 1', 'run 2']
  assert names('/x/slerp/model', '/x/two') == ['run 1', 'run 2']


def test_help_needs_no_jax():
  code = (
    'import sys; from alignjax.cli import merge\n'
    'assert merge.main(["sweep", "--help"]) == 0\n'
    'assert "jax" not in sys.modules and "numpy" not in sys.modules'
  )
  command = [sys.executable, '-c', code]
  said = subprocess.run(command, capture_output=True, text=True, check=True)
  assert '--evaluation E' in said.stdout
