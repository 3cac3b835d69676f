"""What a sweep has found: the points by reward, which are kept, the table.

From the evaluation that its jobs have left. It measures nothing.
"""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alignjax.cli.merge_sweep import Point
from alignjax.report import grid, read


def rows(points: Sequence[Point], workdir: Path) -> list[dict[str, Any]]:
  """The points as measured, the highest reward first."""
  evaluation = read.evaluation(workdir / 'evaluate' / 'evaluation.json')
  models = {model['name']: model for model in evaluation['models']}
  front = grid.pareto(evaluation['models'])
  rows = [
    {
      **point._asdict(),
      'reward': models[point.name]['reward'],
      'kl': models[point.name]['kl'],
      'front': point.name in front,
    }
    for point in points
  ]
  return sorted(rows, key=lambda row: -row['reward']['mean'])


def prune(rows: Sequence[dict[str, Any]], keep: str) -> None:
  """Removes the models that are not to be kept; `kept` says which are."""
  for place, row in enumerate(rows):
    wanted = row['front'] if keep == 'front' else True
    if keep.isdecimal():
      wanted = place < int(keep)
    path = Path(row['path'])
    if not wanted and path.exists():
      shutil.rmtree(path)
    row['kept'] = path.exists()


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
  def said(value: Mapping[str, float], digits: int) -> str:
    mean, low, high = (
      f'{value[key] + 0.0:.{digits}f}' for key in ('mean', 'low', 'high')
    )
    return f'{mean} [{low}, {high}]'

  cells = [('point', 'reward', 'KL, nats', 'front')] + [
    (
      row['name'],
      said(row['reward'], 3),
      said(row['kl'], 2),
      'front' if row['front'] else '-',
    )
    for row in rows
  ]
  widths = [max(len(line[i]) for line in cells) for i in range(4)]
  return [
    '  '.join(f'{x:<{w}}' for x, w in zip(line, widths)).rstrip()
    for line in cells
  ]
