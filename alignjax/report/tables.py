"""The table of all models: every measured number with its interval.

Bold marks the best mean of a column that has a better direction; columns
without one (KL, length, entropy, indicators) have no bold. It sorts nothing by
merit: the order is init, runs, anchors, merges, LITI by rate.
"""

from collections.abc import Sequence
from html import escape
from typing import Any, NamedTuple

from alignjax.report import arms, ink
from alignjax.report.read import interval


class Column(NamedTuple):
  """A measured number: field, heading, unit, decimals, scale, has a best."""

  key: str
  heading: str
  unit: str
  digits: int
  scale: float
  best: bool


COLUMNS = (
  Column('reward', 'reward', '', 3, 1, True),
  Column('kl', 'KL', 'nats', 2, 1, False),
  Column('kl_sampled', 'KL, sampled', 'nats', 2, 1, False),
  Column('win_rate', 'win rate', '% vs init', 1, 100, True),
  Column('best_of_4', 'best of 4 wins', '% vs init', 1, 100, True),
  Column('worst_of_4', 'worst of 4 wins', '% vs init', 1, 100, True),
  Column('log_quantile', 'log-quantile', 'nats', 2, 1, True),
  Column('diversity', 'diversity', '1 - cos', 3, 1, False),
  Column('length', 'length', 'tokens', 1, 1, False),
  Column('entropy', 'entropy', 'nats/token', 2, 1, False),
)


def models_html(evaluation: dict[str, Any]) -> str:
  """The table of an evaluation's models as a `<table>` element."""
  models = ink.ordered(evaluation['models'])
  columns = [c for c in COLUMNS if any(interval(m, c.key) for m in models)]
  names = _indicators(models)
  head = '<th scope="col">model</th>'
  for c in columns:
    head += f'<th scope="col">{c.heading}<small>{c.unit or "mean"}</small></th>'
  for name in names:
    title = escape(name.replace('_', ' '))
    head += f'<th scope="col" class="hack">{title}<small>%</small></th>'
  best = {c.key: _best(models, c) for c in columns}
  looks = ink.looks(evaluation['models'])
  body = ''.join(
    f'<tr>{_name(m, ink.css(looks[m["name"]]))}'
    + ''.join(_cell(m, c, m['name'] in best[c.key]) for c in columns)
    + ''.join(_share(m, name) for name in names)
    + '</tr>'
    for m in models
  )
  over = ''
  if names:
    over = (
      f'<tr class="over"><td colspan="{len(columns) + 1}"></td>'
      f'<th colspan="{len(names)}" scope="colgroup">hack indicators, share of '
      'completions</th></tr>'
    )
  return (
    f'<div class="scroll"><table class="models"><thead>{over}<tr>{head}</tr>'
    f'</thead><tbody>{body}</tbody></table></div>'
  )


def _name(model: dict[str, Any], colour: str) -> str:
  rate = model.get('liti_rate')
  kind = escape(str(model.get('kind', '')))
  detail = f'rate {rate:g}' if isinstance(rate, int | float) else kind
  detail = f'{n} seeds' if (n := arms.seeds(model)) > 1 else detail
  name = escape(model['name'])
  note = '' if detail == model['name'] else f'<small>{detail}</small>'
  return (
    f'<th scope="row"><i class="dot" style="background:{colour}"></i>'
    f'{name}{note}</th>'
  )


def _cell(model: dict[str, Any], column: Column, best: bool) -> str:
  value = interval(model, column.key)
  if value is None:
    return '<td class="none">–</td>'
  mean, low, high = (
    _minus(f'{v * column.scale:.{column.digits}f}') for v in value
  )
  mean = f'<b>{mean}</b>' if best else mean
  return f'<td>{mean}<small>[{low}, {high}]</small></td>'


def _share(model: dict[str, Any], name: str) -> str:
  value = (model.get('indicators') or {}).get(name)
  if not isinstance(value, int | float):
    return '<td class="none">–</td>'
  return f'<td class="hack">{100 * value:.1f}</td>'


def _indicators(models: Sequence[dict[str, Any]]) -> list[str]:
  """Names of the indicators that any model reports, in order of appearance."""
  return list(
    dict.fromkeys(n for m in models for n in m.get('indicators') or ())
  )


def _best(models: Sequence[dict[str, Any]], column: Column) -> set[str]:
  """Every model whose printed mean is the best one."""
  if not column.best:
    return set()
  means = {
    m['name']: round(value[0] * column.scale, column.digits)
    for m in models
    if (value := interval(m, column.key))
  }
  top = max(means.values())
  return {name for name, mean in means.items() if mean == top}


def _minus(text: str) -> str:
  text = '0' + text[2:] if text.startswith('-0') and not float(text) else text
  return text.replace('-', '−')
