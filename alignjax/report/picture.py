"""The chart that tells most of a work directory, as one PNG for a document.

Of an evaluation the front, or its two objectives against each other where it
has them; without an evaluation the perplexities.
"""

import os
from typing import Any

from matplotlib.figure import Figure

from alignjax.core import files
from alignjax.core.errors import UserError
from alignjax.core.lookup import nearest
from alignjax.report import front, ink, perplexity, tradeoff
from alignjax.report.points import FRONT, points
from alignjax.report.read import Found


def picture(
  found: Found,
  path: str | os.PathLike,
  fields: tuple[str, str] | None = None,
) -> None:
  """Write a PNG of what was found first.

  Args:
    found: what `read.found` read.
    path: the file; its folder is made.
    fields: what an evaluation's chart draws to the right and upwards, of
      `front.NAMES`; None: the chart that its evaluation is for.

  Raises UserError where there is nothing to draw, or fewer than two models
  have the fields.
  """
  with ink.style('png'):
    figure = _figure(found, fields)
    files.write(path, ink.png(figure))


def _figure(found: Found, fields: tuple[str, str] | None) -> Figure:
  evaluation = next(iter(found.evaluations.values()), None)
  document = next(iter(found.perplexities.values()), None)
  if evaluation is not None:
    if fields is None and tradeoff.lines(evaluation):
      return tradeoff.draw(evaluation)
    return _front(evaluation, fields or FRONT)
  if document is not None and fields is None:
    return perplexity.draw(document)
  kinds = 'evaluation.json' if fields else 'evaluation.json or perplexity.json'
  raise UserError(f'a picture draws an {kinds}, found none')


def _front(evaluation: dict[str, Any], fields: tuple[str, str]) -> Figure:
  for field in fields:
    if field not in front.NAMES:
      raise UserError(
        f'no chart of {field!r}{nearest(field, front.NAMES)} (there are'
        f' {", ".join(front.NAMES)})'
      )
  if len(points(evaluation, fields)) < 2:
    raise UserError(f'{" and ".join(fields)} are not of two models or more')
  return front.draw(evaluation, fields)
