"""`alignjax merge METHOD ...` or `merge --config=F`: one model out of several.

Reads flags or a config and hands over to `alignjax.merge.driver`.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alignjax.cli import console

_EPILOG = """\
methods
  linear  weighted mean of the models (--weights; uniform by default)
  lerp    linear; for two models --t, the share of the second
  slerp   on the arc of the task vectors model - base, layer by layer; --t for
          two models, uniform and recursive for more
  liti    from the base towards one model; --liti_rate is the model's share

several values of --t or --liti_rate give several results in one pass over the
inputs: OUT/t_0.50, OUT/liti_0.30.

examples
  alignjax merge slerp --base sft --models run1 run2 --out merged --t 0.5
  alignjax merge liti --base sft --models merged --out front --liti_rate 0 .5 1
  alignjax merge slerp --base sft --models a b --out m --where '.*/attn/q:t=.2'
"""
_FIELDS = {
  'method': None,
  'base': None,
  'models': None,
  'out': None,
  't': None,
  'weights': None,
  'liti_rate': None,
  'role': 'policy',
  'group': 'layer',
  'where': (),
  'overwrite': False,
  'allow_different_bases': False,
  'dry_run': False,
}


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog='alignjax merge',
    description='Merge the weights of model directories.',
    epilog=_EPILOG,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    argument_default=argparse.SUPPRESS,
    allow_abbrev=False,
  )
  add = parser.add_argument
  add('method', nargs='?', metavar='METHOD', help='see below')
  add('--config', metavar='F', help='the fields below from a file')
  add('--workdir', metavar='W', help='--out is inside it, "model" by default')
  add('--base', metavar='P', help='init of the task vectors')
  add('--models', nargs='+', metavar='A', help='what is merged')
  add('--out', metavar='O', help='where the result goes')
  add('--t', nargs='+', type=float, help='from 0 (first) to 1 (second model)')
  add('--liti_rate', nargs='+', type=float, help='from 0 (base) to 1 (model)')
  add('--weights', nargs='+', type=float, metavar='W', help='one per model')
  add(
    '--where',
    action='append',
    metavar='REGEX:NAME=VALUE[,...]',
    help='other numbers for the leaves whose whole name matches; the first'
    ' rule that matches wins',
  )
  add(
    '--group',
    metavar='layer|tensor|all',
    help='leaves that share an angle; layer by default',
  )
  add('--role', metavar='R', help='which params to merge; policy by default')
  add('--overwrite', action='store_true', help='replace existing results')
  add(
    '--allow-different-bases',
    action='store_true',
    help='merge models that were trained from another init than the base',
  )
  add('--dry-run', action='store_true', help='check everything, write nothing')
  return parser


def _settings(argv: Sequence[str]) -> dict[str, Any]:
  """Fields of the config, then those of the flags; all of _FIELDS."""
  from alignjax.cli import config
  from alignjax.core import lookup
  from alignjax.core.types import UserError

  given: dict[str, Any] = {}
  rest = list(argv)
  flag_words = [word.partition('=')[0] for word in argv]
  if any(w == '--config' or w.startswith('--config.') for w in flag_words):
    loaded, _, rest = config.load(argv)
    given = config.plain(loaded)
    for field in given:
      if field not in _FIELDS:
        raise UserError(
          f'a merge config has no field {field!r}'
          f'{lookup.nearest(field, _FIELDS)} (fields: {", ".join(_FIELDS)})'
        )
  flags = vars(_parser().parse_args(rest))
  for name in ('t', 'liti_rate'):
    if len(flags.get(name, ())) == 1:
      flags[name] = flags[name][0]  # one result, at OUT itself
  workdir = flags.pop('workdir', None)
  settings = {**_FIELDS, **given, **flags}
  if workdir is not None:
    _inside(settings, Path(workdir))
  return settings


def _inside(settings: dict[str, Any], workdir: Path) -> None:
  """A job's merge: its results are in its folder, and made anew if asked."""
  swept = isinstance(settings['t'], list | tuple) or isinstance(
    settings['liti_rate'], list | tuple
  )
  settings['out'] = workdir / (settings['out'] or ('' if swept else 'model'))
  # The same command continues: a killed job may have left some results.
  settings['overwrite'] = True


def _check(settings: Mapping[str, Any]) -> None:
  from alignjax.core.types import UserError

  for field in ('method', 'base', 'models', 'out'):
    if not settings[field]:
      flag = 'METHOD' if field == 'method' else f'--{field}'
      raise UserError(f'{flag} is missing; `alignjax merge --help` says more')
  for field in ('models', 'where'):
    value = settings[field]
    if isinstance(value, str) or not all(isinstance(x, str) for x in value):
      raise UserError(f'{field} must be a list of strings, found {value!r}')
  for field in ('method', 'base', 'role', 'group'):
    if not isinstance(settings[field], str):
      raise UserError(f'{field} must be a string, found {settings[field]!r}')


def main(argv: Sequence[str]) -> int:
  """Merges; prints the plan, then the results. Raises UserError."""
  settings = _settings(argv)
  _check(settings)

  from alignjax.merge import driver
  from alignjax.system import metrics

  dry_run = settings.pop('dry_run')
  method = settings.pop('method')
  what = driver.plan(method, **settings)
  print(
    f'{method}: {len(what.models)} model(s), {len(what.leaves)} leaves,'
    f' {len(what.outputs)} result(s), {what.passes} pass(es);'
    f' peak memory of the arrays about {what.peak_bytes / 2**20:.0f} MiB'
  )
  if dry_run:
    for path in what.outputs:
      print(f'would write {Path(path).absolute()}')
    return console.OK
  with metrics.progress('merge', what.passes * len(what.leaves)) as advance:
    done = 0

    def step(text: str) -> None:
      nonlocal done
      done += 1
      advance(done, text)

    results = driver.run(what, step)
  for result in results:
    print(f'wrote {result.path}')
  return console.OK


if __name__ == '__main__':
  raise SystemExit(console.call('merge', main))
