"""Perplexity on held-out text: a line per arm over the sizes of models.

For a perplexity.json of `alignjax perplexity`. Models of one `series` are an
arm; those of one size are its seeds. What is said of two arms rests on the
spread between seeds, and on the least of them; nothing is fitted.
"""

import statistics
from collections.abc import Mapping
from html import escape
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from alignjax.report import ink
from alignjax.report.samples import visible

WIDTH, HEIGHT = 1000, 420


class Point(NamedTuple):
  """The models of one arm and size: their perplexities, one per seed."""

  parameters: int
  values: list[float]

  @property
  def mean(self) -> float:
    return statistics.fmean(self.values)


def arms(document: Mapping[str, Any]) -> dict[str, list[Point]]:
  """Arm -> its points by size; a model without a series is its own arm."""
  found: dict[str, dict[int, list[float]]] = {}
  for model in document['models']:
    sizes = found.setdefault(model.get('series') or model['name'], {})
    of = sizes.setdefault(int(model['parameters']), [])
    of.append(model['perplexity']['mean'])
  return {
    name: [Point(size, of) for size, of in sorted(sizes.items())]
    for name, sizes in found.items()
  }


def perplexity_lines(document: Mapping[str, Any]) -> list[str]:
  """Sentences: the arms of each size, the best first."""
  sizes: dict[int, list[tuple[Point, str]]] = {}
  for name, points in arms(document).items():
    for point in points:
      sizes.setdefault(point.parameters, []).append((point, name))
  lines = []
  for size, found in sorted(sizes.items()):
    found.sort(key=lambda pair: pair[0].mean)
    said = [f'{name} {_said(point)}' for point, name in found]
    line = f'{short(size)} parameters: perplexity {", ".join(said)}'
    if len(found) > 1:
      best, second = found[0][0], found[1][0]
      if min(len(best.values), len(second.values)) < 2:
        line += '; one seed tells no difference'
      elif max(best.values) < min(second.values):
        line += f'; every seed of {found[0][1]} is below every other model'
      else:
        line += '; the seeds of the best two overlap'
    lines.append(f'{line}.')
  return lines


def perplexity_html(document: Mapping[str, Any], salt: str) -> str:
  """Sentences, the chart and the table."""
  said = ''.join(f'<p>{visible(x)}</p>' for x in perplexity_lines(document))
  note = (
    'Lower is better. A dot is a model, a line joins the means of an arm over '
    f'its seeds. {document["tokens"]:,} tokens of {document["rows"]:,} rows of '
    'held-out text.'
  )
  with ink.style(salt):
    chart = ink.svg(draw(document), 'Perplexity against size')
  return (
    f'{said}<figure class="card wide"><div class="scroll">'
    f'{chart}</div><figcaption>{note}</figcaption></figure>'
    f'{_table(document)}'
  )


def short(count: int) -> str:
  """'84 k', '1.24 M', '27.2 B'."""
  for unit, size in (('B', 1e9), ('M', 1e6), ('k', 1e3)):
    if count >= size:
      return f'{count / size:.3g} {unit}'
  return str(count)


def _said(point: Point) -> str:
  mean = f'{point.mean:.4g}'
  if len(point.values) < 2:
    return mean
  low, high = min(point.values), max(point.values)
  return f'{mean} ({len(point.values)} seeds, {low:.4g} to {high:.4g})'


def draw(document: Mapping[str, Any]) -> Figure:
  """The figure; must be called and written inside `ink.style`."""
  looks = ink.looks(document['models'])
  by_arm = {
    model.get('series') or model['name']: looks[model['name']]
    for model in document['models']
  }
  figure = ink.canvas(WIDTH, HEIGHT)
  axes = figure.add_axes((0.066, 0.13, 0.918, 0.75))
  for name, points in arms(document).items():
    look = by_arm[name]
    every = [(p.parameters, value) for p in points for value in p.values]
    axes.plot(
      [p.parameters for p in points],
      [p.mean for p in points],
      color=look.fill,
      linewidth=1.6,
    )
    axes.plot(
      *zip(*every),
      color=look.fill,
      marker=look.marker,
      markersize=look.size,
      markeredgecolor='white',
      linestyle='none',
      label=name,
    )
  axes.set_xscale('log')
  sizes = sorted({int(m['parameters']) for m in document['models']})
  axes.set_xticks(sizes)
  axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: short(round(x))))
  axes.xaxis.set_minor_formatter(NullFormatter())
  axes.set_xlabel('parameters', labelpad=7)
  axes.set_ylabel('perplexity', labelpad=7)
  figure.legend(loc='upper left', ncols=6, frameon=False, fontsize=10.5)
  return figure


def _table(document: Mapping[str, Any]) -> str:
  rows = ''.join(
    f'<tr><td>{visible(model["name"])}</td><td>{model["parameters"]:,}</td>'
    + ''.join(f'<td>{_cell(model[key])}</td>' for key in _COLUMNS)
    + '</tr>'
    for model in document['models']
  )
  heads = ''.join(f'<th>{escape(said)}</th>' for said in _COLUMNS.values())
  whose = visible(document['reference'])
  return (
    '<div class="scroll"><table><thead><tr><th>model</th><th>parameters</th>'
    f'{heads}</tr></thead><tbody>{rows}</tbody></table></div><p class="note">'
    'Means over tokens with 95% intervals over rows. Gain: what '
    f'{whose} needs beyond this model, on the same rows.</p>'
  )


_COLUMNS = {
  'perplexity': 'perplexity',
  'nll': 'nats per token',
  'gain': 'gain, nats per token',
}


def _cell(value: Mapping[str, float]) -> str:
  mean, low, high = (value[key] for key in ('mean', 'low', 'high'))
  return f'{mean:.4g} <small>[{low:.4g}, {high:.4g}]</small>'
