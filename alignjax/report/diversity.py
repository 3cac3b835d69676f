"""What alignment costs in variety: diversity against KL, reward against it.

For an evaluation with an embedding model (arXiv 2410.06084 compares policies
so). Both charts are the front with another field, in the same colours.
"""

from typing import Any

from alignjax.report.front import front_svg, points

FIELDS = (('kl', 'diversity'), ('diversity', 'reward'))
SAID = (
  'The variety that is left at each distance from the init.',
  'Reward against diversity; up and right is better.',
)


def diversity_html(evaluation: dict[str, Any], salt: str) -> str:
  """The two charts; '' where fewer than two models have the number."""
  if len(points(evaluation, FIELDS[0])) < 2:
    return ''
  return ''.join(
    f'<figure class="card wide"><div class="scroll">'
    f'{front_svg(evaluation, f"{salt} {i}", fields)}</div>'
    f'<figcaption>{said} Bars are 95% intervals in both directions.'
    '</figcaption></figure>'
    for i, (fields, said) in enumerate(zip(FIELDS, SAID))
  )
