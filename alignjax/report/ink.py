"""How things look: a colour and a marker per kind or arm, and the output.

One palette (Okabe and Ito's, safe for colour-blind readers) for every chart
and table, and one way to turn a matplotlib figure into SVG that can stand in
an HTML page, and one into a small PNG. No chart is drawn here.
"""

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
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
# Runs of one group: neighbours differ in lightness as well as in hue.
RUN_COLOURS = ('#d55e00', '#0072b2', '#009e73', '#8a4f7d', '#b38600', '#3f4b59')
ALONE = '#3f5f8a'
# Arms take colours and markers in turn: 42 of them differ. No circle and no
# diamond, which mean the init, SLERP and LITI.
ARM_MARKERS = (('s', 7.5), ('^', 8.5), ('v', 8.5), ('X', 8.5), ('P', 9)) + (
  ('<', 8.5),
  ('>', 8.5),
)
ON_PATHS = ('init', 'slerp', 'liti')  # their series is a LITI path


def arm(model: Mapping[str, Any]) -> str:
  """The arm of an experiment that a model belongs to, '' for none.

  It is the model's `series`, and of a kind without a look of its own the kind.
  """
  kind, series = str(model.get('kind', 'other')), model.get('series') or ''
  if kind not in LOOKS:
    return series or kind
  return '' if kind in ON_PATHS else series


def looks(models: Sequence[Mapping[str, Any]]) -> dict[str, Look]:
  """Name of a model -> how it looks: its kind, or its arm in their order."""
  kinds = {a: str(m.get('kind')) for m in reversed(models) if (a := arm(m))}
  names = dict.fromkeys(a for m in models if (a := arm(m)))
  # The first arm looks like an aligned run, and of LERP or anchors like those.
  taken = {m.get('kind') for m in models if not arm(m)}
  of_arms, number = {}, int('run' in taken)
  for name in names:
    kind = kinds[name]
    if kind in ('anchor', 'lerp') and kind not in taken:
      of_arms[name] = LOOKS[kind]._replace(label=name)
      taken.add(kind)
    else:
      of_arms[name] = _of_arm(number, name)
      number += 1
  return {
    m['name']: of_arms[a] if (a := arm(m)) else LOOKS[m['kind']] for m in models
  }


def _of_arm(number: int, label: str) -> Look:
  fill = RUN_COLOURS[number % len(RUN_COLOURS)]
  parts = [int(fill[i : i + 2], 16) for i in (1, 3, 5)]
  text = '#' + ''.join(f'{5 * x // 6:02x}' for x in parts)
  return Look(fill, text, *ARM_MARKERS[number % len(ARM_MARKERS)], label)


def paler(colour: str, times: int) -> str:
  """'#rrggbb' moved towards white, a third of the way each time."""
  parts = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
  moved = [255 - (255 - x) * (2 / 3) ** times for x in parts]
  return '#' + ''.join(f'{round(x):02x}' for x in moved)


def css(look: Look | None) -> str:
  """A colour for HTML; the init's black would vanish on dark."""
  return 'var(--text)' if look in (None, LOOKS['init']) else look.fill


def rank(kind: str) -> int:
  """Position of a kind in tables and legends."""
  return list(LOOKS).index(kind) if kind in LOOKS else len(LOOKS)


def ordered(models: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
  """As in tables and legends: by kind, then series as they come, then rate."""
  series = list(dict.fromkeys(m.get('series') or '' for m in models))
  return sorted(
    models,
    key=lambda m: (
      rank(str(m.get('kind'))),
      series.index(m.get('series') or ''),
      m.get('liti_rate') or 0.0,
    ),
  )


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


def png(figure: Figure) -> bytes:
  """The figure on white in 256 colours, some tens of kB."""
  from PIL import Image  # matplotlib brings it

  buffer = io.BytesIO()
  FigureCanvasAgg(figure).print_figure(
    buffer,
    dpi=72 * 1.25,
    format='png',
    facecolor='white',
    metadata={'Software': None},
  )
  # The median cut spends its colours on the greys of text; an octree does not.
  image = Image.open(buffer).convert('RGB')
  image = image.quantize(256, Image.Quantize.FASTOCTREE)
  small = io.BytesIO()
  image.save(small, format='PNG', optimize=True)
  return small.getvalue()


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
