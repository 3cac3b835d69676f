import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from alignjax.cli import run
from alignjax.core.errors import UserError

ROOT = Path(__file__).parents[2]

# Counts its starts in starts.txt, then does what its config says.
VERB = """
import json, os, pathlib, signal, sys, time

flags = dict(a.removeprefix('--').split('=', 1) for a in sys.argv[1:])
work = pathlib.Path(flags['workdir'])
config = json.loads(pathlib.Path(flags['config']).read_text())
with open(work / 'starts.txt', 'a') as file:
  file.write(json.dumps(sys.argv[1:]) + chr(10))

def stop(number, frame):
  with open(work / 'signals.txt', 'a') as file:
    file.write(f'{number}' + chr(10))
  time.sleep(0.3)  # "saving"
  sys.exit(75)

if config['waits'] and not (work / 'go_on').exists():
  signal.signal(signal.SIGTERM, stop)
  signal.signal(signal.SIGINT, stop)
  (work / 'pid.tmp').write_text(str(os.getpid()))
  os.rename(work / 'pid.tmp', work / 'pid')
  time.sleep(60)
if config['kills']:
  os.kill(os.getpid(), signal.SIGKILL)
for path in config['reads']:
  assert os.path.isabs(path) and pathlib.Path(path).read_text() == 'done'
print('child', work.name, flush=True)
if config['code'] == 0:
  (work / 'out.txt').write_text('done')
sys.exit(config['code'])
"""

PROGRAM = """
from ml_collections import ConfigDict
from alignjax.cloud.jobs import Job

def job(name, needs=(), **changed):
  config = {'lr': 0.1, 'code': 0, 'waits': False, 'kills': False, 'reads': ()}
  config['reads'] = tuple(f'@{need}/out.txt' for need in needs)
  return config | changed

def get_config():
  return ConfigDict({'lr': 0.1, 'b_code': 0, 'b_waits': False,
                     'b_kills': False, 'runs': 2, 'verb': 'fakes.verb'})

def jobs(c):
  yield Job('c', c.verb, job('c', ('b_1',)), ('b_1',), ('--in=@b_1/out.txt',))
  yield Job('a', c.verb, job('a', lr=c.lr))
  for i in range(1, c.runs + 1):
    yield Job(f'b_{i}', c.verb, job('b', ('a',), code=c.b_code,
              waits=c.b_waits, kills=c.b_kills), ('a',))
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
  (tmp_path / 'fakes').mkdir()
  (tmp_path / 'fakes' / 'verb.py').write_text(VERB)
  (tmp_path / 'tiny.py').write_text(PROGRAM)
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv('PYTHONPATH', str(ROOT))
  return tmp_path


ARGV = ['--config=tiny.py', '--workdir=w']
ALL = ['a', 'b_1', 'c', 'b_2']


def starts():
  """Job name -> how often it was started (and not removed since)."""
  return {
    path.parent.name: len(path.read_text().splitlines())
    for path in Path('w').glob('*/starts.txt')
  }


def marked():
  return sorted(path.stem for path in Path('w/.jobs').glob('*.json'))


def test_runs_in_order_and_not_again(capfd):
  assert run.main(ARGV) == 0
  out = capfd.readouterr().out
  assert [line.split()[1] for line in out.splitlines() if 'child' in line] == [
    'a',
    'b_1',
    'c',
    'b_2',
  ]
  assert '[3/4] c (fakes.verb)\nchild c\n[3/4] c: done in ' in out
  assert '4 of 4 jobs done; this took ' in out
  assert marked() == sorted(ALL)
  argument = json.loads(Path('w/c/starts.txt').read_text())
  assert argument[0] == '--config=w/c/job.json'
  assert argument[1] == '--workdir=w/c'
  assert argument[2] == f'--in={Path("w/b_1/out.txt").resolve()}'

  assert run.main(ARGV) == 0
  out = capfd.readouterr().out
  assert 'child' not in out and '[1/4] a: done before' in out
  assert starts() == dict.fromkeys(ALL, 1)


def test_a_moved_workdir_is_still_done():
  assert run.main(ARGV) == 0
  os.rename('w', 'v')
  assert run.main(['--config=tiny.py', '--workdir=v']) == 0
  os.rename('v', 'w')
  assert starts() == dict.fromkeys(ALL, 1)


def test_a_changed_config_is_refused_unless_rerun(capfd):
  assert run.main(ARGV) == 0
  config = Path('w/config.json').read_text()
  changed = [*ARGV, '--config.lr=0.2']
  with pytest.raises(UserError) as error:
    run.main(changed)
  assert str(error.value) == (
    "job 'a' is finished with another config: lr: 0.1 -> 0.2;"
    ' use --rerun to run it and what depends on it again'
  )
  assert starts() == dict.fromkeys(ALL, 1)
  assert Path('w/config.json').read_text() == config
  assert run.main([*changed, '--rerun']) == 0
  assert json.loads(Path('w/a/job.json').read_text())['lr'] == 0.2
  assert starts() == dict.fromkeys(ALL, 1)  # all were removed and run again
  assert capfd.readouterr().out.count('child') == 8
  # The change is now what is finished, with and without --rerun.
  assert run.main(changed) == 0 and run.main([*changed, '--rerun']) == 0
  assert 'child' not in capfd.readouterr().out


def test_rerun_by_name_takes_dependants_and_no_others(capfd):
  assert run.main(ARGV) == 0
  capfd.readouterr()
  assert run.main([*ARGV, '--rerun', 'b_1']) == 0
  out = capfd.readouterr().out
  assert 'child b_1' in out and 'child c' in out
  assert 'child a' not in out and 'child b_2' not in out
  with pytest.raises(UserError, match="no job 'b_3'; did you mean 'b_[12]'"):
    run.main([*ARGV, '--rerun', 'b_3'])


def test_rerun_by_name_still_refuses_other_changes():
  assert run.main(ARGV) == 0
  with pytest.raises(UserError, match="job 'a' is finished with another"):
    run.main([*ARGV, '--config.lr=0.2', '--rerun', 'c'])


@pytest.mark.parametrize('code', [1, 2, 9])
def test_a_failure_stops_with_its_code_and_its_folder_is_kept(code, capfd):
  assert run.main([*ARGV, f'--config.b_code={code}']) == code
  error = capfd.readouterr().err
  assert f"job 'b_1' (fakes.verb) failed with exit code {code}" in error
  assert marked() == ['a'] and starts() == {'a': 1, 'b_1': 1}
  with pytest.raises(UserError) as refused:
    run.main(ARGV)
  assert f"b_1' is started with another config: code: {code} -> 0" in str(
    refused.value
  )
  # The same command runs it again, in the same folder.
  assert run.main([*ARGV, f'--config.b_code={code}']) == code
  assert starts() == {'a': 1, 'b_1': 2}


def test_a_child_that_is_killed_and_one_that_was_interrupted(capfd):
  assert run.main([*ARGV, '--config.b_kills=true']) == 128 + signal.SIGKILL
  assert run.main([*ARGV, '--rerun', '--config.b_code=75']) == 75
  error = capfd.readouterr().err
  assert 'interrupted; run the same command without --rerun' in error


def test_only(capfd):
  with pytest.raises(UserError, match="'c' needs 'b_1', which is not finished"):
    run.main([*ARGV, '--only', 'c'])
  assert run.main([*ARGV, '--only', 'a']) == 0
  assert starts() == {'a': 1}
  assert '1 of 4 jobs done' in capfd.readouterr().out
  with pytest.raises(UserError, match="no job 'z'"):
    run.main([*ARGV, '--only', 'z'])


def test_dry_run_writes_nothing(capfd):
  assert run.main([*ARGV, '--dry-run']) == 0
  out = capfd.readouterr().out
  assert '[1/4] a (fakes.verb): to do' in out
  assert '-m fakes.verb --config=w/a/job.json --workdir=w/a' in out
  assert not Path('w').exists()
  assert run.main([*ARGV, '--only=a']) == 0
  capfd.readouterr()
  assert run.main([*ARGV, '--dry-run', '--rerun', 'a']) == 0
  assert '[1/4] a (fakes.verb): to do again' in capfd.readouterr().out
  assert starts() == {'a': 1}


def test_a_removed_folder_is_not_done():
  assert run.main(ARGV) == 0
  os.rename('w/b_2', 'elsewhere')
  assert run.main([*ARGV, '--config.b_code=0']) == 0
  assert starts() == dict.fromkeys(ALL, 1) and Path('w/b_2/out.txt').exists()


def test_a_removed_folder_then_a_failure_is_not_done():
  assert run.main(ARGV) == 0
  os.rename('w/b_2', 'elsewhere')
  Path('fakes/verb.py').write_text('raise SystemExit(3)')
  assert run.main(ARGV) == 3
  assert 'b_2' not in marked()


def test_jobs_that_the_config_no_longer_has():
  assert run.main(ARGV) == 0
  fewer = [*ARGV, '--config.runs=1']
  with pytest.raises(UserError, match="holds the job 'b_2', which this"):
    run.main(fewer)
  assert run.main([*fewer, '--rerun']) == 0
  assert Path('w/b_2/out.txt').exists()  # left alone
  assert run.main(fewer) == 0


@pytest.mark.parametrize(
  'name, sentence',
  [
    ('config.json', 'is the workdir of another run'),
    ('thesis.tex', 'is not empty and no workdir'),
  ],
)
def test_another_workdir(name, sentence):
  Path('w').mkdir()
  Path('w', name).write_text('{}')
  with pytest.raises(UserError, match=sentence):
    run.main(ARGV)
  assert os.listdir('w') == [name]


@pytest.mark.parametrize(
  'argv, sentence',
  [
    (['--config=absent.py', '--workdir=w'], 'absent.py: No such file'),
    ([*ARGV, '--config.lrr=1'], "no field 'lrr' .* did you mean 'lr'"),
    ([*ARGV, '--dryrun'], "unknown argument '--dryrun'"),
    ([*ARGV, '--config.verb=trian'], "no verb 'trian'; did you mean 'train'"),
    (['--config=tiny.py', '--workdir=tiny.py'], 'tiny.py is not a folder'),
    (['--config=c.json', '--workdir=w'], 'program with jobs'),
    ([*ARGV, '--config.runs=0'], "needs 'b_1', which is no job"),
  ],
)
def test_bad_input_leaves_nothing(argv, sentence):
  Path('c.json').write_text('{}')
  with pytest.raises(UserError, match=sentence):
    run.main(argv)
  assert not Path('w').exists()


def spawn(*more):
  return subprocess.Popen(
    [sys.executable, '-m', 'alignjax.cli', 'run', *ARGV, *more],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    process_group=0,
  )


def wait_for(path, seconds=30.0):
  end = time.monotonic() + seconds
  while not Path(path).exists():
    assert time.monotonic() < end, f'{path} never came'
    time.sleep(0.02)
  return Path(path).read_text()


def alive(pid):
  try:
    state = Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0]
  except FileNotFoundError:
    return False
  return state != 'Z'


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_the_child_once_and_the_same_command_continues(number):
  runner = spawn('--config.b_waits=true')
  child = int(wait_for('w/b_1/pid'))
  assert os.getpgid(child) != os.getpgid(runner.pid)  # no second Ctrl-C
  os.killpg(runner.pid, number)  # as a terminal does
  time.sleep(0.1)
  runner.send_signal(number)  # an impatient user
  _, error = runner.communicate(timeout=30)
  assert runner.returncode == 75
  assert error == (
    'alignjax run: interrupted; run the same command to continue\n'
  )
  assert Path('w/b_1/signals.txt').read_text() == f'{number.value}\n'
  assert marked() == ['a']

  Path('w/b_1/go_on').touch()
  Path('w/b_2').mkdir()
  Path('w/b_2/go_on').touch()
  assert run.main([*ARGV, '--config.b_waits=true']) == 0
  assert starts() == {'a': 1, 'b_1': 2, 'c': 1, 'b_2': 1}


@pytest.mark.skipif(sys.platform != 'linux', reason='prctl')
def test_a_killed_runner_takes_its_child_along_and_leaves_no_lock():
  runner = spawn('--config.b_waits=true')
  child = int(wait_for('w/b_1/pid'))
  assert alive(child)
  with pytest.raises(UserError, match=rf'w is in use .*process {runner.pid}\)'):
    run.main([*ARGV, '--config.b_waits=true'])
  runner.kill()
  runner.communicate(timeout=30)
  end = time.monotonic() + 10
  while alive(child):
    assert time.monotonic() < end, 'the child outlived the runner'
    time.sleep(0.02)
  for name in ('b_1', 'b_2'):
    Path(f'w/{name}').mkdir(exist_ok=True)
    Path(f'w/{name}/go_on').touch()
  assert run.main([*ARGV, '--config.b_waits=true']) == 0
  assert starts() == {'a': 1, 'b_1': 2, 'c': 1, 'b_2': 1}


def test_a_kill_while_removing_never_leaves_half_a_job_done(monkeypatch):
  assert run.main(ARGV) == 0
  gone = []

  def die(path, *_, **__):
    gone.append(path)
    if Path(path).is_dir():
      raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(run.shutil, 'rmtree', die)
    with pytest.raises(KeyboardInterrupt):
      run.main([*ARGV, '--rerun', 'a'])
  assert 'b_2' not in marked() and not Path('w/b_2').exists()
  assert run.main(ARGV) == 0
  assert starts() == dict.fromkeys(ALL, 1)
  assert not list(Path('w/.jobs').glob('.removed-*'))
