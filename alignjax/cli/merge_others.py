"""What `alignjax merge` does beside averaging: stacks layers, adapters, search.

`main` for the names of NAMES; each opens a model that is made of others and
writes it as `convert` would, or writes an adapter; `sweep` has its own file.
"""

import argparse
from collections.abc import Sequence
from typing import Any

from alignjax.cli import console

NAMES = {
  'stack': 'layers of several models on top of each other: --layers 0:0:12'
  ' 1:8:18 takes layers 0 to 11 of the first of --models, then 8 to 17 of the'
  ' second; the rest is the base, the first by default',
  'lora.extract': 'the adapter of rank --rank that is nearest to what training'
  " has added to --base, in PEFT's files",
  'lora.fold': "adds an adapter of PEFT's, --adapter, to --base",
  'search': 'the numbers of METHOD, per group of layers, that evaluate best',
  'sweep': 'a grid over --methods and their numbers, each point evaluated as'
  ' --evaluation says, with a report in --workdir',
}


def _parser(name: str) -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog=f'alignjax merge {name}', description=NAMES[name], allow_abbrev=False
  )
  add = parser.add_argument
  add('--out', metavar='O', required=True, help='where the result goes')
  add('--overwrite', action='store_true', help='replace an existing result')
  stacks = name == 'stack'
  add('--base', metavar='P', required=not stacks, help='a model directory')
  if stacks:
    add('--models', nargs='+', required=True, metavar='A')
    add('--layers', nargs='+', required=True, metavar='MODEL:START:STOP')
  if name == 'lora.extract':
    add('--models', nargs=1, required=True, metavar='A', help='the fine-tune')
    add('--rank', type=int, required=True, metavar='R')
    add('--leaves', metavar='REGEX', help='linear maps; all by default')
    return parser
  if name == 'lora.fold':
    add('--adapter', required=True, metavar='D', help='its directory')
  add('--format', choices=('alignjax', 'hf', 'deepmind'))
  add('--dtype', choices=('keep', 'bfloat16', 'float32'), default='keep')
  return parser


def main(name: str, argv: Sequence[str]) -> int:
  """Raises UserError."""
  if name == 'search':
    from alignjax.cli import merge_search

    return merge_search.main(argv)
  if name == 'sweep':
    from alignjax.cli import merge_sweep

    return merge_sweep.main(argv)
  args = _parser(name).parse_args(argv)

  from alignjax.interop.open import open as open_model
  from alignjax.merge import lora, stack

  if name == 'lora.extract':
    return _extract(args)
  if name == 'lora.fold':
    base = open_model(args.base)
    made = lora.folded(base, args.adapter)
    record = {'adapter': args.adapter, 'base': args.base}
  else:
    models = [open_model(path) for path in args.models]
    base = open_model(args.base) if args.base else models[0]
    made = stack.stacked(base, models, stack.spans(args.layers))
    record = {'layers': args.layers, 'models': args.models, 'base': args.base}
  return _write(made, args, {'merge': {'method': name, **record}})


def _write(made: Any, args: argparse.Namespace, record: dict[str, Any]) -> int:
  from alignjax.interop import convert
  from alignjax.merge.planning import check_apart
  from alignjax.system.progress import progress

  check_apart(args.out, [made])
  what = convert.plan(
    made,
    args.out,
    to=args.format or made.format,
    dtype=args.dtype,
    provenance=record,
    overwrite=args.overwrite,
  )
  print(
    f'{len(what.leaves)} leaves, {what.parameters:,} parameters; peak memory of'
    f' the arrays about {what.peak_bytes / 2**20:.0f} MiB'
  )
  for note in what.notes:
    print(f'note: {note}')
  with progress('merge', what.steps) as advance:
    done = 0

    def step(text: str) -> None:
      nonlocal done
      done += 1
      advance(done, text)

    convert.run(what, step)
  print(f'wrote {what.path}')
  return console.OK


def _extract(args: argparse.Namespace) -> int:
  from alignjax.interop.open import open as open_model
  from alignjax.merge import lora
  from alignjax.system.progress import progress

  base, model = open_model(args.base), open_model(args.models[0])
  with progress('lora', len(base.leaves)) as advance:
    done = 0

    def step(name: str) -> None:
      nonlocal done
      done += 1
      advance(done, name)

    kept = lora.extract(
      base,
      model,
      args.out,
      rank=args.rank,
      leaves=args.leaves or lora.LINEAR,
      overwrite=args.overwrite,
      step=step,
    )
  shares = sorted(kept.energy.items(), key=lambda pair: pair[1])
  mean = sum(share for _, share in shares) / len(shares)
  print(
    f'wrote {args.out}: rank {args.rank} holds {mean:.1%} of the squares of'
    f' {len(shares)} task matrices on average; least {shares[0][1]:.1%}'
    f' ({shares[0][0]})'
  )
  if kept.lost:
    print(
      f'{len(kept.lost)} leaves that moved have no adapter:'
      f' {", ".join(kept.lost[:5])}{", ..." if len(kept.lost) > 5 else ""}'
    )
  return console.OK
