"""`alignjax inspect PATH [--diff OTHER]`: what a model directory holds.

Reads and prints. With --diff also how far another model has moved, layer by
layer, one leaf at a time.
"""

import argparse
from collections.abc import Sequence
from typing import Any

from alignjax.cli import console


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog='alignjax inspect',
    description='Sizes, leaves, config and provenance of a model directory.',
    allow_abbrev=False,
  )
  parser.add_argument('path', metavar='PATH', help='a model directory')
  parser.add_argument(
    '--diff',
    metavar='OTHER',
    help='the task vector OTHER - PATH: its norm per layer, and that norm'
    ' relative to the weights of PATH',
  )
  parser.add_argument(
    '--role', metavar='R', default='policy', help='for --diff; policy'
  )
  return parser


def main(argv: Sequence[str]) -> int:
  """Prints tables. Raises UserError if a directory is not sound."""
  args = _parser().parse_args(argv)

  from rich.console import Console

  from alignjax.system import model_dir

  model = model_dir.read(args.path)
  # Results go to stdout whole: a pipe has no width to cut at.
  out = Console(highlight=False, soft_wrap=True)
  if args.diff is not None:
    other = model_dir.read(args.diff)
    out.print(_difference(model, other, args.role))
    return console.OK
  out.print(f'{model.path}', markup=False)
  out.print(f'view {model.view}, head {model.head}', markup=False)
  out.print(f'tokenizer {model.tokenizer or "none"}', markup=False)
  for role in model.roles:
    out.print(_leaves(model, role))
  for title in ('config', 'provenance'):
    out.print(title, style='bold')
    out.print_json(data=getattr(model, title))
  return console.OK


def _leaves(model: Any, role: str) -> Any:
  import math

  from rich.table import Table

  from alignjax.system import model_dir

  leaves = model_dir.leaves(model, role)
  counts = {name: math.prod(leaf.shape) for name, leaf in leaves.items()}
  table = Table(
    title=f'{role}: {sum(counts.values()):,} parameters,'
    f' {len(leaves)} leaves, digest {model_dir.digest(model, role)[:12]}',
    title_justify='left',
  )
  table.add_column('leaf', no_wrap=True)
  table.add_column('shape', no_wrap=True)
  table.add_column('dtype', no_wrap=True)
  table.add_column('parameters', justify='right', no_wrap=True)
  for name in sorted(leaves, key=_natural):
    leaf = leaves[name]
    shape = ' x '.join(map(str, leaf.shape)) or 'scalar'
    table.add_row(name, shape, str(leaf.dtype), f'{counts[name]:,}')
  return table


def _natural(name: str) -> list[Any]:
  """layer_2 before layer_10."""
  import re

  return [
    (0, int(part), '') if part.isdigit() else (1, 0, part)
    for part in re.split(r'(\d+)', name)
  ]


def _difference(base: Any, model: Any, role: str) -> Any:
  """Table of group, norm of the task vector, and relative to the weights."""
  import math

  from rich.table import Table

  norms = _norms(base, model, role)
  total = tuple(map(sum, zip(*norms.values())))
  table = Table(title=f'{model.path} - {base.path}', title_justify='left')
  table.add_column('layer', no_wrap=True)
  for column in ('norm', 'norm / weights'):
    table.add_column(column, justify='right', no_wrap=True)
  rows = {name: norms[name] for name in sorted(norms, key=_natural)}
  for name, (moved, weights) in {**rows, 'all': total}.items():
    # A zero weight group (a fresh norm scale) has no relative norm.
    relative = f'{math.sqrt(moved / weights):.3e}' if weights else '-'
    table.add_row(name, f'{math.sqrt(moved):.6g}', relative)
  return table


def _norms(base: Any, model: Any, role: str) -> dict[str, tuple[float, float]]:
  """Group -> squared norms of the task vector and of the base."""
  import numpy as np

  from alignjax.merge import memory, methods
  from alignjax.system import model_dir

  leaves = model_dir.leaves(base, role)
  memory.check_same(
    str(base.path), leaves, {str(model.path): model_dir.leaves(model, role)}
  )
  out: dict[str, tuple[float, float]] = {}
  for name, spec in leaves.items():
    if not memory.is_float(spec):
      continue
    a = model_dir.load_leaf(base, role, name).astype(np.float32)
    b = model_dir.load_leaf(model, role, name).astype(np.float32)
    moved, weights = out.get(methods.group_of(name, 'layer'), (0.0, 0.0))
    out[methods.group_of(name, 'layer')] = (
      moved + float(np.sum(np.square(b - a), dtype=np.float64)),
      weights + float(np.sum(np.square(a), dtype=np.float64)),
    )
  return out


if __name__ == '__main__':
  raise SystemExit(console.call('inspect', main))
