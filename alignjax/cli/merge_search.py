"""`alignjax merge search METHOD ...`: the numbers of a merge, by evaluation.

Every trial merges in memory, with numbers of its own for each group of layers,
and is measured on the same prompts with the same random key. What is best is
then merged on disk and evaluated beside base, parents and the merge with
default numbers on prompts that the search has not seen: the best of many is
flattered by the prompts that chose it.

W/search.jsonl has a line per trial, from which the same command goes on after
Ctrl-C or a kill; W/config.json says what is searched.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from alignjax.cli import console

BASE, DEFAULT, BEST = 'base', 'default merge', 'best'
_EPILOG = """\
A variable per number (of weights, per model) and per group: the depth is cut
into --groups equal parts; the embedding goes with the first, the final norm
with the last. The numbers of METHOD that are not searched may be given as in
`alignjax merge` (--density 0.3); random methods draw with their default seed.

E is a config of `alignjax evaluate`, whose models and reference are replaced;
--evaluation.prompts=64 sets a field of it. The objective is the mean reward
less --kl_coef times the KL to the base, in nats per response.

example
  alignjax merge search slerp --base sft --models a b --numbers t
    --evaluation runs/x/evaluate/job.json --workdir runs/search
"""
_AT_RANDOM = """
note: no more --trials than the --population, so that all are drawn at random"""


def _parser() -> argparse.ArgumentParser:
  from alignjax.cli import merge

  parser = argparse.ArgumentParser(
    prog='alignjax merge search',
    description='The numbers of a merge, per group of layers, by evaluation.',
    epilog=_EPILOG,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  add = parser.add_argument
  add('method', metavar='METHOD', help='see `alignjax merge --help`')
  add('--base', required=True, metavar='P', help='and reference of the KL')
  add('--models', required=True, nargs='+', metavar='A', help='what is merged')
  add('--evaluation', metavar='E', help='program or resolved JSON')
  add('--workdir', required=True, type=Path, metavar='W')
  add('--numbers', required=True, nargs='+', metavar='N', help='to be searched')
  add(
    '--over',
    nargs='+',
    action='extend',
    default=[],
    metavar='N=LOW:HIGH',
    help='where to search; the range of a number, 0:1 for weights',
  )
  add('--groups', type=int, metavar='G', help='of layers; 4, if there are 4')
  add('--trials', type=int, default=60, help='merges that are tried; 60')
  add('--population', type=int, default=8, help='trials of a generation; 8')
  add('--kl_coef', type=float, default=0.1, help='of the objective; 0.1')
  add('--seed', type=int, default=0, help='of the proposals; 0')
  add(
    '--held_out',
    type=float,
    default=0.5,
    metavar='SHARE',
    help='of the prompts, which the search does not see; 0.5',
  )
  add('--group', default='layer', help='as in `alignjax merge`')
  for flag in ('--allow-different-bases', '--extrapolate'):
    add(flag, action='store_true', help='as in `alignjax merge`')
  add('--dry-run', action='store_true', help='check everything, write nothing')
  merge.add_numbers(parser)
  return parser


def main(argv: Sequence[str]) -> int:
  """Searches, merges, evaluates. Raises UserError."""
  if {'-h', '--help'} & {*argv}:
    _parser().print_help()
    return console.OK
  args, plain = _read(argv)
  search = _prepared(args, plain)
  print(_said(search))
  if args.dry_run:
    return console.OK
  from alignjax.cli import merge_search_run

  try:
    merge_search_run.run(search)
  except KeyboardInterrupt:
    print(
      'alignjax merge search: interrupted; the same command continues',
      file=sys.stderr,
    )
    return console.INTERRUPTED
  return console.OK


def _read(argv: Sequence[str]) -> tuple[argparse.Namespace, dict[str, Any]]:
  """(arguments, the evaluation's config without its models)."""
  from alignjax.cli import config as configs
  from alignjax.core.errors import UserError

  args, rest = _parser().parse_known_args(list(argv))
  if args.evaluation is None:
    raise UserError('--evaluation=E is missing: a config of alignjax evaluate')
  words = [word.replace('--evaluation.', '--config.', 1) for word in rest]
  if wrong := [w for w in rest if w.startswith('--config')]:
    raise UserError(f'unknown argument {wrong[0]!r}; see --help')
  config, _, left = configs.load(['--config', args.evaluation, *words])
  if left:
    raise UserError(f'unknown argument {left[0]!r}; see --help')
  for name, least in (('trials', 1), ('population', 4), ('seed', 0)):
    if getattr(args, name) < least:
      raise UserError(
        f'--{name} {getattr(args, name)}: expected {least} or more'
      )
  if not 0 < args.held_out < 1:
    raise UserError(
      f'--held_out {args.held_out:g}: expected more than 0 and less than 1'
    )
  if not 0 <= args.kl_coef < float('inf'):
    raise UserError(f'--kl_coef {args.kl_coef:g}: expected 0 or more')
  plain = configs.plain(config)
  plain.pop('objectives', None)  # of other models
  return args, plain


class Search(NamedTuple):
  """A search of which all input has been checked.

  Attributes:
    args: of the command line.
    plain: the evaluation's config, without its models.
    entries: base and models in it.
    fixed: numbers that are not searched.
    setting: of the evaluation.
    batches: (searched, held out).
    seen: of all prompts, those that the search sees, or their twins.
    space: what is searched.
    bytes: of the weights that are in memory at once.
  """

  args: argparse.Namespace
  plain: dict[str, Any]
  entries: list[dict[str, Any]]
  fixed: dict[str, Any]
  setting: Any
  batches: tuple[list, list]
  seen: Any
  space: Any
  bytes: int


def _prepared(args, plain: dict[str, Any]) -> Search:
  """Checks everything before anything is computed."""
  from alignjax.cli import evaluate
  from alignjax.interop import convert
  from alignjax.merge import method, search

  search.check_installed()
  fixed = _fixed(args)
  default = planned(args, fixed, 'model_default')
  space = search.space(
    method.method(args.method),
    args.numbers,
    args.over,
    groups=args.groups,
    layers=default.base.config.layers,
    models=len(args.models),
    extrapolate=args.extrapolate,
  )
  entries = [{'name': BASE, 'kind': 'init', 'path': str(default.base.path)}]
  names = _names([str(model.path) for model in default.models])
  for name, model in zip(names, default.models):
    entries.append({'name': name, 'kind': 'run', 'path': str(model.path)})
  config = config_of(args, plain, entries)
  evaluate.check(config, args.evaluation)
  setting = evaluate.setting_of(config)
  batches = _split(config, setting.batches, args.held_out)
  seen = _seen(*batches)
  # Base and models, a merge, and on the device the merge and the reference.
  held = (len(args.models) + 4) * sum(
    map(convert.size, default.leaves.values())
  )
  return Search(
    args, plain, entries, fixed, setting, batches, seen, space, held
  )


def _fixed(args) -> dict[str, Any]:
  """Numbers that are given and not searched."""
  from alignjax.cli import merge
  from alignjax.core.errors import UserError

  fixed = {}
  for name in {name for _, _, names in merge._methods() for name in names}:
    value = getattr(args, name, None)
    if value is None or name == 'seed':
      continue
    if name in args.numbers:
      raise UserError(f'--{name} is given, and searched by --numbers')
    if name != 'weights' and len(value) != 1:
      raise UserError(f'--{name}: expected one value, found {value}')
    fixed[name] = value if name == 'weights' else value[0]
  return dict(sorted(fixed.items()))


def planned(args, fixed, name: str, where: Sequence[str] = ()) -> Any:
  """The merge to W/name, by the streaming driver."""
  from alignjax.merge import planning

  return planning.plan(
    args.method,
    base=args.base,
    models=args.models,
    out=args.workdir / name,
    group=args.group,
    where=where,
    overwrite=True,
    allow_different_bases=args.allow_different_bases,
    extrapolate=args.extrapolate,
    **fixed,
  )


def _names(paths: Sequence[str]) -> list[str]:
  """Short names of the parents: of RUN/model the run, if that tells them."""
  short = [
    Path(path).parent.name if Path(path).name == 'model' else Path(path).name
    for path in paths
  ]
  taken = {BASE, DEFAULT, BEST}
  if len({*short} | taken) == len(short) + len(taken):
    return short
  return [f'{i} {path}' for i, path in enumerate(paths, 1)]


def config_of(args, plain: Mapping[str, Any], entries: Sequence[Any]) -> Any:
  from alignjax.cli import config as configs

  told = {**plain, 'models': list(entries), 'reference': BASE}
  return configs.from_json(json.dumps(told), args.evaluation)


def _split(config, batches: list, share: float) -> tuple[list, list]:
  """(searched, held out) batches: the first and the last."""
  from alignjax.core.errors import UserError

  if len(batches) < 2:
    raise UserError(
      f'prompts = {config.prompts}: expected {2 * config.batch_size} or more,'
      f' a batch of batch_size = {config.batch_size} to search on and one held'
      ' out (--evaluation.prompts=..., --evaluation.batch_size=...)'
    )
  held = min(max(round(share * len(batches)), 1), len(batches) - 1)
  return batches[:-held], batches[-held:]


def _seen(searched: list, held_out: list) -> Any:
  """Which of all prompts the search has seen: bool, in the order of batches.

  A source may hold one text twice: such a prompt is not held out.
  """
  import numpy as np

  from alignjax.core.errors import UserError

  known = {row.tobytes() for batch in searched for row in batch['prompt']}
  rows = [row for batch in (*searched, *held_out) for row in batch['prompt']]
  seen = np.array([row.tobytes() in known for row in rows])
  if len(seen) - seen.sum() < 2:
    raise UserError(
      f'{len(seen) - seen.sum()} prompts are held out that the search has not '
      'seen; expected 2 or more (--evaluation.prompts, --held_out)'
    )
  return seen


def _said(search: Search) -> str:
  args, space = search.args, search.space
  searched = sum(len(batch['id']) for batch in search.batches[0])
  intervals = ', '.join(
    f'{name} from {low:g} to {high:g}'
    for name, (low, high) in space.intervals.items()
  )
  parts = [space.part(group) for group in range(space.groups)]
  layers = ', '.join(
    f'{part[0]}-{part[-1]}' if len(part) > 1 else f'{part[0]}' for part in parts
  )
  held = int((~search.seen).sum())
  twins = int(search.seen.sum()) - searched
  return (
    f'{args.method}: {intervals}; {space.size} variable(s), layers {layers};'
    f' weights in memory about {search.bytes / 2**20:.0f} MiB\n'
    f'{args.trials} trials on {searched} prompts; then base, parents, default '
    f'merge and best on {held} held-out prompts'
    + (f' ({twins} more are twins of searched ones)' if twins else '')
    + ('' if args.trials > args.population else _AT_RANDOM)
  )
