"""The reward-KL front: what every model gains, and how far it went for it.

One chart of an evaluation; diversity is drawn against either in the same way.
It draws what was measured and fits nothing; the dotted line from the init to
the merged model is a ruler, not a result.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from alignjax.report import arms, grid, ink
from alignjax.report.labels import place
from alignjax.report.points import FRONT, Point, points, sweeps
from alignjax.report.read import interval

WIDTH, HEIGHT = 1000, 580
BEST_OF_N = '#7b8794'
NAMES = {
  'kl': 'KL to the init, nats per sequence',
  'reward': 'mean reward',
  'diversity': 'diversity of the completions of a prompt, 1 - cos',
  'log_quantile': 'mean log-quantile among completions of the init',
  'win_rate': 'win rate against the init',
  'best_of_4': 'win rate of the best of 4, against that of the init',
  'worst_of_4': 'win rate of the worst of 4, against that of the init',
}


class Label(NamedTuple):
  """A text that belongs to a point given in data coordinates."""

  text: str
  x: float
  y: float
  colour: str
  size: float
  weight: str


def front_svg(
  evaluation: dict[str, Any],
  salt: str = 'front',
  fields: tuple[str, str] = FRONT,
) -> str:
  """The front, or two other fields, as an `<svg>` element."""
  across, up = (NAMES[field].split(',')[0] for field in fields)
  with ink.style(salt):
    title = f'{up[0].upper()}{up[1:]} against {across}'
    return ink.svg(draw(evaluation, fields), title)


def draw(evaluation: dict[str, Any], fields: tuple[str, str] = FRONT) -> Figure:
  """The figure; must be called and written inside `ink.style`."""
  figure = ink.canvas(WIDTH, HEIGHT)
  axes = figure.add_axes((0.066, 0.092, 0.918, 0.8))
  each, evaluation = points(evaluation, fields), arms.pooled(evaluation)
  every = points(evaluation, fields)
  paths = sweeps(evaluation, fields)
  reference = evaluation.get('best_of_n') or [] if fields == FRONT else []
  _limits(axes, [*each, *every], reference, fields)
  _lines(axes, paths, reference)
  of = {p.name: p for p in every}
  joined = [
    [of[name] for name in names if name in of]
    for names in grid.paths(evaluation)
  ]
  for some in joined:
    _path(axes, some)
  for point in every:
    _mark(axes, point, _green(paths, point.series))
  together = {p.name for p in every}
  _seeds(axes, [p for p in each if p.name not in together])
  axes.set_xlabel(NAMES[fields[0]], labelpad=7)
  axes.set_ylabel(NAMES[fields[1]], labelpad=7)
  entries = len(axes.get_legend_handles_labels()[1])
  figure.legend(
    loc='upper left',
    bbox_to_anchor=(0.06, 0.995),
    ncols=4 if entries <= 12 else 6,
    frameon=False,
    fontsize=10.5,
    handletextpad=0.5,
    columnspacing=1.8,
    borderaxespad=0.1,
  )
  _label(axes, every, list(paths.values()), joined, reference)
  return figure


def _limits(
  axes: Axes, every: Sequence[Point], reference: Sequence[Any], fields
):
  """Room for every interval, and a margin for labels."""
  xs = [v for p in every for v in p.x] + [b['kl'] for b in reference]
  xs += [0.0] if fields[0] == 'kl' else []
  ys = [v for p in every for v in p.y]
  ys += [v for b in reference for v in interval(b, 'reward') or ()]
  for values, limit in ((xs, axes.set_xlim), (ys, axes.set_ylim)):
    low, high = min(values), max(values)
    margin = 0.06 * (high - low) or 0.1
    limit(low - margin, high + margin)


def _green(paths: dict[str, list[Point]], series: str) -> str:
  """The colour of a LITI path: the last has the kind's own, earlier paler."""
  names = list(paths)
  before = len(names) - 1 - names.index(series) if series in names else 0
  return ink.paler(ink.LOOKS['liti'].fill, before)


def _lines(axes, paths: dict[str, list[Point]], reference):
  if reference:
    axes.plot(
      [b['kl'] for b in reference],
      [b['reward']['mean'] for b in reference],
      color=BEST_OF_N,
      linewidth=1.4,
      linestyle=(0, (4, 2.5)),
      marker='o',
      markersize=4,
      markerfacecolor='white',
      label='best of N from the init',
      zorder=2.5,
    )
  look = ink.LOOKS['liti']
  for number, (series, path) in enumerate(paths.items()):
    if len(path) < 2:
      continue
    ends = path[0], path[-1]
    straight = 'straight line, init to merged'
    axes.plot(
      [p.x[0] for p in ends],
      [p.y[0] for p in ends],
      color='#9aa4b0',
      linewidth=1.1,
      linestyle=(0, (1, 2.5)),
      label=None if number else straight,
      zorder=2,
    )
    axes.plot(
      [p.x[0] for p in path],
      [p.y[0] for p in path],
      color=_green(paths, series),
      linewidth=2,
      marker='o',
      markersize=look.size,
      markeredgecolor='white',
      label=f'LITI, {series}' if series else look.label,
      zorder=3,
    )


def _path(axes: Axes, path: list[Point]):
  """A number of a merging method, from its least to its largest."""
  xs, ys = [p.x[0] for p in path], [p.y[0] for p in path]
  if path:
    fill = path[0].look.fill
    axes.plot(xs, ys, color=fill, linewidth=1.4, alpha=0.6, zorder=2)


def _seeds(axes: Axes, some: Sequence[Point]):
  """The seeds of arms: small, pale, without intervals or labels."""
  for p in some:
    axes.plot(
      [p.x[0]],
      [p.y[0]],
      linestyle='none',
      marker=p.look.marker,
      markersize=0.6 * p.look.size,
      color=p.look.fill,
      markeredgecolor='none',
      alpha=0.35,
      zorder=1.5,
    )


def _mark(axes: Axes, point: Point, green: str):
  look = point.look
  if point.kind == 'liti':  # the line of its path is in the legend
    label = None if point.series else look.label
    look = look._replace(fill=green, label=label)
  seen = axes.get_legend_handles_labels()[1]
  (x, x0, x1), (y, y0, y1) = point.x, point.y
  above = 5 - 0.1 * ink.rank(point.kind)
  for across, up in (((x0, x1), (y, y)), ((x, x), (y0, y1))):
    axes.plot(
      across,
      up,
      color=look.fill,
      linewidth=1.1,
      alpha=0.55,
      solid_capstyle='butt',
      zorder=above - 2,
    )
  axes.plot(
    [x],
    [y],
    linestyle='none',
    marker=look.marker,
    markersize=look.size,
    color=look.fill,
    markeredgecolor='white',
    markeredgewidth=0.9,
    label=None if look.label in seen else look.label,
    zorder=above,
  )


def _texts(axes, every, paths, reference) -> list[Label]:
  """One label per place: models that coincide on the chart share one.

  Of several LITI paths only the last has its rates written; an arm of several
  models is named by the legend.
  """
  out: list[Label] = []
  path = paths[-1] if paths else []
  interpolated = [p for path in paths for p in path if p.kind == 'liti']
  sizes = Counter(p.arm for p in every if p.arm)
  named = [
    p
    for p in every
    if p not in interpolated
    and p not in path
    and (sizes[p.arm] < 2 or p.numbers)
  ]
  pixel = axes.transData.transform
  shared: dict[str, str] = {}
  for p in (p for p in path if p.kind == 'liti'):
    here = pixel((p.x[0], p.y[0]))
    twins = [
      q.name for q in named if math.dist(here, pixel((q.x[0], q.y[0]))) < 4
    ]
    if twins:
      shared[twins[0]] = f' · rate {p.rate:g}'
      continue
    colour = ink.LOOKS['liti'].text
    out.append(Label(f'{p.rate:g}', p.x[0], p.y[0], colour, 10.5, 'bold'))
  for p in named:
    alone = sizes[p.arm] < 2
    text = (p.name if alone else p.numbers) + shared.get(p.name, '')
    out.append(Label(text, p.x[0], p.y[0], p.look.text, 11, 'bold'))
  for b in reference:
    if b.get('n', 1) > 1:  # one of one is the init
      y = b['reward']['mean']
      out.append(Label(f'N={b["n"]}', b['kl'], y, '#5b6673', 9.5, 'normal'))
  return out


def _label(axes: Axes, every, paths, joined, reference):
  """Write the labels where they cover neither one another nor the data."""
  figure = axes.get_figure(root=True)
  assert figure is not None
  renderer = FigureCanvasAgg(figure).get_renderer()
  texts = _texts(axes, every, paths, reference)
  drawn = [
    axes.annotate(
      t.text,
      (t.x, t.y),
      xytext=(0, 0),
      textcoords='figure points',
      color=t.colour,
      fontsize=t.size,
      fontweight=t.weight,
      ha='center',
      va='center_baseline',
      annotation_clip=False,
      zorder=9,
    )
    for t in texts
  ]
  pixel = axes.transData.transform
  extents = [a.get_window_extent(renderer) for a in drawn]
  frame = axes.get_window_extent(renderer)
  where = place(
    [tuple(pixel((t.x, t.y))) for t in texts],
    [(e.width + 2, e.height) for e in extents],
    boxes=_boxes(pixel, every, reference),
    segments=_segments(pixel, every, [*paths, *joined], reference),
    frame=(frame.x0 + 4, frame.y0 + 4, frame.x1 + 8, frame.y1 + 8),
  )
  for annotation, text, spot, extent in zip(drawn, texts, where, extents):
    annotation.set_position((spot.x, spot.y))
    if spot.leader:
      x, y = pixel((text.x, text.y))
      across, up = extent.width / 2 + 1, extent.height / 2
      edge = (  # of the label, nearest to the point
        min(max(x, spot.x - across), spot.x + across),
        min(max(y, spot.y - up), spot.y + up),
      )
      _leader(axes, text, edge)


def _leader(axes: Axes, text: Label, edge: tuple[float, float]):
  """A thin line from just outside the marker to the edge of the label."""
  axes.annotate(
    '',
    (text.x, text.y),
    xytext=edge,
    textcoords='figure points',
    arrowprops={
      'arrowstyle': '-',
      'color': text.colour,
      'linewidth': 0.7,
      'alpha': 0.7,
      'shrinkA': 0,
      'shrinkB': 5,
    },
    zorder=4,
  )


def _boxes(pixel, every, reference):
  centres = [(pixel((p.x[0], p.y[0])), 5.0) for p in every]
  centres += [(pixel((b['kl'], b['reward']['mean'])), 3.0) for b in reference]
  return [(x - r, y - r, x + r, y + r) for (x, y), r in centres]


def _segments(pixel, every, paths, reference):
  lines = []
  for p in every:
    lines.append(((p.x[1], p.y[0]), (p.x[2], p.y[0])))
    lines.append(((p.x[0], p.y[1]), (p.x[0], p.y[2])))
  for curve in (
    *([(p.x[0], p.y[0]) for p in path] for path in paths),
    [(b['kl'], b['reward']['mean']) for b in reference],
  ):
    lines += list(zip(curve, curve[1:]))
  return [(*pixel(a), *pixel(b)) for a, b in lines]
