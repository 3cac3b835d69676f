"""Three sentences about a report, computed from its intervals.

What counts as a difference is `report/intervals.py`'s. Nothing here tests
hypotheses beyond that, and no sentence claims more than it found.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

from alignjax.report import arms, grid
from alignjax.report.intervals import (
  Interval,
  change,
  combined,
  stated,
  verdict,
)
from alignjax.report.points import Point, points, sweep
from alignjax.report.read import Found, Run, Series, interval
from alignjax.report.tradeoff import tradeoff_lines

# Measures of which more is better, as far as an evaluation has them.
LED = ('reward', 'win_rate', 'best_of_4', 'worst_of_4', 'diversity')


def evaluated(evaluation: dict[str, Any]) -> list[str]:
  """Three findings: against the init, SLERP, and the LITI front.

  Of a grid over merging methods: against the init, the Pareto front, the best.
  Of arms under several seeds without a LITI front: against the init, the front,
  who leads in what. Of two objectives: the trade-off, and against the init.
  """
  traded = tradeoff_lines(evaluation)
  evaluation = arms.pooled(evaluation)
  if traded:
    return [*traded, _gain(evaluation)]
  some = grid.merged(evaluation)
  if some:
    front = _pareto(evaluation, some, 'merged models')
    return [_gain(evaluation), front, _best(evaluation)]
  some = arms.of(evaluation)
  if some and not sweep(evaluation):
    front = _pareto(evaluation, some, 'arms')
    return [_gain(evaluation), front, _leaders(some)]
  return [_gain(evaluation), _slerp(evaluation), _liti(evaluation)]


def trained(found: Found) -> list[str]:
  """Three findings where there are only training curves."""
  runs = found.runs
  logged = {k for r in runs for k in r.metrics}
  key = next((k for k in ('reward', 'nll', 'loss') if k in logged), 'loss')
  told = [r for r in runs if key in r.metrics][:4]
  steps = ', '.join(f'{r.name} ({r.steps} steps)' for r in runs[:6])
  more = f' and {len(runs) - 6} more' if len(runs) > 6 else ''
  count = 'One job' if len(runs) == 1 else f'{len(runs)} jobs'
  lines = [f'{count} left training curves: {steps}{more}.']
  if told:
    changes = '; '.join(f'{r.name} {_change(r, key)}' for r in told)
    lines.append(
      f'Training {key}, mean of the first and the last tenth of the steps: '
      f'{changes}.'
    )
  else:
    lines.append('No job logged a reward or a loss.')
  lines.append(
    'No evaluation was found, so no model has been compared with its init on '
    'held-out prompts: training curves alone do not show that it improved.'
  )
  return lines


def best_run(evaluation: dict[str, Any]) -> Point | None:
  """The aligned run of highest reward; any model but the init without runs."""
  every = points(evaluation)
  some = [p for p in every if p.kind == 'run']
  some = some or [p for p in every if p.kind != 'init']
  return max(some, key=lambda p: p.y[0], default=None)


def best_liti(evaluation: dict[str, Any]) -> Point | None:
  """The LITI point of highest reward, the ends of the sweep included."""
  return max(sweep(evaluation), key=lambda p: p.y[0], default=None)


def _gain(evaluation: dict[str, Any]) -> str:
  init = _of_kind(evaluation, 'init')
  best = best_run(evaluation)
  if init is None or best is None:
    return (
      'The evaluation holds no init to compare with, or nothing but the init, '
      'so it cannot say whether alignment helped.'
    )
  difference = combined([(1, best.y), (-1, init.y)])
  noun = 'aligned run' if best.kind == 'run' else 'model'
  seeds = {m['name']: arms.seeds(m) for m in evaluation['models']}[best.name]
  noun = f'arm of {seeds} seeds' if seeds > 1 else noun
  scores = (
    f'{best.name}, the best {noun} by reward, scores {stated(best.y)} '
    f'against {stated(init.y)} for {init.name}'
  )
  said = {
    'higher': f'Alignment raises the reward: {scores} ({change(difference)})',
    'lower': f'Alignment lowers the reward: {scores} ({change(difference)})',
  }.get(
    verdict(difference),
    'Alignment makes no measurable difference to the reward: '
    f'{scores} ({change(difference)})',
  )
  said += f', at a KL of {stated(best.x, 2)} nats per sequence'
  for model in evaluation['models']:
    win = interval(model, 'win_rate')
    if model['name'] == best.name and win:
      mean, low, high = (100 * v for v in win)
      said += (
        f'; it wins {mean:.0f}% [{low:.0f}%, {high:.0f}%] against the init'
      )
  return said + '.' + _best_of_n(evaluation)


def _best_of_n(evaluation: dict[str, Any]) -> str:
  """What sampling alone reaches: the rival that needs no training."""
  several = [b for b in evaluation.get('best_of_n') or [] if b['n'] > 1]
  if not several:
    return ''
  most = max(several, key=lambda b: b['n'])
  score = interval(most, 'reward')
  assert score is not None  # checked when read
  return (
    f' For scale, the best of {most["n"]} completions of the init scores '
    f'{stated(score)} at a KL of {most["kl"]:.2f}.'
  )


def _slerp(evaluation: dict[str, Any]) -> str:
  slerp = _of_kind(evaluation, 'slerp')
  runs = [p for p in points(evaluation) if p.kind == 'run']
  lerp = _of_kind(evaluation, 'lerp')
  if slerp is None:
    return 'No SLERP of the runs was evaluated, so merging is not judged here.'
  against: list[tuple[str, Interval]] = []
  seeds = {m['name']: arms.seeds(m) for m in evaluation['models']}
  if runs:
    share = [(1 / len(runs), p.y) for p in runs]
    count = sum(seeds[p.name] for p in runs)
    against.append((f'the mean of its {count} runs', combined(share)))
  if len(runs) > 1:
    best = max(runs, key=lambda p: p.y[0])
    against.append((f'the best of them ({best.name})', best.y))
  if lerp:
    against.append(('LERP', lerp.y))
  if not against:
    return (
      f'SLERP scores {stated(slerp.y)}; there is nothing to compare it with.'
    )
  told, words = [], []
  for name, other in against:
    # The mean of the runs is itself a sum of parts, already combined above.
    difference = combined([(1, slerp.y), (-1, other)])
    words.append(verdict(difference))
    told.append(f'{name} {stated(other)} ({change(difference)}, {words[-1]})')
  wins = words.count('higher')
  if wins == len(words):
    head = 'SLERP beats everything it merges or competes with'
  elif 'lower' in words:
    head = 'SLERP does not win: it is measurably below at least one rival'
  elif wins:
    head = 'SLERP wins in part'
  else:
    head = 'SLERP does not win measurably at this size'
  return (
    f'{head}: reward {stated(slerp.y)} at KL {slerp.x[0]:.2f}, against '
    + '; '.join(told)
    + '.'
  )


def _liti(evaluation: dict[str, Any]) -> str:
  path = sweep(evaluation)
  best = best_liti(evaluation)
  inner = [p for p in path if p.rate not in (0.0, 1.0)]
  if best is None or not inner:
    return 'No LITI sweep was evaluated, so there is no front to judge.'
  start, end = path[0], path[-1]
  series = next(p.series for p in path if p.kind == 'liti')
  of = f' of {series}' if series else ''
  tail = (
    f' The best rate{of} by reward is {best.rate:g}: {stated(best.y)} at KL '
    f'{best.x[0]:.2f} nats.{_runs_at_equal_kl(evaluation, path)}'
  )
  if start.rate != 0.0 or end.rate != 1.0 or end.x[0] <= start.x[0]:
    return (
      'The LITI sweep lacks an end, or its merged model is no further from the '
      'init than the init itself, so there is no straight line to compare '
      'with.' + tail
    )
  above = []
  for p in inner:
    share = (p.x[0] - start.x[0]) / (end.x[0] - start.x[0])
    above.append(combined([(1, p.y), (-(1 - share), start.y), (-share, end.y)]))
  words = [verdict(a) for a in above]
  high, low = words.count('higher'), words.count('lower')
  count = len(inner)
  top = max(range(count), key=lambda i: above[i][0])
  margin = f'widest at rate {inner[top].rate:g}, {change(above[top])}'
  if high and not low:
    head = (
      f'The LITI front{of} lies above the straight line from init to merged, '
      f'measurably at {high} of {count} inner rates ({margin}).'
    )
  elif low and not high:
    head = (
      f'The LITI front{of} lies below the straight line from init to merged, '
      f'measurably at {low} of {count} inner rates.'
    )
  elif high and low:
    head = (
      f'The LITI front{of} is measurably above the straight line at {high} and '
      f'below it at {low} of {count} inner rates.'
    )
  else:
    head = (
      f'No measurable difference between the LITI front{of} and the straight '
      f'line from init to merged at any of {count} inner rates ({margin}).'
    )
  return head + tail


def _pareto(
  evaluation: dict[str, Any], models: Sequence[dict[str, Any]], noun: str
) -> str:
  """Which of some models are on the front, and what that is worth."""
  every = points(evaluation)
  front = grid.pareto(evaluation['models'])
  names = {m['name'] for m in models}
  some = [p for p in every if p.name in names]
  on = sorted((p for p in some if p.name in front), key=lambda p: p.x[0])
  rest = [p for p in some if p.name not in front]
  beaten = [p.name for p in rest if any(_dominates(q, p) for q in every)]
  said = (
    f'{len(on)} of {len(some)} {noun} are on the Pareto front of mean reward '
    'against KL, to which all other models count as well'
  )
  if on:
    said += ': ' + '; '.join(
      f'{p.name} ({stated(p.y)} at KL {p.x[0]:.2f})' for p in on
    )
  said += '.'
  if len(on) > 1:
    rises = [combined([(1, b.y), (-1, a.y)]) for a, b in itertools.pairwise(on)]
    count = [verdict(x) for x in rises].count('higher')
    said += (
      f' From one of them to the next the reward rises measurably {count} of '
      f'{len(rises)} times.'
    )
  if beaten:
    said += (
      f' Of the {len(rest)} off it, {len(beaten)} are measurably beaten by a '
      f'model that is behind in neither: {", ".join(beaten)}.'
    )
  elif rest:
    said += f' No measurable difference keeps the other {len(rest)} off it.'
  return said


def _dominates(one: Point, other: Point) -> bool:
  """No worse in both means, and measurably better in one."""
  reward = combined([(1, one.y), (-1, other.y)])
  kl = combined([(1, one.x), (-1, other.x)])
  better = 'higher' == verdict(reward) or 'lower' == verdict(kl)
  return reward[0] >= 0 and kl[0] <= 0 and better


def _best(evaluation: dict[str, Any]) -> str:
  """The best point of a grid against the other methods and the runs."""
  every = points(evaluation)
  merged = [p for p in every if p.kind == grid.MERGED]
  best = max(merged, key=lambda p: p.y[0])
  rivals = [
    max((p for p in merged if p.series == series), key=lambda p: p.y[0])
    for series in dict.fromkeys(p.series for p in merged)
    if series != best.series
  ]
  runs = [p for p in every if p.kind == 'run']
  rivals += [max(runs, key=lambda p: p.y[0])] if runs else []
  said = f'The best merged model by reward is {best.name}: {stated(best.y)}'
  told = []
  for rival in rivals:
    difference = combined([(1, best.y), (-1, rival.y)])
    word = verdict(difference)
    told.append(
      f'{rival.name} {stated(rival.y)} ({change(difference)}, {word})'
    )
  if not told:
    return f'{said}; there is no other method or run to compare it with.'
  return (
    f'{said}, against the best of every other method and of the runs: '
    f'{"; ".join(told)}.'
  )


def _leaders(models: Sequence[dict[str, Any]]) -> str:
  """Per measure that has a better direction: the best arm and the next."""
  told = []
  for measure in LED:
    have = [(m['name'], x) for m in models if (x := interval(m, measure))]
    if len(have) < 2:
      continue
    have.sort(key=lambda pair: -pair[1][0])
    (name, best), (second, rival) = have[:2]
    word = verdict(combined([(1, best), (-1, rival)]))
    said = 'measurably above' if word == 'higher' else 'not measurably above'
    told.append(
      f'{measure.replace("_", " ")} {name} ({stated(best)}, {said} {second}, '
      f'{stated(rival)})'
    )
  return f'Highest mean: {"; ".join(told)}.'


def _runs_at_equal_kl(evaluation, path: Sequence[Point]) -> str:
  """LITI against each run, at the run's KL, where the sweep reaches it."""
  runs = [p for p in points(evaluation) if p.kind == 'run']
  if not runs:
    return ''
  by_kl = sorted(path, key=lambda p: p.x[0])
  words: dict[str, str] = {}
  for run in runs:
    # A run just past an end, by less than its own interval, is at that end.
    kl = min(max(run.x[0], by_kl[0].x[0]), by_kl[-1].x[0])
    if not run.x[1] <= kl <= run.x[2]:
      continue
    for a, b in zip(by_kl, by_kl[1:]):
      if a.x[0] <= kl <= b.x[0] and a.x[0] < b.x[0]:
        share = (kl - a.x[0]) / (b.x[0] - a.x[0])
        parts = [(1 - share, a.y), (share, b.y), (-1, run.y)]
        words[run.name] = verdict(combined(parts))
        break
  if not words:
    near, far = min(r.x[0] for r in runs), max(r.x[0] for r in runs)
    return (
      f' The runs (KL {near:.2f} to {far:.2f}) lie outside what the sweep '
      f'covers (up to {by_kl[-1].x[0]:.2f}): no comparison at equal KL.'
    )
  ways = {
    'higher': 'above {}',
    'lower': 'below {}',
    'no measurable difference': 'not measurably different from {}',
  }
  told = [
    way.format(' and '.join(names))
    for word, way in ways.items()
    if (names := [name for name, w in words.items() if w == word])
  ]
  beyond = [r.name for r in runs if r.name not in words]
  out = f' ({" and ".join(beyond)} lies beyond it)' if beyond else ''
  return f' At equal KL the front is {", ".join(told)}{out}.'


def _of_kind(evaluation: dict[str, Any], kind: str) -> Point | None:
  same = [p for p in points(evaluation) if p.kind == kind]
  if kind == 'init':
    name = evaluation.get('reference')
    same = [p for p in same if p.name == name] or same
  return max(same, key=lambda p: p.y[0], default=None)


def _change(run: Run, key: str) -> str:
  first, last = _ends(run.metrics[key])
  return f'{first:.3g} to {last:.3g}'


def _ends(series: Series) -> tuple[float, float]:
  values = [v for v in series.values if math.isfinite(v)] or [math.nan]
  tenth = max(1, len(values) // 10)
  return sum(values[:tenth]) / tenth, sum(values[-tenth:]) / tenth
