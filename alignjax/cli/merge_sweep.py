"""`alignjax merge sweep`: a grid over merging methods, evaluated, with a front.

A graph of jobs (a merge per method, evaluate, report) that the runner of
`alignjax run` runs in W: the same command continues. Every method takes those
of the numbers that it has, in all combinations, and reads the inputs for all
of them at once. Everything is checked before anything is merged.
"""

import argparse
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from alignjax.cli import console

_EPILOG = """\
E is a config of `alignjax evaluate`, a program or a resolved JSON such as
runs/x/evaluate/job.json, whose models and reference are replaced: by the base,
which is the reference, by --models, and by the points.
--evaluation.a.b=value sets a field of it.

numbers, as in `alignjax merge --help`, may have several values; a method takes
those that it has. --weights, one per model, is the same for all points.

W/sweep.json says what was found, W/report.html shows it. With another grid
in the same W, --rerun does again what has changed.

example
  alignjax merge sweep --base sft --models a b --methods slerp ties --t .3 .7
    --density .2 .5 --evaluation runs/x/evaluate/job.json --workdir runs/sweep
"""
_INIT = 'init'
# Fields of a merge that all points share, with what they are without a flag.
_SHARED: dict[str, Any] = {
  'role': 'policy',
  'group': 'layer',
  'where': (),
  'format': None,
  'dtype': 'keep',
  'pad': False,
  'allow_different_bases': False,
  'extrapolate': False,
  'checksums': False,
}


class Point(NamedTuple):
  """A point of the grid: a method with numbers, and where its model is."""

  name: str
  method: str
  numbers: dict[str, Any]
  path: str


class Merge(NamedTuple):
  """All points of one method, as a job, and bytes that are not there yet."""

  job: str
  config: dict[str, Any]
  points: tuple[Point, ...]
  bytes: int


def _parser() -> argparse.ArgumentParser:
  from alignjax.cli import merge

  parser = argparse.ArgumentParser(
    prog='alignjax merge sweep',
    description='Merge by several methods and numbers, evaluate every result,'
    ' and draw reward against KL. The same command continues.',
    epilog=_EPILOG,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    argument_default=argparse.SUPPRESS,
    allow_abbrev=False,
  )
  add = parser.add_argument
  add('--methods', nargs='+', required=True, metavar='M')
  add('--evaluation', required=True, metavar='E', help='see below')
  add('--workdir', required=True, type=Path, metavar='W')
  add(
    '--keep',
    default='all',
    metavar='N|front|all',
    help='models that stay on disk in the end: the N of highest reward, those'
    ' on the Pareto front, or all, which is the default',
  )
  add(
    '--rerun',
    nargs='*',
    default=None,
    metavar='JOB',
    help='run these jobs (default: those that changed) and what depends on'
    ' them again',
  )
  merge.add_flags(parser)
  return parser


def main(argv: Sequence[str]) -> int:
  """Exit code as of `alignjax run`; raises UserError for bad input."""
  if {'-h', '--help'} & {*argv}:
    _parser().print_help()  # before anything is imported
    return console.OK
  args, overrides = _arguments(argv)

  from alignjax.cli import merge_sweep_show, run
  from alignjax.core import files

  run.check_workdir(args.workdir)
  merges = _grid(args)
  points = [point for merge in merges for point in merge.points]
  evaluation = _evaluation(args, overrides, points)
  settings = {'sweep': [m.config for m in merges], 'evaluation': evaluation}
  graph = run.ordered(_jobs(merges, evaluation))
  books = run.books(args.workdir, graph)
  _say(merges)
  _check_disk(args.workdir, merges, books)
  runner = argparse.Namespace(
    workdir=args.workdir,
    rerun=_again(args.rerun, merges, books),
    only=None,
    dry_run=getattr(args, 'dry_run', False),
  )
  code = run.start(runner, settings, graph)
  if code != console.OK or runner.dry_run:
    return code
  rows = merge_sweep_show.rows(points, args.workdir)
  merge_sweep_show.prune(rows, args.keep)
  text = json.dumps({'format': 1, 'points': rows}, indent=1)
  files.write(args.workdir / 'sweep.json', text + '\n')
  print('\n'.join(merge_sweep_show.table(rows)))
  print(f'report: {args.workdir / "report.html"}')
  return console.OK


def _arguments(
  argv: Sequence[str],
) -> tuple[argparse.Namespace, list[str]]:
  """(flags, overrides of the evaluation as `config.load` takes them)."""
  from alignjax.core import lookup
  from alignjax.core.errors import UserError
  from alignjax.interop.open import absolute

  parser = _parser()
  args, rest = parser.parse_known_args(list(argv))
  overrides = []
  for word in rest:
    if not word.startswith('--evaluation.') or '=' not in word:
      flag = word.partition('=')[0]
      known = [f for a in parser._actions for f in a.option_strings]
      raise UserError(
        f'unknown argument {flag!r}{lookup.nearest(flag, known)};'
        ' `alignjax merge sweep --help`'
      )
    overrides.append('--config' + word.removeprefix('--evaluation'))
  for field in ('base', 'models'):
    if not getattr(args, field, None):
      raise UserError(
        f'--{field} is missing; `alignjax merge sweep --help` says more'
      )
  keep = args.keep
  if keep not in ('all', 'front') and int(keep if keep.isdecimal() else 0) < 1:
    raise UserError(
      f"--keep is {keep!r}, expected a whole number from 1, 'front' or 'all'"
    )
  args.base = str(absolute(args.base))
  args.models = [str(absolute(path)) for path in args.models]
  return args, overrides


def _numbers(args: argparse.Namespace) -> dict[str, list[Any]]:
  """The numbers that were given, each value once."""
  from alignjax.cli import merge

  given = {
    name: getattr(args, name)
    for name in merge.number_names()
    if hasattr(args, name)
  }
  return {
    name: values if name == 'weights' else list(dict.fromkeys(values))
    for name, values in given.items()
  }


def _grid(args: argparse.Namespace) -> list[Merge]:
  """Every method with its points, checked. Raises UserError."""
  from alignjax.core import lookup
  from alignjax.core.errors import UserError
  from alignjax.merge import method, planning

  # 'lerp' is another word for 'linear'.
  names = list(
    dict.fromkeys('linear' if m == 'lerp' else m for m in args.methods)
  )
  given = _numbers(args)
  takes = {}
  for name in names:
    how = method.method(name)
    takes[name] = {*how.numbers, *(['weights'] if how.weighted else [])}
  known = sorted(set().union(*takes.values()))
  for number in given:
    if number not in known:
      raise UserError(
        f'--{number}: none of the methods {", ".join(names)} takes it'
        f'{lookup.nearest(number, known)} (they take'
        f' {", ".join(known) or "no numbers"})'
      )
  shared = {field: getattr(args, field, no) for field, no in _SHARED.items()}
  shared |= {'base': args.base, 'models': args.models}
  found = []
  for name in names:
    numbers: dict[str, Any] = {k: given[k] for k in given if k in takes[name]}
    job = 'merge_' + ''.join(c if c.isalnum() else '_' for c in name)
    several = any(k != 'weights' for k in numbers)
    out = args.workdir / job / ('' if several else 'model')
    # A killed job may have left some results; the runner keeps the books.
    what = planning.plan(name, out=out, overwrite=True, **shared, **numbers)
    for point in what.numbers:
      _probe(name, len(args.models), extrapolate=shared['extrapolate'], **point)
    found.append(_merge(job, what, {'method': name, **shared, **numbers}))
  return found


def _probe(name: str, count: int, **numbers: Any) -> None:
  """Merges a few noisy items: UserError for numbers that exclude each other."""
  import numpy as np

  from alignjax.merge import memory

  noise = np.random.default_rng(0).normal(size=(count + 1, 4, 4))
  base, *models = ({'x': x.astype(np.float32)} for x in noise)
  memory.merge(name, base=base, models=models, **numbers)


def _merge(job: str, what: Any, config: dict[str, Any]) -> Merge:
  from alignjax.report import grid

  name = config['method']
  points = tuple(
    Point(
      f'{name} {grid.label(numbers)}'.strip(), name, numbers, str(output.path)
    )
    for numbers, output in zip(what.numbers, what.outputs)
  )
  missing = sum(o.bytes for o in what.outputs if not o.path.exists())
  return Merge(job, config, points, missing)


def _evaluation(
  args: argparse.Namespace, overrides: Sequence[str], points: Sequence[Point]
) -> dict[str, Any]:
  """The config of the evaluation, of base, inputs and points, checked."""
  from alignjax.cli import config, evaluate

  loaded, _, _ = config.load(['--config', args.evaluation, *overrides])
  settings = config.plain(loaded)
  runs = _run_names(args.models, [_INIT, *(point.name for point in points)])
  settings['reference'] = _INIT
  settings['models'] = [
    {'name': _INIT, 'kind': 'init', 'path': args.base},
    *(
      {'name': name, 'kind': 'run', 'path': path}
      for name, path in zip(runs, args.models)
    ),
    *(
      {
        'name': point.name,
        'kind': 'merged',
        'path': point.path,
        'series': point.method,
        'numbers': point.numbers,
      }
      for point in points
    ),
  ]
  if dict(settings.get('model') or {}).get('name') == 'start':
    settings['start'] = {'policy': args.base}
  frozen = config.from_json(config.to_json(settings))
  evaluate.check(frozen, f'--evaluation={args.evaluation}')
  # All that it reads is opened, but for the points, which are not there.
  frozen.models = [m for m in frozen.models if m['kind'] != 'merged']
  evaluate.setting_of(frozen)
  return settings


def _run_names(paths: Sequence[str], taken: Sequence[str]) -> list[str]:
  """Of the folders, above 'model', if all differ; else 'run 1', 'run 2'."""
  folders = [Path(path) for path in paths]
  names = [p.parent.name if p.name == 'model' else p.name for p in folders]
  if len({*names, *taken}) == len(names) + len(taken) and all(names):
    return names
  return [f'run {i}' for i in range(1, len(names) + 1)]


def _again(
  rerun: list[str] | None, merges: Sequence[Merge], books: Mapping[str, Any]
) -> list[str] | None:
  """What runs again; with the merges whose models --keep has removed."""
  if rerun is None:
    return None
  again = rerun or [name for name, book in books.items() if book.changes]
  gone = [m.job for m in merges if m.bytes and books[m.job].stage == 'finished']
  return [*again, *gone] if again else []


def _check_disk(
  workdir: Path, merges: Sequence[Merge], books: Mapping[str, Any]
) -> None:
  """Says what will be written; raises UserError if it has no room."""
  from alignjax.core.errors import UserError

  folder = workdir.absolute()
  while not folder.exists():
    folder = folder.parent
  free = shutil.disk_usage(folder).free
  needed = sum(
    merge.bytes for merge in merges if books[merge.job].stage != 'finished'
  )
  count = sum(len(merge.points) for merge in merges)
  print(f'{count} merged models; {needed / 1e9:.2f} GB are to be written')
  if needed > free:
    raise UserError(
      f'--workdir={workdir}: the merged models take {needed / 1e9:.2f} GB,'
      f' {free / 1e9:.2f} GB are free; fewer points, or --dtype bfloat16'
    )


def _jobs(merges: Sequence[Merge], evaluation: dict[str, Any]) -> list[Any]:
  from alignjax.cloud.jobs import Job

  names = tuple(merge.job for merge in merges)
  return [
    *(Job(merge.job, 'merge', merge.config) for merge in merges),
    Job('evaluate', 'evaluate', evaluation, names),
    Job('report', 'report', {}, ('evaluate',)),
  ]


def _say(merges: Sequence[Merge]) -> None:
  for merge in merges:
    print(f'{merge.job}: {len(merge.points)} point(s)')
    for point in merge.points:
      print(f'  {point.name}: {point.path}')
