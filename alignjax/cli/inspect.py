"""`alignjax inspect WHAT`: what a model holds and what it will need.

WHAT is the name of a released model, a model directory of any format, or a
training run. `cli/facts.py` gathers, this file prints: tables, or --json. With
--diff, how other models lie about it, which --out keeps for the report. Not a
converter: it writes no weights.
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from alignjax.cli import console

LENGTHS = (4096, 32_768, 131_072)


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog='alignjax inspect',
    description='Sizes, cache memory, leaves, config and provenance of a'
    ' model; steps and leaves of a training run. Nothing is allocated.',
    allow_abbrev=False,
  )
  parser.add_argument(
    'path',
    metavar='WHAT',
    nargs='?',
    help='a released model (gemma3-27b), a model directory (ours, Hugging'
    " Face, DeepMind), a training run's workdir or one of its checkpoints",
  )
  parser.add_argument(
    '--length',
    type=int,
    action='append',
    metavar='T',
    help='cache size at T tokens; may be repeated (4096, 32768, 131072)',
  )
  parser.add_argument('--batch', type=int, default=1, help='rows of the cache')
  parser.add_argument(
    '--dtype',
    choices=('float32', 'bfloat16'),
    help="of the cache; the model's own, bfloat16 for a released model",
  )
  parser.add_argument('--json', action='store_true', help='the facts as JSON')
  parser.add_argument(
    '--diff',
    nargs='+',
    metavar='OTHER',
    help='the task vectors OTHER - WHAT: norms per layer, also relative to the'
    ' weights of WHAT, angles, conflicts of signs; formats may differ',
  )
  parser.add_argument(
    '--role', metavar='R', default='policy', help='for --diff; policy'
  )
  parser.add_argument(
    '--out', metavar='F', help='for --diff: keep what it says as JSON in F'
  )
  parser.add_argument(
    '--config',
    metavar='F',
    help='base, models and role, instead of WHAT, --diff and --role',
  )
  parser.add_argument(
    '--workdir',
    metavar='W',
    help='--out is inside it, geometry.json if not said',
  )
  return parser


def _settings(argv: Sequence[str]) -> argparse.Namespace:
  """The flags; a config stands for some of them. Raises UserError."""
  words = [word.partition('=')[0] for word in argv]
  if not any(w == '--config' or w.startswith('--config.') for w in words):
    args = _parser().parse_args(argv)
  else:
    from alignjax.cli import config
    from alignjax.core import lookup
    from alignjax.core.errors import UserError

    loaded, _, rest = config.load(argv)
    args, given = _parser().parse_args(rest), config.plain(loaded)
    fields = ('base', 'models', 'role')
    for field in given:
      if field not in fields:
        raise UserError(
          f'an inspect config has no field {field!r}'
          f'{lookup.nearest(field, fields)} (fields: {", ".join(fields)})'
        )
    if args.path or args.diff:
      raise UserError('WHAT and --diff are base and models of the config')
    models = given.get('models')
    if not isinstance(models, list) or not models:
      raise UserError(f'models must be a list of paths, found {models!r}')
    role = given.get('role', args.role)
    for value in (given.get('base'), role, *models):
      if not isinstance(value, str) or not value:
        raise UserError(
          f'base, models and role must be strings, found {value!r}'
        )
    args.path, args.diff, args.role = given['base'], models, role
  return _checked(args)


def _checked(args: argparse.Namespace) -> argparse.Namespace:
  from alignjax.core.errors import UserError

  if not args.path:
    raise UserError('WHAT is missing; `alignjax inspect --help` says more')
  if args.batch < 1 or min(args.length or [1]) < 1:
    raise UserError('--batch and --length must be at least 1')
  if args.workdir:
    args.out = str(Path(args.workdir) / (args.out or 'geometry.json'))
  if args.out and args.diff is None:
    raise UserError('--out and --workdir keep what --diff says; it is missing')
  return args


def main(argv: Sequence[str]) -> int:
  """Prints tables. Raises UserError if what is named is not sound."""
  args = _settings(argv)

  from rich.console import Console

  from alignjax.cli import facts
  from alignjax.core import files

  show: Callable[[Any, dict[str, Any]], None]
  path = Path(args.path)
  if args.diff is not None:
    found = facts.difference(args.path, args.diff, args.role)
    show = _show_difference
  elif steps := facts.checkpoints(path):
    found, show = facts.run(path, steps), _show_run
  else:
    lengths = sorted(set(args.length or LENGTHS))
    found = facts.model(
      args.path, lengths=lengths, batch=args.batch, dtype=args.dtype
    )
    show = _show_model
  text = json.dumps(found, indent=2)
  if args.out:
    files.write(args.out, text + '\n')
  if args.json:
    print(text)
  else:
    # Results go to stdout whole: a pipe has no width to cut at.
    show(Console(highlight=False, soft_wrap=True), found)
    if args.out:
      print(f'wrote {args.out}')
  return console.OK


def _show_model(out: Any, found: dict[str, Any]) -> None:
  count, config = found['parameters'], found['config']
  on_disk = found['format'] != 'released'
  kinds = ', '.join(f'{n} {kind}' for kind, n in found['layers'].items())
  window = (
    f', window {config["window"]:,}' if 'local' in found['layers'] else ''
  )
  lines = [
    f'{found["name"]}',
    f'format {found["format"]}' if on_disk else 'released model, no weights',
    f'{count["all"]:,} parameters: embedding {_short(count["embedding"], "B")},'
    f' body {_short(count["body"], "B")}; {_short(count["bytes"])}B',
    f'{config["layers"]} layers: {kinds}{window}',
  ]
  if on_disk:
    lines.append(f'tokenizer {found["tokenizer"] or "none"}')
    lines.append(f'files {", ".join(found["files"]) or "none"}')
  for role, digest in found.get('roles', {}).items():
    lines.append(f'role {role}, digest {digest[:12]}')
  if extra := found.get('extra'):
    size = sum(leaf['bytes'] for leaf in extra.values())
    lines.append(
      f"{len(extra)} tensors that are not the decoder's, {_short(size)}B"
    )
  for line in lines:
    out.print(line, markup=False)
  _show_cache(out, found['cache'])
  if on_disk:
    out.print(_leaves('leaves', found['leaves']))
  for title in ('config', 'provenance'):
    if title in found:
      out.print(title, style='bold')
      out.print_json(data=found[title])


def _show_cache(out: Any, cache: dict[str, Any]) -> None:
  fixed = [
    f'{_short(cache[field])}B of {what}'
    for field, what in (
      ('ring_bytes', 'rings in local layers'),
      ('recurrent_bytes', 'recurrent states'),
    )
    if cache[field]
  ]
  out.print(
    f'cache of {cache["batch"]} x {cache["dtype"]}:'
    f' {cache["kv_bytes_per_token"]:,} bytes of keys and values per token;'
    f' what does not grow: {" and ".join(fixed) or "nothing"}',
    markup=False,
  )
  rows = [
    (
      f'{row["length"]:,}',
      f'{_short(row["bytes"])}B',
      f'{_short(row["full_length_bytes"])}B',
      f'{row["ratio"]:.1%}',
    )
    for row in cache['lengths']
  ]
  columns = ('length', 'cache', 'full-length caches', 'ratio')
  out.print(_table('', columns, rows))


def _leaves(title: str, leaves: Mapping[str, Any]) -> Any:
  from alignjax.cli import facts

  columns = ['leaf', 'shape', 'dtype', 'parameters']
  if any('from' in leaf for leaf in leaves.values()):
    columns.append('from')
  rows = []
  for name in sorted(leaves, key=facts.natural):
    leaf = leaves[name]
    shape = ' x '.join(map(str, leaf['shape'])) or 'scalar'
    row = [name, shape, leaf['dtype'], f'{leaf["parameters"]:,}']
    rows.append([*row, ' + '.join(leaf.get('from', []))][: len(columns)])
  return _table(f'{title}: {len(leaves)}', columns, rows)


def _show_run(out: Any, found: dict[str, Any]) -> None:
  out.print(found['name'], markup=False)
  models = ', '.join(found['models']) or 'none'
  out.print(f'training run; finished models: {models}', markup=False)
  rows = []
  for checkpoint in found['checkpoints']:
    step, disk = checkpoint['step'], f'{_short(checkpoint["bytes_on_disk"])}B'
    for group, sums in checkpoint['holds'].items():
      numbers = (f'{sums[field]:,}' for field in ('leaves', 'parameters'))
      rows.append((step, group, *numbers, f'{_short(sums["bytes"])}B', disk))
      step = disk = ''  # once a checkpoint
  columns = ('step', 'holds', 'leaves', 'parameters', 'size', 'on disk')
  out.print(_table('checkpoints', columns, rows))
  newest = found['checkpoints'][-1]
  out.print(_leaves(f'leaves of step {newest["step"]}', newest['leaves']))


def _show_difference(out: Any, found: dict[str, Any]) -> None:
  models, groups = found['models'], found['groups']
  letters = [_letter(i) for i in range(len(models))]
  for letter, model in zip(letters, models):
    said = f'{letter}: {model["path"]} - {found["base"]["path"]}'
    out.print(said, markup=False)
  columns = ['layer']
  for letter in letters:
    columns += [f'norm {letter}', 'relative']
  rows = [
    [
      name,
      *(
        text
        for pair in zip(of['norms'], of['relative'])
        for text in _norm(*pair)
      ),
    ]
    for name, of in groups.items()
  ]
  out.print(_table('task vectors; relative to the weights', columns, rows))
  if len(models) == 1:
    return
  pairs = [
    f'{letters[i]}{letters[j]}' for j in range(len(models)) for i in range(j)
  ]
  rows = [
    [
      name,
      *('-' if x is None else f'{x:.2f}' for x in of['angles_deg']),
      '-' if (x := of['sign_conflicts']) is None else f'{x:.1%}',
    ]
    for name, of in groups.items()
  ]
  title = 'degrees between task vectors; items whose signs disagree'
  out.print(_table(title, ['layer', *pairs, 'signs'], rows))
  names = ['base', *letters]
  rows = [
    [name, *(f'{x:.4g}' for x in row)]
    for name, row in zip(names, groups['all']['distances'])
  ]
  out.print(_table('distances between the weights', ['', *names], rows))


def _norm(norm: float, relative: float | None) -> tuple[str, str]:
  return f'{norm:.4g}', '-' if relative is None else f'{relative:.2e}'


def _letter(number: int) -> str:
  """A, B, ... Z, A1, B1, ..."""
  turn, place = divmod(number, 26)
  return f'{chr(ord("A") + place)}{turn or ""}'


_WORDS = ('leaf', 'shape', 'dtype', 'from', 'step', 'holds', 'layer')


def _table(title: str, columns: Sequence[str], rows: Any) -> Any:
  from rich.table import Table

  table = Table(title=title or None, title_justify='left')
  for column in columns:
    justify = 'left' if column in _WORDS else 'right'
    table.add_column(column, justify=justify, no_wrap=True)
  for row in rows:
    table.add_row(*row)
  return table


def _short(n: int, billion: str = 'G') -> str:
  """1,412,000,000 -> '1.41 G'."""
  units = ((1e12, 'T'), (1e9, billion), (1e6, 'M'), (1e3, 'k'))
  for size, name in units:
    if n >= size:
      return f'{n / size:.3g} {name}'
  return f'{n} '


if __name__ == '__main__':
  raise SystemExit(console.call('inspect', main))
