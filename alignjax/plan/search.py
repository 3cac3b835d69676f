"""Which mesh, how many microbatches, which recomputation: candidates, ranked.

Cheap checks come first: what does not divide or cannot fit by the formula is
never compiled. Compiling is the caller's; so is deciding how many are worth
it. It proposes nothing that changes what a step computes.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from alignjax.core.errors import UserError
from alignjax.models.config import Config
from alignjax.plan.facts import Record

# A formula may be this far below the compiler before a candidate is dropped.
SLACK = 0.8


class Candidate(NamedTuple):
  """One point of the search.

  Attributes:
    mesh: axis -> size.
    microbatches: of a batch.
    remat: what the backward pass recomputes.
  """

  mesh: dict[str, int]
  microbatches: int
  remat: str

  @property
  def label(self) -> str:
    axes = ' x '.join(f'{k} {v}' for k, v in self.mesh.items() if v > 1)
    return f'{axes or "one device"}, {self.microbatches} mb, {self.remat}'


def candidates(
  config: Config,
  devices: int,
  batch_size: int,
  remats: Sequence[str],
  *,
  slices: int = 1,
) -> Iterator[Candidate]:
  """Every mesh of data, fsdp and tensor whose rows divide the batch.

  'tensor' splits key/value heads evenly; slices are on 'data'.
  """
  for tensor in _divisors(devices):
    if tensor > 8 or (config.kv_heads % tensor and tensor > 1):
      continue
    for fsdp in _divisors(devices // tensor):
      data = devices // tensor // fsdp
      if data % slices or batch_size % (data * fsdp):
        continue
      mesh = {'data': data, 'fsdp': fsdp, 'tensor': tensor}
      for microbatches in _divisors(batch_size // (data * fsdp)):
        for remat in remats:
          yield Candidate(mesh, microbatches, remat)


def ranked(
  found: Sequence[Candidate], measure: Callable[[Candidate], Record]
) -> list[tuple[Candidate, Record]]:
  """Candidates that fit, fastest first (the upper end of the interval).

  A candidate whose mesh does not divide the model is left out. Raises
  UserError where nothing is left.
  """
  kept: list[tuple[Candidate, Record]] = []
  problems: list[str] = []
  for candidate in found:
    try:
      record = measure(candidate)
    except UserError as error:
      problems.append(f'{candidate.label}: {error}')
      continue
    slack = SLACK if record['source'] == 'estimate' else 1.0
    if record['problem'] or (
      record['hbm']['needs'] * slack > record['hbm']['limit']
    ):
      over = record['problem'] or 'does not fit'
      problems.append(f'{candidate.label}: {over}')
      continue
    kept.append((candidate, record))
  if not kept:
    shown = '; '.join(problems[:3]) or 'no mesh divides the batch'
    raise UserError(f'--search: none of {len(found)} candidates fits: {shown}')
  return sorted(kept, key=lambda pair: pair[1]['seconds']['high'])


def shallow(config: Config) -> tuple[int, int] | None:
  """Two depths to compile instead of the whole, None if it is not deeper.

  Both keep the remainder of the pattern, and both are scans.
  """
  period = len(config.pattern)
  rest = config.layers % period
  first, second = 2 * period + rest, 4 * period + rest
  return (first, second) if second < config.layers else None


def _divisors(n: int) -> list[int]:
  small = [i for i in range(1, math.isqrt(n) + 1) if n % i == 0]
  return sorted({*small, *(n // i for i in small)})
