import subprocess
import sys

import pytest

from alignjax.cli import __main__ as dispatcher
from alignjax.cli import console
from alignjax.core.errors import UserError


def alignjax(*argv, python=()):
  return subprocess.run(
    [sys.executable, *python, '-m', 'alignjax.cli', *argv],
    capture_output=True,
    text=True,
    timeout=60,
  )


def test_help_lists_the_verbs_without_importing_jax():
  done = alignjax('--help', python=['-X', 'importtime'])
  assert done.returncode == 0
  for verb, does in console.VERBS.items():
    assert f'  {verb} ' in done.stdout and does in done.stdout
  imported = {line.split('|')[-1].strip() for line in done.stderr.splitlines()}
  assert 'alignjax.cli.console' in imported
  assert not imported & {'jax', 'numpy', 'ml_collections', 'flax', 'orbax'}


def test_unknown_verb_names_the_nearest():
  done = alignjax('trian', '--config=x')
  assert done.returncode == 2 and done.stdout == ''
  assert done.stderr.startswith(
    "alignjax: no verb 'trian'; did you mean 'train'?"
  )
  assert done.stderr.count('\n') == 1


def test_bad_input_is_one_line_from_both_entries():
  argv = ['--config=absent.py', '--workdir=w']
  direct = subprocess.run(
    [sys.executable, '-m', 'alignjax.cli.run', *argv],
    capture_output=True,
    text=True,
    timeout=60,
  )
  through = alignjax('run', *argv)
  for done in (direct, through):
    assert done.returncode == 2
    assert done.stderr == (
      'alignjax run: absent.py: No such file or directory\n'
    )


def test_a_verbs_help():
  done = alignjax('run', '--help')
  assert done.returncode == 0 and '--rerun' in done.stdout


def test_call_codes(capsys):
  def raises(error):
    def main(_):
      raise error

    return main

  assert console.call('train', lambda argv: len(argv), ['a', 'b']) == 2
  assert console.call('train', lambda _: None, []) == 0
  assert console.call('train', raises(KeyboardInterrupt()), []) == 130
  assert console.call('train', raises(UserError('row 3: no text')), []) == 2
  assert capsys.readouterr().err == 'alignjax train: row 3: no text\n'
  with pytest.raises(ZeroDivisionError):
    console.call('train', raises(ZeroDivisionError()), [])


def test_no_arguments_is_help(monkeypatch, capsys):
  monkeypatch.setattr(sys, 'argv', ['alignjax'])
  assert dispatcher.main() == 0
  assert 'usage: alignjax VERB' in capsys.readouterr().out
