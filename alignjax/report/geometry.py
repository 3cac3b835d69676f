"""How task vectors lie: angles and norms over the depth, distances, signs.

WARP's picture of its runs (arXiv 2406.16768, figures 3 and 15), from a
geometry.json of `alignjax inspect --diff`. What cannot be measured, the angle
of a model that has not moved, is a gap in a line and a dash in a table. It
draws no conclusion beyond the numbers that it prints.
"""

import math
import re
import statistics
from collections.abc import Sequence
from html import escape
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter

from alignjax.report import ink
from alignjax.report.curves import number, tick
from alignjax.report.samples import visible

WIDTH, HEIGHT = 1000, 320
MOST = 6  # lines of their own; of more, their range and median
TICKS = 16  # numbers of layers along the axis
DOTS = 48  # layers up to which each is a dot as well
NEAR = 5  # degrees from 90 that are still called that


class Line(NamedTuple):
  """A name, and a value for each group; None where there is none."""

  name: str
  values: list[float | None]


class Depth(NamedTuple):
  """Where groups stand along the depth: layers in line, others at the ends.

  Attributes:
    at: position of each group.
    ticks: position -> label.
    layers: which groups are layers.
  """

  at: list[float]
  ticks: dict[float, str]
  layers: list[int]


def geometry_html(geometry: dict[str, Any], salt: str) -> str:
  """Sentences, two charts and two tables."""
  said = ''.join(f'<p>{visible(x)}</p>' for x in geometry_lines(geometry))
  out = said + _chart(
    angle_lines(geometry),
    geometry,
    f'{salt} angles',
    'angle between task vectors, degrees',
    'Angle between the task vectors of each pair of models, group by group.',
  )
  out += _chart(
    norm_lines(geometry),
    geometry,
    f'{salt} norms',
    'norm / norm of the base',
    'Norm of each task vector, relative to the weights of the base.',
  )
  return f'{out}{_distances(geometry)}{_groups(geometry)}'


def angle_lines(geometry: dict[str, Any]) -> list[Line]:
  """Degrees of each pair of models; [] of one model."""
  names = [model['name'] for model in geometry['models']]
  pairs = [(i, j) for j in range(len(names)) for i in range(j)]
  return [
    Line(
      f'{names[i]} · {names[j]}',
      [of['angles_deg'][at] for of in _parts(geometry).values()],
    )
    for at, (i, j) in enumerate(pairs)
  ]


def norm_lines(geometry: dict[str, Any]) -> list[Line]:
  """Norm of each task vector, relative to the weights of the base."""
  return [
    Line(
      model['name'], [of['relative'][at] for of in _parts(geometry).values()]
    )
    for at, model in enumerate(geometry['models'])
  ]


def depth(names: Sequence[str]) -> Depth:
  """Groups as they come, which is up the net."""
  layers = [i for i, name in enumerate(names) if _layer(name)]
  gap = max(1.0, 0.09 * len(layers))  # room for a word below the end
  step = math.ceil(len(layers) / TICKS) if layers else 1
  at: list[float] = []
  ticks: dict[float, str] = {}
  for i, name in enumerate(names):
    near = i in layers and i - 1 in layers
    at.append(at[-1] + (1.0 if near else gap) if at else 0.0)
    if i not in layers:
      ticks[at[-1]] = name.replace('_', ' ')
    elif layers.index(i) % step == 0:
      ticks[at[-1]] = _layer(name)
  return Depth(at, ticks, layers)


def geometry_lines(geometry: dict[str, Any]) -> list[str]:
  """What can be read off, in sentences of measured numbers."""
  models, groups = geometry['models'], _parts(geometry)
  whole, base = geometry['groups']['all'], geometry['base']['name']
  names = [m['name'] for m in models]
  who = ' and '.join(names)
  if len(names) > 2:
    who = f'{len(names)} models'  # named in the legend and in the tables
  norm = _listed(whole['norms'], _size)
  lines = [
    f'Task vector{"s" * (len(names) > 1)} of {who}, from {base}: norm {norm}'
    + (
      f', {_listed(whole["relative"], "{:.2%}".format)} of that of its weights.'
      if None not in whole['relative']
      else '.'
    )
  ]
  if still := [m['name'] for m, x in zip(models, whole['norms']) if not x]:
    lines.append(
      f'{", ".join(still)}: the same weights as {base}, a task vector of 0, '
      'which has no angle.'
    )
  if len(models) > 1:
    lines += [_angles_said(groups), _merges_said(whole, len(models))]
  return [line for line in lines if line]


def _angles_said(groups: dict[str, dict[str, Any]]) -> str:
  layers = [x for name, of in groups.items() if _layer(name) for x in _told(of)]
  parts = []
  if layers:
    near = all(abs(x - 90) <= NEAR for x in layers)
    more = f' (within {NEAR}° of orthogonal in each)' if near else ''
    parts.append(f'{_range(layers)} in the layers{more}')
  for name, of in groups.items():
    if (some := _told(of)) and not _layer(name):
      parts.append(f'{_range(some)} in the {name.replace("_", " ")}')
  return f'Angles between task vectors are {", ".join(parts)}.' if parts else ''


def _merges_said(whole: dict[str, Any], models: int) -> str:
  length = statistics.fmean(whole['norms'])
  if not length:
    return ''
  said = (
    f'In equal shares, LERP of the {models} models makes a task vector of '
    f'{whole["lerp"] / length:.2f} times their mean norm'
  )
  if whole['slerp'] is None:
    said += '; SLERP is not defined, for some are opposite'
  else:
    said += f', SLERP layer by layer one of {whole["slerp"] / length:.2f} times'
  if whole['sign_conflicts'] is not None:
    said += (
      f'. Signs disagree at {whole["sign_conflicts"]:.1%} of the weights that '
      'two or more of them have moved'
    )
  return f'{said}.'


def _listed(values: Sequence[float], shown: Any) -> str:
  """Both of two; of more the lowest and the highest."""
  if len(values) > 2:
    return _span(values, shown)
  return ' and '.join(map(shown, values))


def _size(value: float) -> str:
  """Three digits, zeros at the end among them."""
  if 1e-3 <= value < 1000:
    return f'{value:#.3g}'.rstrip('.')
  return number(value)


def _told(of: dict[str, Any]) -> list[float]:
  return [x for x in of['angles_deg'] if x is not None]


def _range(values: Sequence[float]) -> str:
  low, high = (f'{f(values):.1f}°' for f in (min, max))
  return low if low == high else f'{low} to {high}'


def _parts(geometry: dict[str, Any]) -> dict[str, dict[str, Any]]:
  """Groups without all of them together."""
  return {k: v for k, v in geometry['groups'].items() if k != 'all'}


def _layer(name: str) -> str:
  """The number of a layer; '' of what is none."""
  match = re.fullmatch(r'(?:.*/)?layer_(\d+)', name)
  return match[1] if match else ''


def _chart(
  lines: Sequence[Line], geometry: dict[str, Any], salt: str, up: str, said: str
) -> str:
  """A figure of lines over the depth; '' where there is nothing to draw."""
  if not any(x is not None for line in lines for x in line.values):
    return ''
  angles = up.startswith('angle')
  where = depth([*_parts(geometry)])
  with ink.style(salt):
    figure = ink.canvas(WIDTH, HEIGHT)
    axes = figure.add_axes((0.066, 0.15, 0.86, 0.82))
    few = len(lines) <= MOST
    _lines(axes, lines, where) if few else _spread(axes, lines, where)
    axes.set_xticks([*where.ticks], [*where.ticks.values()])
    axes.tick_params(length=0, pad=5)
    axes.set_xlabel('layer', labelpad=4)
    axes.set_ylabel(up, labelpad=7)
    _heights(axes, lines, angles)
    axes.yaxis.set_major_formatter(lambda value, _: tick(value))
    # Both charts of a page have the same width, with and without gaps.
    side = 0.04 * (where.at[-1] - where.at[0]) or 1.0
    axes.set_xlim(where.at[0] - side, where.at[-1] + side)
    chart = ink.svg(figure, escape(up, quote=True))
  if not few:
    said += (
      f' The line is the median of {len(lines)}, the band and the bars reach '
      'from the lowest to the highest.'
    )
  keys = ''.join(
    f'<span class="key"><i style="background:{_colour(i, len(lines))}"></i>'
    f'{visible(line.name)}</span>'
    for i, line in enumerate(lines)
    if few
  )
  legend = f'<p class="facts">{keys}</p>' if keys else ''
  return (
    f'{legend}<figure class="card wide depth"><div class="scroll">{chart}</div>'
    f'<figcaption>{said}</figcaption></figure>'
  )


def _heights(axes: Axes, lines: Sequence[Line], angles: bool) -> None:
  """Limits, and where there are angles the guide of 90 degrees."""
  known = [x for line in lines for x in line.values if x is not None]
  if angles:
    low, high = min(90.0, *known), max(90.0, *known)
    pad = max(2.0, 0.08 * (high - low))
    # Beyond 0 and 180 is room for the dots alone.
    axes.set_ylim(max(low - pad, -6), min(high + pad, 186))
    axes.axhline(90, color=ink.MUTED, linewidth=1, linestyle=(0, (5, 4)))
    axes.annotate(
      'orthogonal',
      (1, 90),
      xycoords=axes.get_yaxis_transform(),
      xytext=(5, 0),
      textcoords='offset points',
      va='center',
      fontsize=10.5,
      color=ink.MUTED,
      annotation_clip=False,
    )
  elif min(known) > 0 and max(known) > 30 * min(known):
    axes.set_yscale('log')
    axes.yaxis.set_minor_formatter(NullFormatter())
  else:
    top = max(known) or 1.0
    axes.set_ylim(0 if min(known) else -0.04 * top, 1.1 * top)


def _lines(axes: Axes, lines: Sequence[Line], where: Depth) -> None:
  ends = [i for i in range(len(where.at)) if i not in where.layers]
  for i, line in enumerate(lines):
    colour = _colour(i, len(lines))
    values = [math.nan if x is None else x for x in line.values]
    axes.plot(
      [where.at[k] for k in where.layers],
      [values[k] for k in where.layers],
      color=colour,
      linewidth=1.6,
      marker='o' if len(where.layers) <= DOTS else None,
      markersize=4.5,
    )
    axes.plot(
      [where.at[k] for k in ends],
      [values[k] for k in ends],
      color=colour,
      linestyle='none',
      marker='D',
      markersize=6.5,
      markeredgecolor='white',
      markeredgewidth=0.8,
    )


def _spread(axes: Axes, lines: Sequence[Line], where: Depth) -> None:
  """Range and median of many lines."""
  found = []
  for k in range(len(where.at)):
    known = [x for line in lines if (x := line.values[k]) is not None]
    known = known or [math.nan]
    found.append((min(known), statistics.median(known), max(known)))
  inner = [(where.at[k], *found[k]) for k in where.layers]
  if inner:
    x, low, middle, high = zip(*inner)
    axes.fill_between(x, low, high, color=ink.ALONE, alpha=0.22, linewidth=0)
    axes.plot(x, middle, color=ink.ALONE, linewidth=1.8)
  for k, (low, middle, high) in enumerate(found):
    if k not in where.layers:
      axes.vlines(where.at[k], low, high, color=ink.ALONE, alpha=0.35, lw=6)
      axes.plot(where.at[k], middle, color=ink.ALONE, marker='D', markersize=6)


def _colour(i: int, count: int) -> str:
  return ink.ALONE if count == 1 else ink.RUN_COLOURS[i]


def _distances(geometry: dict[str, Any]) -> str:
  named = [geometry['base'], *geometry['models']]
  names = [visible(one['name']) for one in named]
  head = ''.join(f'<th scope="col">{name}</th>' for name in names)
  rows = ''.join(
    f'<tr><th scope="row">{name}</th>'
    + ''.join(
      '<td class="none">–</td>' if i == j else f'<td>{_size(x)}</td>'
      for j, x in enumerate(row)
    )
    + '</tr>'
    for i, (name, row) in enumerate(
      zip(names, geometry['groups']['all']['distances'])
    )
  )
  return _table(
    'Distances between the weights',
    f'<tr><th scope="col"></th>{head}</tr>',
    rows,
  )


def _groups(geometry: dict[str, Any]) -> str:
  """The numbers of each group; the long table is folded."""
  columns = ['norm', 'relative to the base']
  if several := len(geometry['models']) > 1:
    columns += ['angle', 'signs disagree', 'norm of LERP', 'norm of SLERP']
  head = ''.join(f'<th scope="col">{column}</th>' for column in columns)
  rows = ''
  for name, of in geometry['groups'].items():
    cells = [_span(of['norms'], _size), _span(of['relative'], '{:.2%}'.format)]
    if several:
      share = of['sign_conflicts']
      cells.append(_span(of['angles_deg'], '{:.1f}°'.format))
      cells.append('–' if share is None else f'{share:.1%}')
      cells += [_times(of, 'lerp'), _times(of, 'slerp')]
    cells = ''.join(
      f'<td class="none">{x}</td>' if x == '–' else f'<td>{x}</td>'
      for x in cells
    )
    rows += f'<tr><th scope="row">{visible(name)}</th>{cells}</tr>'
  note = (
    'From the lowest to the highest of the models, or of their pairs; – where '
    'there is none. '
  )
  if several:
    note += (
      'Signs: share of the weights moved by two or more models at which they '
      'disagree. Norms of LERP and SLERP: of the task vector of their merge in '
      'equal shares, by the mean norm of the models.'
    )
  table = _table('By group', f'<tr><th scope="col">group</th>{head}</tr>', rows)
  if len(geometry['groups']) > 12:
    count = len(geometry['groups'])
    table = f'<details><summary>{count} groups</summary>{table}</details>'
  return f'{table}<p class="note">{note}</p>'


def _table(title: str, head: str, rows: str) -> str:
  return (
    f'<h3>{title}</h3><div class="scroll"><table class="models plain"><thead>'
    f'{head}</thead><tbody>{rows}</tbody></table></div>'
  )


def _span(values: Sequence[float | None], shown: Any) -> str:
  known = [x for x in values if x is not None]
  if not known:
    return '–'
  low, high = shown(min(known)), shown(max(known))
  return low if low == high else f'{low} to {high}'


def _times(of: dict[str, Any], merge: str) -> str:
  length = statistics.fmean(of['norms'])
  return (
    f'{of[merge] / length:.2f} ×' if length and of[merge] is not None else '–'
  )
