"""Training curves: one small chart per logged number, runs of a kind overlaid.

The strong line is smoothed, the faint one is what was logged. Nothing is left
out: numbers that never change are listed in words, and those that few people
look at first are folded.
"""

import math
import re
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

from alignjax.report import ink
from alignjax.report.read import Run, Series

WIDTH, HEIGHT = 330, 168
MAX_POINTS = 400
# Shown first, in this order; anything else that was logged is folded.
FIRST = (
  'loss',
  'nll',
  'reward',
  'best_reward',
  'kl',
  'anchor_kl',
  'reward/.*',
  'log_quantile',
  'quantile',
  'length.*',
  'entropy',
  'accuracy',
  'perplexity',
  'logprob_gap',
  'tokens_per_s',
)


def curves_html(runs: Sequence[Run]) -> str:
  """Charts of every run, one block per group of runs; '' without runs."""
  groups: dict[str, list[Run]] = {}
  for run in runs:
    groups.setdefault(run.group, []).append(run)
  return '\n'.join(_group(name, some) for name, some in groups.items())


def smooth(values: Sequence[float]) -> np.ndarray:
  """Centred running mean over a tenth of the points; gaps stay gaps.

  At both ends half of the window is left, so that the last value that a
  reader sees is still a mean.
  """
  x = np.asarray(values, np.float64)
  good = np.isfinite(x)
  total = np.concatenate([[0.0], np.cumsum(np.where(good, x, 0.0))])
  count = np.concatenate([[0], np.cumsum(good)])
  at = np.arange(len(x))
  half = len(x) // 20
  high = np.minimum(at + half + 1, len(x))
  low = np.maximum(at - half, 0)
  width = count[high] - count[low]
  mean = (total[high] - total[low]) / np.maximum(width, 1)
  return np.where(good & (width > 0), mean, np.nan)


def thinned(series: Series) -> tuple[np.ndarray, np.ndarray]:
  """At most MAX_POINTS points that keep the lowest and highest of each bin."""
  steps = np.asarray(series.steps, np.float64)
  values = np.asarray(series.values, np.float64)
  if len(steps) <= MAX_POINTS:
    return steps, values
  keep = []
  for rows in np.array_split(np.arange(len(steps)), MAX_POINTS // 2):
    good = rows[np.isfinite(values[rows])]
    if len(good):
      keep += sorted({good[values[good].argmin()], good[values[good].argmax()]})
  return steps[keep], values[keep]


def _group(name: str, runs: Sequence[Run]) -> str:
  colours = _colours(len(runs))
  series = [{**r.metrics, **r.timing} for r in runs]
  keys = sorted({k for s in series for k in s}, key=_order)
  flat = {k: _constant([s[k] for s in series if k in s]) for k in keys}
  moving = [k for k in keys if flat[k] is None]
  first = [k for k in moving if _order(k)[0] < len(FIRST)] or moving
  rest = [k for k in moving if k not in first]

  def grid(some):
    panels = [_panel(name, k, runs, series, colours) for k in some]
    return f'<div class="panels">{"".join(panels)}</div>'

  legend = ''.join(
    f'<span class="key"><i style="background:{c}"></i>{escape(r.name)}</span>'
    for r, c in zip(runs, colours)
  )
  facts = escape(_facts(runs))
  out = f'<h3>{escape(name)}</h3><p class="facts">{legend} {facts}</p>'
  out += grid(first)
  if rest:
    count = f'{len(rest)} more curves' if len(rest) > 1 else 'One more curve'
    out += f'<details><summary>{count}</summary>{grid(rest)}</details>'
  still = [f'{k} = {number(v)}' for k, v in flat.items() if v is not None]
  if still:
    out += f'<p class="note">Constant: {escape(", ".join(still))}.</p>'
  return f'<section class="job">{out}</section>'


def _facts(runs: Sequence[Run]) -> str:
  steps = sorted({r.steps for r in runs})
  said = f'{steps[0]}' if len(steps) == 1 else f'{steps[0]} to {steps[-1]}'
  out = [f'last step {said}']
  speeds = [
    np.nanmedian(r.timing['tokens_per_s'].values)
    for r in runs
    if 'tokens_per_s' in r.timing
    and np.isfinite(r.timing['tokens_per_s'].values).any()
  ]
  if speeds:
    out.append(f'median {number(float(np.median(speeds)))} tokens/s')
  spent = [
    sum(r.timing['seconds'].values) for r in runs if 'seconds' in r.timing
  ]
  if spent:
    each = ' each' if len(runs) > 1 else ''
    out.append(f'{duration(sum(spent) / len(spent))} in steps{each}')
  return ' · '.join(out)


def duration(seconds: float) -> str:
  """Seconds as people say them: 0.31 s, 42 s, 3.5 min, 2.2 h."""
  if 0 < seconds < 10:
    return f'{seconds:.2g} s'
  if not math.isfinite(seconds) or seconds < 120:
    return f'{seconds:.0f} s'
  if seconds < 7200:
    return f'{seconds / 60:.1f} min'
  return f'{seconds / 3600:.1f} h'


def _panel(
  group: str,
  key: str,
  runs: Sequence[Run],
  series: Sequence[Mapping[str, Series]],
  colours: Sequence[str],
) -> str:
  """One chart with the last smoothed value of each run in its heading."""
  ends = []
  with ink.style(f'{group}/{key}'):
    figure = ink.canvas(WIDTH, HEIGHT)
    axes = figure.add_axes((0.145, 0.135, 0.835, 0.82))
    for of_run, colour in zip(series, colours):
      if key not in of_run:
        continue
      mean = smooth(of_run[key].values)
      raw = thinned(of_run[key])
      line = thinned(Series(of_run[key].steps, list(mean)))
      alone = len(raw[0]) == 1
      axes.plot(*raw, color=colour, alpha=0.28, linewidth=0.8)
      axes.plot(
        *line, color=colour, linewidth=1.6, marker='o' if alone else None
      )
      last = mean[np.isfinite(mean)]
      if len(last):
        ends.append(f'<b style="--ink:{colour}">{number(float(last[-1]))}</b>')
    if _wide([s[key] for s in series if key in s]):
      axes.set_yscale('log')
    axes.margins(x=0.015, y=0.08)
    axes.tick_params(labelsize=9.5, length=0, pad=4)
    axes.locator_params(axis='x', nbins=5)
    for axis in (axes.xaxis, axes.yaxis):
      axis.set_major_formatter(lambda value, _: tick(value))
    if axes.get_yscale() == 'linear':
      axes.locator_params(axis='y', nbins=5)
    chart = ink.svg(figure, escape(f'{key} by step, {group}', quote=True))
  values = ' · '.join(ends)
  return (
    f'<figure class="panel"><figcaption><span>{escape(key)}</span>'
    f'<span class="ends">{values}</span></figcaption>{chart}</figure>'
  )


def _colours(count: int) -> list[str]:
  if count == 1:
    return [ink.ALONE]
  return [ink.RUN_COLOURS[i % len(ink.RUN_COLOURS)] for i in range(count)]


def _order(key: str) -> tuple[int, str]:
  for place, pattern in enumerate(FIRST):
    if re.fullmatch(pattern, key):
      return place, key
  return len(FIRST), key


def _constant(some: Sequence[Series]) -> float | None:
  """The value that never changes over several points, if there is one."""
  values = {v for s in some for v in s.values}
  points = max(len(s.values) for s in some)
  if points > 1 and len(values) == 1 and math.isfinite(next(iter(values))):
    return values.pop()
  return None


def _wide(some: Sequence[Series]) -> bool:
  """Positive throughout and over three orders of magnitude: a log scale."""
  values = [v for s in some for v in s.values if math.isfinite(v)]
  return bool(values) and min(values) > 0 and max(values) > 1e3 * min(values)


def tick(value: float) -> str:
  """A short tick label: 0.25, 20k, 4e-6; never an offset beside the axis."""
  if value == 0 or 1e-3 <= abs(value) < 1e4:
    text = f'{value:.6g}'
  elif 1e4 <= abs(value) < 1e6:
    text = f'{value / 1000:.6g}k'
  else:
    text = re.sub(r'e([+-])0*', r'e\1', f'{value:.3g}').replace('e+', 'e')
  return text.replace('-', '−', 1) if value < 0 else text


def number(value: float) -> str:
  if value == 0 or 1e-3 <= abs(value) < 1e5:
    return f'{value:,.0f}' if abs(value) >= 1000 else f'{value:.3g}'
  return f'{value:.1e}'
