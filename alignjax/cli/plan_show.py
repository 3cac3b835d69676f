"""Tables of `alignjax plan`: records in, text out. Computes nothing."""

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from alignjax.plan import facts

_KINDS = (
  ('parameters', 'parameters'),
  ('frozen', 'frozen roles'),
  ('optimizer', 'optimizer'),
  ('batch', 'batch'),
  ('padding', 'padding of arguments'),
  ('outputs', 'outputs'),
  ('cache', 'caches'),
  ('temporaries', 'temporaries'),
  ('resident', 'kept meanwhile'),
)


def show(records: Sequence[Mapping[str, Any]], *, ranked: bool) -> None:
  """Prints every record, or of a search one row each and the best in full."""
  width = None if sys.stdout.isatty() else 100
  console = Console(width=width, highlight=False, soft_wrap=False)
  if ranked:
    console.print(_ranking(records))
    records = records[:1]
  for record in records:
    _one(console, record)


def _one(console: Console, record: Mapping[str, Any]) -> None:
  mesh = ' x '.join(f'{k} {v}' for k, v in record['mesh'].items())
  slices = f'{record["slices"]} x ' if record['slices'] > 1 else ''
  console.print(
    f'\n[bold]{record["step"]}[/] on {slices}{record["topology"]}, '
    f'{record["devices"]} devices ({mesh}), {record["layers"]} layers, '
    f'{record["rows"]} rows, remat {record["remat"]}'
  )
  if record['source'] == 'estimate':
    console.print('[bold]estimate[/]: the TPU compiler was not asked')
  console.print(_verdict(record))
  console.print(_memory(record))
  if not record['problem']:
    console.print(_work(record))
    if record['source'] == 'compiler' and record['wire']:
      console.print(_wire(record))
  for what in ('warnings', 'notes', 'assumptions'):
    for sentence in record.get(what, ()):
      console.print(f'{what.removesuffix("s")}: {sentence}', markup=False)


def _verdict(record: Mapping[str, Any]) -> str:
  hbm = record['hbm']
  if record['problem']:
    return f'[bold red]does not fit[/]: {record["problem"]}'
  room = hbm['limit'] - hbm['needs']
  sizes = f'{facts.gib(hbm["needs"])} of {facts.gib(hbm["limit"])} GiB'
  if room < 0:
    return f'[bold red]does not fit[/]: {sizes}, {facts.gib(-room)} too much'
  return f'[bold green]fits[/]: {sizes} of HBM per device'


def _table(title: str, columns: Iterable[str], left: int = 1) -> Table:
  table = Table(title=title, title_justify='left', title_style='bold')
  for i, column in enumerate(columns):
    table.add_column(column, justify='left' if i < left else 'right')
  return table


def _memory(record: Mapping[str, Any]) -> Table:
  table = _table('HBM per device', ('kind', 'GiB'))
  for kind, name in _KINDS:
    if record['hbm'].get(kind):
      table.add_row(name, facts.gib(record['hbm'][kind]))
  return table


def _work(record: Mapping[str, Any]) -> Table:
  flops, seconds = record['flops'], record['seconds']
  table = _table('one step', ('', 'value'))
  add = table.add_row
  add('model FLOPs per device', f'{flops["model"]:.3e}')
  add('matmul FLOPs executed', f'{flops["matmul"]:.3e}')
  add('attention kernels FLOPs', f'{flops["kernels"]:.3e}')
  add('compute, s', _interval(seconds['compute'], '.3f'))
  clock = sum(record.get('cycles', {}).values())
  for kind, cycles in record.get('cycles', {}).items():
    add(f'  of cycles: {kind}', f'{cycles / clock:.1%}')
  add('attention kernels, s', f'{seconds["kernels"]:.3f}')
  add('wire per device, GiB', facts.gib(record['wire_bytes']))
  add('wire, s', f'{seconds["wire"]:.3f}')
  if record['dcn_bytes']:
    add('between slices, GiB', facts.gib(record['dcn_bytes']))
    add('between slices, s', f'{seconds["dcn"]:.3f}')
  add(
    'step, s (estimated)', _interval((seconds['low'], seconds['high']), '.3f')
  )
  add('  at the fast clock, nothing hidden', f'{seconds["unhidden"]:.3f}')
  add('MFU', _interval(record['mfu'], '.0%'))
  add('tokens/s', _interval(record['tokens_per_s'], ',.0f'))
  add('chip-hours of the run', _interval(record['chip_hours'], ',.1f'))
  return table


def _interval(values: Sequence[float], form: str) -> str:
  low, high = (format(value, form) for value in values)
  return low if low == high else f'{low} - {high}'


def _wire(record: Mapping[str, Any]) -> Table:
  columns = ('axis', 'operation', 'cause', 'count', 'GiB')
  table = _table('wire per device', columns, left=3)
  for axis, op, cause, count, size in facts.wire_table(record):
    table.add_row(axis, op, cause, f'{count:g}', facts.gib(size))
  return table


def _ranking(records: Sequence[Mapping[str, Any]]) -> Table:
  columns = ('candidate', 'HBM GiB', 'step s', 'MFU', 'wire GiB', 'by')
  table = _table('fastest first', columns)
  for record in records:
    seconds = record['seconds']
    table.add_row(
      record['candidate'],
      facts.gib(record['hbm']['needs']),
      _interval((seconds['low'], seconds['high']), '.2f'),
      _interval(record['mfu'], '.0%'),
      facts.gib(record['wire_bytes']),
      record['source'],
    )
  return table
