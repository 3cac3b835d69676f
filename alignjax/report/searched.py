"""A search for the numbers of a merge: objective by trial, and what held out.

For an evaluation with a section `search`. The chart is of the prompts that the
search was on, where the best of many is flattered; the table beside it has the
gains on those and on held-out prompts. It judges nothing by itself.
"""

import itertools
import math
from collections.abc import Mapping
from html import escape
from typing import Any

from alignjax.report import ink
from alignjax.report.read import interval

WIDTH, HEIGHT = 1000, 400
FOUND = '#0072b2'


def searched_html(evaluation: Mapping[str, Any], salt: str) -> str:
  """The chart and the table of gains; '' where nothing was searched."""
  search = evaluation.get('search') or {}
  objectives = search.get('objectives') or []
  if all(value is None for value in objectives):
    return ''
  rows = ''.join(_row(name, gain) for name, gain in search['gains'].items())
  coef = f'{search["kl_coef"]:g}'
  refused = objectives.count(None)
  note = (
    f'Objective (mean reward − {coef} KL) of each trial on the prompts of the '
    'search; the line is the best so far. '
    + (f'{refused} trial(s) could not be used. ' if refused else '')
    + 'The table compares the best with the others on these prompts and on '
    'held-out ones, with the 95% interval of the differences there.'
  )
  return (
    f'<figure class="card wide"><div class="scroll">{_svg(search, salt)}</div>'
    f'<figcaption>{note}</figcaption></figure>'
    '<div class="scroll"><table><thead><tr><th>the best has more than</th>'
    '<th>on searched prompts</th><th>on held-out prompts</th><th></th></tr>'
    f'</thead><tbody>{rows}</tbody></table></div>'
  )


def _row(name: str, gain: Mapping[str, Any]) -> str:
  held = interval(gain, 'held_out') or (math.nan,) * 3
  searched, mean, low, high = (
    f'{value:+.4f}'.replace('-', '−') for value in (gain['searched'], *held)
  )
  return (
    f'<tr><td>{escape(name)}</td><td>{searched}</td>'
    f'<td>{mean}<small>[{low}, {high}]</small></td>'
    f'<td>{escape(str(gain.get("verdict", "")))}</td></tr>'
  )


def _svg(search: Mapping[str, Any], salt: str) -> str:
  tried = [
    (i, value)
    for i, value in enumerate(search['objectives'], 1)
    if value is not None
  ]
  trials, values = zip(*tried)
  with ink.style(salt):
    figure = ink.canvas(WIDTH, HEIGHT)
    axes = figure.add_axes((0.066, 0.13, 0.918, 0.76))
    axes.plot(trials, values, 'o', color=ink.ALONE, alpha=0.55, label='trial')
    best = list(itertools.accumulate(values, max))
    axes.step(trials, best, where='post', color=FOUND, label='best so far')
    lines = [(0, (4, 2.5)), (0, (1, 1.5)), (0, (6, 2, 1, 2)), (0, (8, 3))]
    others = [name for name in search['searched'] if name in search['gains']]
    for name, line in zip(others, itertools.cycle(lines)):
      axes.axhline(
        search['searched'][name],
        color=ink.MUTED,
        linewidth=1.1,
        linestyle=line,
        label=name,
      )
    axes.set_xlabel('trial', labelpad=7)
    axes.set_ylabel('objective', labelpad=7)
    figure.legend(loc='upper left', ncols=7, frameon=False, fontsize=10.5)
    return ink.svg(figure, 'Objective of the search by trial')
