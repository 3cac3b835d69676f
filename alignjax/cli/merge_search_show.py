"""What a search has found, and what of it holds on prompts it has not seen.

From the responses of all models to all prompts: objectives, gains with paired
intervals, and the table that is printed. It samples nothing.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from alignjax.evaluate import Responses, interval


class Judged(NamedTuple):
  """Searched and held-out prompts apart.

  Attributes:
    results: name -> responses to the held-out prompts.
    objectives: name -> interval over the held-out prompts.
    searched: name -> mean objective over the searched prompts.
    gains: what best has more than each other model: 'searched', a mean, and
      'held_out', an interval of the differences of the same prompts, and in
      words a 'verdict'.
  """

  results: dict[str, Responses]
  objectives: dict[str, dict[str, float]]
  searched: dict[str, float]
  gains: dict[str, dict[str, Any]]


def judged(
  results: Mapping[str, Responses],
  seen: np.ndarray,
  searched: int,
  kl_coef: float,
  best: str,
) -> Judged:
  """Splits the prompts of `results`.

  Args:
    results: name -> responses to all prompts, of the same order.
    seen: [P], which of the prompts are not held out.
    searched: how many of them, the first, the search was on.
    kl_coef: of the objective.
    best: the name of what the search has found.
  """
  per_prompt = {
    name: _objective(found, kl_coef).mean(axis=1)
    for name, found in results.items()
  }
  mean = {name: float(x[:searched].mean()) for name, x in per_prompt.items()}
  gains: dict[str, dict[str, Any]] = {}
  for name, x in per_prompt.items():
    held = interval((per_prompt[best] - x)[~seen, None])
    if name != best:
      gains[name] = {
        'searched': mean[best] - mean[name],
        'held_out': held,
        'verdict': verdict(held),
      }
  return Judged(
    {name: rows(found, ~seen) for name, found in results.items()},
    {name: interval(x[~seen, None]) for name, x in per_prompt.items()},
    mean,
    gains,
  )


def _objective(found: Responses, kl_coef: float) -> np.ndarray:
  """[P, N] in float64."""
  reward, kl = (x.astype(np.float64) for x in (found.rewards[..., 0], found.kl))
  return reward - kl_coef * kl


def rows(found: Responses, which: np.ndarray) -> Responses:
  """The responses to some of the prompts."""
  some = {
    name: value[which]
    for name, value in found._asdict().items()
    if name != 'logprob_gap'
  }
  return found._replace(**some)


def table(document: Mapping[str, Any]) -> str:
  """The models of evaluation.json with its section `search`, as text."""
  search, models = document['search'], document['models']
  width = max(len(model['name']) for model in models)
  head = f'objective = reward - {search["kl_coef"]:g} KL; [95% intervals]'
  lines = [
    '',
    f'{head}, {document["prompts"]} held-out prompts',
    f'{"":{width}}  {"searched":>9}  {"held out":>26}  {"reward":>26}'
    f'  {"KL to the base":>26}',
  ]
  for model in models:
    name = model['name']
    lines.append(
      f'{name:{width}}  {search["searched"][name]:9.4f}  '
      + '  '.join(_said(model[key]) for key in ('objective', 'reward', 'kl'))
    )
  lines += [
    '',
    'the best, trial {trial} of {trials}, has more'.format(**search),
  ]
  for name, gain in search['gains'].items():
    held = gain['held_out']
    lines.append(
      f'  than {name:{width}}  {gain["searched"]:+9.4f} searched'
      f'  {_said(held, "+")} held out: {gain["verdict"]}'
    )
  lines += ['', *(f"  --where '{rule}'" for rule in search['where']), '']
  return '\n'.join(lines)


def verdict(gain: Mapping[str, float]) -> str:
  """What an interval says of a gain."""
  if gain['low'] > 0:
    return 'it holds out'
  if gain['high'] < 0:
    return 'lost, it is worse'
  return 'not to be told from 0'


def _said(of: Mapping[str, float], sign: str = '') -> str:
  # No -0.0000: what rounds to zero is zero.
  mean, low, high = (
    f'{round(of[k], 4) + 0.0:{sign}.4f}' for k in ('mean', 'low', 'high')
  )
  return f'{mean:>7} {f"[{low}, {high}]":>18}'
