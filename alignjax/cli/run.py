"""`alignjax run`: the job graph of a config, on this machine, one by one.

A finished job is marked in W/.jobs and not run again; the same command
continues after an interruption or a kill. The runner starts commands and
keeps books: what a job does, and how it resumes inside, is its verb's.
"""

import argparse
import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from alignjax.cli import config, console
from alignjax.cloud import jobs, local
from alignjax.core import files, lookup
from alignjax.core.errors import UserError

_MARKS = '.jobs'


class Book(NamedTuple):
  """What the workdir says about one job.

  Attributes:
    stage: 'new', 'started' or 'finished'.
    changes: how the job differs from the one that was started or finished.
  """

  stage: str
  changes: list[str]


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog='alignjax run',
    description='Run the job graph of a config on this machine. The same'
    ' command continues where it stopped.',
    allow_abbrev=False,
  )
  parser.add_argument(
    '--config',
    required=True,
    metavar='F.py[:VARIANT]',
    help='config program; --config.a.b=value sets a field',
  )
  parser.add_argument(
    '--workdir', required=True, type=Path, metavar='W', help='a folder per job'
  )
  parser.add_argument(
    '--rerun',
    nargs='*',
    metavar='NAME',
    help='remove the outputs of these jobs (default: of those whose config'
    ' changed) and of all that depend on them, and run them again',
  )
  parser.add_argument('--only', metavar='NAME', help='run this job alone')
  parser.add_argument(
    '--dry-run', action='store_true', help='say what would be done'
  )
  return parser


def _graph(argv: Sequence[str]) -> tuple[Any, list[jobs.Job]]:
  """(config, its jobs in order, with plain configs)."""
  settings, program, rest = config.load(argv)
  if rest:
    raise UserError(f'unknown argument {rest[0]!r}; `alignjax run --help`')
  if program is None or not hasattr(program, 'jobs'):
    raise UserError(f'{argv[1]}: a config program with jobs(config) is needed')
  graph = ordered(program.jobs(settings))
  if not graph:
    raise UserError(f'{argv[1]}: jobs(config) gives no job')
  return settings, graph


def ordered(given: Iterable[jobs.Job]) -> list[jobs.Job]:
  """The jobs in order, with plain configs. Raises UserError for a bad one."""
  graph = jobs.order(
    job._replace(
      config=config.plain(job.config, f'job {job.name!r}'),
      needs=tuple(job.needs),
      arguments=tuple(map(str, job.arguments)),
    )
    for job in given
  )
  for job in graph:
    if '.' not in job.verb and job.verb not in console.VERBS:
      raise UserError(
        f'job {job.name!r}: no verb {job.verb!r}'
        f'{lookup.nearest(job.verb, console.VERBS)}'
      )
  return graph


def _read(path: Path) -> dict[str, Any] | None:
  try:
    return json.loads(path.read_text('utf-8'))
  except FileNotFoundError:
    return None
  except ValueError:
    raise UserError(f'{path}: not the mark of a job; remove it') from None


def _book(workdir: Path, name: str, fact: Mapping[str, Any]) -> Book:
  """A mark without the job's folder counts for nothing."""
  if not (workdir / name).is_dir():
    return Book('new', [])
  marks = workdir / _MARKS
  stage, mark = 'finished', _read(marks / f'{name}.json')
  if mark is None:
    stage, mark = 'started', _read(marks / f'{name}.started')
  if mark is None:
    return Book('new', [])
  if mark['hash'] == fact['hash']:
    return Book(stage, [])
  command = ('verb', 'arguments')
  changes = config.difference(mark['config'], fact['config'])
  changes += config.difference(
    {key: mark[key] for key in command} | {'needs': sorted(mark['needs'])},
    {key: fact[key] for key in command} | {'needs': sorted(fact['needs'])},
  )
  return Book(stage, changes or ['what it needs has changed'])


def books(workdir: Path, graph: Sequence[jobs.Job]) -> dict[str, Book]:
  """Name of a job -> what the workdir says about it."""
  facts = jobs.facts(graph)
  return {job.name: _book(workdir, job.name, facts[job.name]) for job in graph}


def check_workdir(workdir: Path) -> None:
  """UserError for a folder that something else has written into."""
  if workdir.exists() and not workdir.is_dir():
    raise UserError(f'--workdir={workdir} is not a folder')
  if not workdir.exists() or (workdir / _MARKS).is_dir():
    return
  if (workdir / 'config.json').exists():
    raise UserError(f'--workdir={workdir} is the workdir of another run')
  if any(workdir.iterdir()):
    raise UserError(
      f'--workdir={workdir} is not empty and no workdir of `alignjax run`'
    )


def _unknown_marks(workdir: Path, graph: Sequence[jobs.Job]) -> list[Path]:
  """Marks of jobs that this graph does not have."""
  names = {job.name for job in graph}
  marks = [
    *(workdir / _MARKS).glob('[!.]*.json'),
    *(workdir / _MARKS).glob('[!.]*.started'),
  ]
  return sorted(mark for mark in marks if mark.stem not in names)


def _again(
  args: argparse.Namespace,
  graph: Sequence[jobs.Job],
  books: Mapping[str, Book],
) -> set[str]:
  """The jobs to remove and run again; UserError for changes without --rerun."""
  known = [job.name for job in graph]
  named = [*(args.rerun or []), *([args.only] if args.only else [])]
  for name in named:
    if name not in known:
      raise UserError(
        f'no job {name!r}{lookup.nearest(name, known)}'
        f' (jobs: {", ".join(known)})'
      )
  changed = [name for name in known if books[name].changes]
  again = set()
  if args.rerun is not None:
    again = jobs.dependants(graph, args.rerun or changed)
  for name in changed:
    if name not in again:
      book = books[name]
      raise UserError(
        f'job {name!r} is {book.stage} with another config:'
        f' {"; ".join(book.changes)}; use --rerun to run it and what depends'
        ' on it again'
      )
  unknown = _unknown_marks(args.workdir, graph)
  if unknown and args.rerun is None:
    raise UserError(
      f'--workdir={args.workdir} holds the job {unknown[0].stem!r}, which this'
      ' config does not have; use another workdir, or --rerun to leave that'
      ' job out'
    )
  return again


def _remove(workdir: Path, name: str) -> None:
  """A job's outputs and marks, so that a kill never leaves half of them."""
  gone = workdir / _MARKS / f'.removed-{name}'
  shutil.rmtree(gone, ignore_errors=True)
  if (workdir / name).is_dir():
    os.rename(workdir / name, gone)
  for suffix in ('json', 'started'):
    (workdir / _MARKS / f'{name}.{suffix}').unlink(missing_ok=True)
  shutil.rmtree(gone, ignore_errors=True)


def _command(
  job: jobs.Job, graph: Sequence[jobs.Job], workdir: Path
) -> list[str]:
  module = job.verb if '.' in job.verb else f'alignjax.cli.{job.verb}'
  folder = workdir / job.name
  names = [job.name for job in graph]
  return [
    *(sys.executable, '-m', module),
    *(f'--config={folder / "job.json"}', f'--workdir={folder}'),
    *jobs.resolved(job.arguments, names, workdir),
  ]


def _prepare(
  job: jobs.Job, graph: Sequence[jobs.Job], workdir: Path, fact: Any
) -> None:
  """The job's folder with its job.json, then the mark that it has started."""
  folder, marks = workdir / job.name, workdir / _MARKS
  (marks / f'{job.name}.json').unlink(missing_ok=True)
  names = [job.name for job in graph]
  settings = jobs.resolved(job.config, names, workdir)
  files.write(marks / f'{job.name}.started', config.to_json(fact))
  files.write(folder / 'job.json', config.to_json(settings))


def _duration(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  if hours:
    return f'{hours} h {minutes:02} min'
  return f'{minutes} min {seconds:02} s' if minutes else f'{seconds} s'


def _ended(
  job: jobs.Job, end: local.Exit, args: argparse.Namespace
) -> int | None:
  """The runner's exit code and its sentence, or None to go on."""
  if end.code == console.OK and not end.stopped:
    return None
  if end.stopped or end.code == console.INTERRUPTED:
    without = '' if args.rerun is None else ' without --rerun'
    sentence = f'interrupted; run the same command{without} to continue'
    code = console.INTERRUPTED
  else:
    sentence = f'job {job.name!r} ({job.verb}) failed with exit code {end.code}'
    code = end.code or 1
  sys.stdout.flush()
  print(f'alignjax run: {sentence}', file=sys.stderr)
  return code


def _execute(
  args: argparse.Namespace,
  graph: Sequence[jobs.Job],
  books: Mapping[str, Book],
) -> int:
  facts, began = jobs.facts(graph), time.monotonic()
  # Jobs of one graph compile the same programs: the second run is free of it.
  cache = (args.workdir / '.jax_cache').resolve()
  os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(cache))
  # XLA on a CPU takes and returns large buffers every step; huge pages spare
  # most of the page faults (Linux; a seventh of them left).
  os.environ.setdefault('GLIBC_TUNABLES', 'glibc.malloc.hugetlb=1')
  done = {name for name, book in books.items() if book.stage == 'finished'}
  with local.children() as run:
    for number, job in enumerate(graph, 1):
      header = f'[{number}/{len(graph)}] {job.name}'
      if job.name in done:
        print(f'{header}: done before')
        continue
      if args.only not in (None, job.name):
        continue
      missing = [need for need in job.needs if need not in done]
      if missing:
        raise UserError(
          f'job {job.name!r} needs {missing[0]!r}, which is not finished'
        )
      print(f'{header} ({job.verb})')
      start = time.monotonic()
      _prepare(job, graph, args.workdir, facts[job.name])
      end = run(_command(job, graph, args.workdir))
      seconds = time.monotonic() - start
      if end.code == console.OK:
        mark = facts[job.name] | {'seconds': round(seconds, 3)}
        path = args.workdir / _MARKS / f'{job.name}.json'
        files.write(path, config.to_json(mark))
        path.with_suffix('.started').unlink()
        done.add(job.name)
        print(f'{header}: done in {_duration(seconds)}')
      code = _ended(job, end, args)
      if code is not None:
        return code
  print(
    f'{len(done)} of {len(graph)} jobs done; this took'
    f' {_duration(time.monotonic() - began)}',
    flush=True,
  )
  return console.OK


def _show(
  args: argparse.Namespace,
  graph: Sequence[jobs.Job],
  books: Mapping[str, Book],
  again: set[str],
) -> None:
  stages = {'new': 'to do', 'started': 'to continue', 'finished': 'done before'}
  for number, job in enumerate(graph, 1):
    stage = stages[books[job.name].stage]
    stage = 'to do again' if job.name in again else stage
    print(f'[{number}/{len(graph)}] {job.name} ({job.verb}): {stage}')
    print(f'  {shlex.join(_command(job, graph, args.workdir))}')


def main(argv: Sequence[str]) -> int:
  """Exit code: 0, 2 bad input, 75 interrupted, else the failed job's."""
  args, rest = _parser().parse_known_args(argv)
  settings, graph = _graph(['--config', args.config, *rest])
  return start(args, settings, graph)


def start(
  args: argparse.Namespace, settings: Any, graph: Sequence[jobs.Job]
) -> int:
  """Runs a graph that `ordered` has given, or goes on with it; exit code.

  Args:
    args: `workdir`, `rerun`, `only` and `dry_run` of `alignjax run`.
    settings: what the graph was made of; it is kept in W/config.json.
    graph: all jobs of the workdir.
  """
  check_workdir(args.workdir)
  if args.dry_run:
    found = books(args.workdir, graph)
    _show(args, graph, found, _again(args, graph, found))
    return console.OK
  with local.locked(args.workdir / _MARKS / 'lock'):
    again = _again(args, graph, books(args.workdir, graph))
    # From the far end: a kill in between leaves no job finished whose needs
    # have gone.
    for job in reversed(graph):
      if job.name in again:
        _remove(args.workdir, job.name)
    for mark in _unknown_marks(args.workdir, graph):
      mark.unlink()
    for half in (args.workdir / _MARKS).glob('.removed-*'):
      shutil.rmtree(half)
    files.write(args.workdir / 'config.json', config.to_json(settings))
    return _execute(args, graph, books(args.workdir, graph))


if __name__ == '__main__':
  raise SystemExit(console.call('run', main))
