"""The front in other measures than reward: quantile, diversity, win rates.

Each chart is the front with other fields, in the same colours. Papers compare
policies so: arXiv 2407.14622 by log-quantile, arXiv 2410.06084 by diversity,
arXiv 2412.19792 by what wins under the best and the worst of n.
"""

from collections.abc import Sequence
from typing import Any

from alignjax.report import arms
from alignjax.report.front import front_svg
from alignjax.report.points import points

Chart = tuple[tuple[str, str], str]  # fields to the right and upwards; caption

DIVERSITY: tuple[Chart, ...] = (
  (
    ('kl', 'diversity'),
    'The variety that is left at each distance from the init.',
  ),
  (
    ('diversity', 'reward'),
    'Reward against diversity; up and right is better.',
  ),
)
WINS: tuple[Chart, ...] = (
  (
    ('kl', 'log_quantile'),
    'What best-of-n distillation raises; at best 0.',
  ),
  (('kl', 'win_rate'), 'One completion against one of the init.'),
  (('kl', 'best_of_4'), 'The best of 4 completions against that of the init.'),
  (
    ('kl', 'worst_of_4'),
    'The worst of 4 completions against that of the init.',
  ),
)


def diversity_html(evaluation: dict[str, Any], salt: str) -> str:
  """Two charts; '' where fewer than two models have the number."""
  return _charts(evaluation, DIVERSITY, salt)


def wins_html(evaluation: dict[str, Any], salt: str) -> str:
  """A chart per way to sample; '' where no arm has several seeds."""
  some = arms.of(arms.pooled(evaluation))
  return _charts(evaluation, WINS, salt) if some else ''


def _charts(
  evaluation: dict[str, Any], charts: Sequence[Chart], salt: str
) -> str:
  return ''.join(
    f'<figure class="card wide"><div class="scroll">'
    f'{front_svg(evaluation, f"{salt} {i}", fields)}</div>'
    f'<figcaption>{said} Bars are 95% intervals in both directions.'
    '</figcaption></figure>'
    for i, (fields, said) in enumerate(charts)
    if len(points(evaluation, fields)) > 1
  )
