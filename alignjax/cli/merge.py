"""`alignjax merge METHOD ...` or `merge --config=F`: one model out of several.

Reads flags or a config and hands over to `alignjax.merge.driver`. Methods and
their numbers are read from the sources: help needs no import of them.
"""

import argparse
import ast
import functools
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from alignjax.cli import console, merge_others

_METHODS = Path(__file__).parent.parent / 'merge' / 'methods'
_EPILOG = """\
methods and their numbers
{methods}

beside these, with flags of their own (`alignjax merge NAME --help`)
{others}

several values of a number give several results in one pass over the inputs:
OUT/t_0.50, OUT/liti_0.30; of several numbers, all their combinations.

in a config, base and models may be merges themselves, {{"method": ..., "base":
..., "models": [...]}}, and so may what a run starts from or an evaluation
reads: then nothing is written.

rules (--where) give other numbers to the leaves whose whole name matches; the
first that matches wins; a list of values is spread over the depth, but that
of weights has one per model.

examples
  alignjax merge slerp --base sft --models run1 run2 --out merged --t 0.5
  alignjax merge liti --base sft --models merged --out front --liti_rate 0 .5 1
  alignjax merge slerp --base sft --models a b --out m --where '.*/attn/q:t=.2'
  alignjax merge slerp --base sft --models a b --out m --where '.*:t=[0,.5,1]'
"""
_FIELDS: dict[str, Any] = {
  'method': None,
  'base': None,
  'models': None,
  'out': None,
  'role': 'policy',
  'group': 'layer',
  'where': (),
  'format': None,
  'dtype': 'keep',
  'pad': False,
  'overwrite': False,
  'allow_different_bases': False,
  'extrapolate': False,
  'checksums': False,
  'dry_run': False,
}


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog='alignjax merge',
    description='Merge the weights of models, of any format and size.',
    epilog=_EPILOG.format(
      methods='\n'.join(_listed(_methods())),
      others='\n'.join(
        _listed((name, about, ()) for name, about in merge_others.NAMES.items())
      ),
    ),
    formatter_class=argparse.RawDescriptionHelpFormatter,
    argument_default=argparse.SUPPRESS,
    allow_abbrev=False,
  )
  add = parser.add_argument
  add('method', nargs='?', metavar='METHOD', help='see below')
  add('--config', metavar='F', help='the fields below from a file')
  add('--rebuild', metavar='M', help='merge again what M was merged from')
  add('--workdir', metavar='W', help='--out is inside it, "model" by default')
  add('--out', metavar='O', help='where the result goes')
  add('--overwrite', action='store_true', help='replace existing results')
  add_flags(parser)
  return parser


def add_flags(parser: argparse.ArgumentParser) -> None:
  """What is merged and how, with the numbers of all methods, as lists."""
  add = parser.add_argument
  add('--base', metavar='P', help='init of the task vectors')
  add('--models', nargs='+', metavar='A', help='what is merged')
  add(
    '--where',
    action='append',
    metavar='REGEX:NAME=VALUE[,...]',
    help='other numbers for some leaves',
  )
  add(
    '--group',
    metavar='layer|tensor|all',
    help='leaves that share an angle; layer by default',
  )
  add('--role', metavar='R', help='which params to merge; policy by default')
  add('--format', metavar='alignjax|hf|deepmind', help="the base's by default")
  add('--dtype', metavar='bfloat16|float32', help="the base's by default")
  for flag, text in (
    ('--pad', 'tables may differ in rows: the result has those of the base'),
    (
      '--allow-different-bases',
      'merge models that were trained from another init than the base',
    ),
    ('--extrapolate', 'numbers that interpolate may lie beyond their ends'),
    ('--checksums', 'take digests of foreign inputs too: read once more'),
    ('--dry-run', 'check everything, say what would be done, write nothing'),
  ):
    add(flag, action='store_true', help=text)
  add_numbers(parser)


def number_names() -> list[str]:
  """The numbers of all methods."""
  return sorted({name for _, _, names in _methods() for name in names})


def add_numbers(parser: argparse.ArgumentParser) -> None:
  """A flag for every number that a method has, unless the verb has its own."""
  taken = {action.dest for action in parser._actions}
  for name in number_names():
    if name not in taken:
      flag = f'--{name}'
      parser.add_argument(flag, nargs='+', type=_number, help=argparse.SUPPRESS)


def _number(text: str) -> float:
  """A whole number stays one."""
  try:
    return int(text)
  except ValueError:
    return float(text)


@functools.cache
def _methods() -> tuple[tuple[str, str, tuple[str, ...]], ...]:
  """(name, what it does, its numbers) of every method, from the sources."""
  found = []
  for path in sorted(_METHODS.glob('[!_]*.py')):
    tree = ast.parse(path.read_text('utf-8'))
    for node in tree.body:
      if not isinstance(node, ast.FunctionDef):
        continue
      name = node.name if node.name == path.stem else f'{path.stem}.{node.name}'
      for call in node.decorator_list:
        if isinstance(call, ast.Call) and ast.unparse(call.func) == 'merging':
          about = ast.literal_eval(call.args[0])
          found.append((name, about, tuple(_numbers(tree, call))))
  return tuple(found)


def _numbers(tree: ast.Module, call: ast.Call) -> Iterator[str]:
  """Numbers that a method declares, where several share them as well."""
  said: dict[str, ast.expr] = {}
  for keyword in call.keywords:
    if keyword.arg is not None:
      said[keyword.arg] = keyword.value
      continue
    shared = next(  # **NAME
      node.value
      for node in tree.body
      if isinstance(node, ast.Assign | ast.AnnAssign)
      and ast.unparse(keyword.value) in ast.unparse(node).split('=')[0]
    )
    assert isinstance(shared, ast.Dict)
    for key, value in zip(shared.keys, shared.values):
      assert isinstance(key, ast.Constant)
      said[str(key.value)] = value
  if 'weighted' in said:
    yield 'weights'
  if isinstance(declared := said.get('numbers'), ast.Dict):
    for key in declared.keys:
      assert isinstance(key, ast.Constant)
      yield str(key.value)


def _listed(methods: Iterable[tuple[str, str, Sequence[str]]]) -> Iterator[str]:
  import textwrap

  for name, about, numbers in methods:
    said = ' '.join(f'--{number}' for number in numbers)
    yield f'  {name:18} {said}'.rstrip()
    yield from textwrap.wrap(
      about, 74, initial_indent=' ' * 6, subsequent_indent=' ' * 6
    )


def _settings(argv: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
  """(all of _FIELDS, numbers): those of the config, then of the flags."""
  given: dict[str, Any] = {}
  rest = list(argv)
  flag_words = [word.partition('=')[0] for word in argv]
  if any(w == '--config' or w.startswith('--config.') for w in flag_words):
    # Not without need: it imports what reads configs.
    from alignjax.cli import config
    from alignjax.core import lookup
    from alignjax.core.errors import UserError

    loaded, _, rest = config.load(argv)
    given = config.plain(loaded)
    known = {*_FIELDS, *(name for _, _, of in _methods() for name in of)}
    for field in given:
      if field not in known:
        raise UserError(
          f'a merge config has no field {field!r}'
          f'{lookup.nearest(field, known)} (fields: {", ".join(sorted(known))})'
        )
  flags = vars(_parser().parse_args(rest))
  workdir = flags.pop('workdir', None)
  for name, value in flags.items():
    if name not in _FIELDS and name != 'weights' and len(value) == 1:
      flags[name] = value[0]  # one result, at OUT itself
  if (merged := flags.pop('rebuild', None)) is not None:
    from alignjax.merge import planning

    given |= planning.recorded(merged)
  everything = {**_FIELDS, **given, **flags}
  settings = {name: everything.pop(name) for name in _FIELDS}
  if workdir is not None:
    _inside(settings, everything, Path(workdir))
  return settings, everything


def _inside(
  settings: dict[str, Any], numbers: Mapping[str, Any], workdir: Path
) -> None:
  """A job's merge: its results are in its folder, and made anew if asked."""
  swept = any(
    isinstance(value, list | tuple)
    for name, value in numbers.items()
    if name != 'weights'
  )
  settings['out'] = workdir / (settings['out'] or ('' if swept else 'model'))
  # The same command continues: a killed job may have left some results.
  settings['overwrite'] = True


def _check(settings: Mapping[str, Any]) -> None:
  from alignjax.core.errors import UserError

  for field in ('method', 'models', 'out'):
    if not settings[field]:
      flag = 'METHOD' if field == 'method' else f'--{field}'
      raise UserError(f'{flag} is missing; `alignjax merge --help` says more')
  kinds = {'models': (str, dict), 'where': (str,)}  # a dict: a merge
  for field, kind in kinds.items():
    value = settings[field]
    if isinstance(value, str) or not all(isinstance(x, kind) for x in value):
      raise UserError(f'{field} must be a list of strings, found {value!r}')
  for field in ('method', 'role', 'group', 'dtype'):
    if not isinstance(settings[field], str):
      raise UserError(f'{field} must be a string, found {settings[field]!r}')
  for field, other in (('base', dict), ('format', str)):
    if not isinstance(settings[field], str | other | None):
      raise UserError(f'{field} must be a string, found {settings[field]!r}')


def main(argv: Sequence[str]) -> int:
  """Merges; prints the plan, then the results. Raises UserError."""
  if argv and argv[0] in merge_others.NAMES:
    return merge_others.main(argv[0], argv[1:])
  if {'-h', '--help'} & {*argv}:
    _parser().print_help()  # before anything is imported
    return console.OK
  settings, numbers = _settings(argv)
  _check(settings)

  from alignjax.merge import fused, planning

  dry_run = settings.pop('dry_run')
  name = settings.pop('method')
  what = planning.plan(name, **settings, **numbers)
  print(_said(name, what))
  for output in what.outputs:
    for note in output.notes:
      print(f'note: {note}')
  if not fused.compiled:
    print(
      'note: alignjax was installed where there is no C compiler, so that this'
      ' takes longer; install one and alignjax again'
    )
  if dry_run:
    from alignjax.merge import driver

    for output in what.outputs:
      print(f'would write {output.path}')
    print(f'about {driver.seconds(what):.1f} s to read and merge, by one leaf')
    return console.OK
  begun = time.monotonic()
  try:
    results = _run(what)
  except KeyboardInterrupt:
    print(
      'alignjax merge: interrupted; the same command continues', file=sys.stderr
    )
    return console.INTERRUPTED
  for result in results:
    print(f'wrote {result}')
  seconds = time.monotonic() - begun
  written = sum(output.bytes for output in what.outputs)
  moved = (what.read_bytes + written) / 1e9
  print(f'{moved:.2f} GB in {seconds:.1f} s')
  return console.OK


def _run(what: Any) -> list[Any]:
  from alignjax.merge import driver
  from alignjax.system.progress import progress

  with progress('merge', what.passes * len(what.leaves)) as advance:
    done = 0

    def step(text: str) -> None:
      nonlocal done
      done += 1
      advance(done, text)

    return driver.run(what, step)


def _said(name: str, what: Any) -> str:
  written = sum(output.bytes for output in what.outputs)
  return (
    f'{name}: {len(what.models)} model(s), {len(what.leaves)} leaves,'
    f' {len(what.outputs)} result(s); reads {what.read_bytes / 1e9:.2f} GB in'
    f' {what.passes} pass(es), writes {written / 1e9:.2f} GB'
    f' ({what.outputs[0].to});'
    f' peak memory of the arrays about {what.peak_bytes / 2**20:.0f} MiB'
  )


if __name__ == '__main__':
  raise SystemExit(console.call('merge', main))
