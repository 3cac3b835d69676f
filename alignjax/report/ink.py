"""How things look: a colour and a marker per kind of model, and SVG output.

One palette (Okabe and Ito's, safe for colour-blind readers) for every chart
and table, and one way to turn a matplotlib figure into SVG that can stand in
an HTML page. No chart is drawn here.
"""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

TEXT = '#22272e'
MUTED = '#667080'
GRID = '#e3e7ec'


class Look(NamedTuple):
  """Fill colour, a darker one for text, matplotlib marker, size, legend."""

  fill: str
  text: str
  marker: str
  size: float
  label: str


# In the order of tables and legends.
LOOKS = {
  'init': Look('#22272e', '#22272e', 'o', 8, 'init'),
  'run': Look('#d55e00', '#b34e00', 's', 7.5, 'aligned run'),
  'anchor': Look('#e69f00', '#8f6200', '^', 8.5, 'EMA anchor of a run'),
  'lerp': Look('#cc79a7', '#a3487c', 'P', 9, 'LERP of the runs'),
  'slerp': Look('#0072b2', '#00619a', 'D', 8, 'SLERP of the runs'),
  'liti': Look('#009e73', '#00785a', 'o', 6, 'LITI, labelled by rate'),
}
OTHER = Look('#7a6fb0', '#5c5196', 'v', 8, 'other')
# Runs of one group: neighbours differ in lightness as well as in hue.
RUN_COLOURS = ('#d55e00', '#0072b2', '#009e73', '#8a4f7d', '#b38600', '#3f4b59')
ALONE = '#3f5f8a'


def look(kind: str) -> Look:
  """How a kind of model looks; kinds without a look of their own share one."""
  return LOOKS.get(kind, OTHER._replace(label=kind))


def paler(colour: str, times: int) -> str:
  """'#rrggbb' moved towards white, a third of the way each time."""
  parts = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
  moved = [255 - (255 - x) * (2 / 3) ** times for x in parts]
  return '#' + ''.join(f'{round(x):02x}' for x in moved)


def css(kind: str) -> str:
  """The kind's colour for HTML; the init's black would vanish on dark."""
  return 'var(--text)' if kind == 'init' else look(kind).fill


def rank(kind: str) -> int:
  """Position of a kind in tables and legends."""
  return list(LOOKS).index(kind) if kind in LOOKS else len(LOOKS)


@contextmanager
def style(salt: str) -> Iterator[None]:
  """Settings under which every figure is built and written.

  Args:
    salt: distinct per chart of a page, so that their SVG ids are too.
  """
  with matplotlib.rc_context():
    matplotlib.rcdefaults()
    matplotlib.rcParams.update(
      {
        'svg.hashsalt': salt,
        'svg.fonttype': 'none',
        'font.family': 'DejaVu Sans',
        'font.size': 11,
        'figure.facecolor': 'none',
        'axes.facecolor': 'none',
        'savefig.facecolor': 'none',
        'text.color': TEXT,
        'text.parse_math': False,
        'axes.edgecolor': '#b4bcc6',
        'axes.labelcolor': TEXT,
        'axes.linewidth': 0.8,
        'axes.spines.top': False,
        'axes.spines.right': False,
        'axes.grid': True,
        'axes.axisbelow': True,
        'grid.color': GRID,
        'grid.linewidth': 0.7,
        'xtick.color': '#b4bcc6',
        'ytick.color': '#b4bcc6',
        'xtick.labelcolor': MUTED,
        'ytick.labelcolor': MUTED,
        'xtick.labelsize': 10.5,
        'ytick.labelsize': 10.5,
        'lines.solid_capstyle': 'round',
        'path.simplify': False,
      }
    )
    yield


def canvas(width: int, height: int) -> Figure:
  """An empty figure whose unit, at scale 1, is one CSS pixel."""
  return Figure(figsize=(width / 72, height / 72), dpi=72)


def svg(figure: Figure, title: str) -> str:
  """The figure as one `<svg>` element for an HTML page, byte for byte stable.

  Everything that a page does not need goes: the XML prologue, name spaces,
  metadata, the ids that nothing refers to, and the style rule that would
  apply to the whole page.
  """
  buffer = io.StringIO()
  FigureCanvasSVG(figure).print_svg(buffer, metadata={'Date': None})
  text = buffer.getvalue()
  text = text[text.index('<svg') :].strip()
  text = re.sub(r'<metadata>.*?</metadata>\s*', '', text, flags=re.S)
  text = re.sub(r'<style type="text/css">.*?</style>', '', text, flags=re.S)
  text = re.sub(r'<defs>\s*</defs>\s*', '', text)
  text = re.sub(r'<!--.*?-->\s*', '', text, flags=re.S)
  used = set(re.findall(r'[(=]"?#([\w-]+)', text))
  text = re.sub(r' id="([^"]*)"', lambda m: m[0] if m[1] in used else '', text)
  box = re.search(r'viewBox="[^"]*"', text)
  assert box is not None
  head = f'<svg {box[0]} role="img" aria-label="{title}">'
  return re.sub(r'^<svg[^>]*>', head, text)
