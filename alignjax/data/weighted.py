"""Prompts that say in words what each objective weighs.

The baseline of conditioning by parameters: weights as text before the prompt,
always with the same decimals. A row has `condition`, what was written, and
`plain_prompt`, the prompt without it, for rewards and for the reference.
"""

import dataclasses
from typing import Any

import numpy as np

from alignjax.core import lookup
from alignjax.core.errors import UserError
from alignjax.data.sources import Rows

DECIMALS = 2


@dataclasses.dataclass(frozen=True)
class Weighted(Rows):
  """Rows with a weighting each, a function of (seed, k)."""

  tokenizer: Any
  count: int
  concentration: float

  def batch(self, k: int) -> dict[str, np.ndarray]:
    """Batch k with Dirichlet weights, rounded to what the prompt says."""
    batch = super().batch(k)
    draw = np.random.default_rng((self.seed, k)).dirichlet
    alpha = np.full(self.count, self.concentration)
    weights = draw(alpha, len(batch['id'])).round(DECIMALS)
    weights[:, -1] = 1 - weights[:, :-1].sum(1)
    return batch | said(self.tokenizer, batch['prompt'], np.abs(weights))


def weighted(
  tokenizer,
  batch_size: int,
  seed: int,
  *,
  rows: dict,
  count: int = 2,
  concentration: float = 1.0,
) -> Weighted:
  """The prompts of section `rows`, each after `count` sampled weights."""
  if count < 2 or not concentration > 0:
    raise UserError(
      f'source: found count = {count}, concentration = {concentration:g}, '
      'expected 2 or more weights and a positive concentration'
    )
  source = lookup.build('data', rows, tokenizer, batch_size, seed)
  return Weighted(
    fields=source.fields,
    facts=source.facts,
    batch_size=batch_size,
    seed=seed,
    tokenizer=tokenizer,
    count=count,
    concentration=concentration,
  )


def text(weights) -> str:
  """'weights 0.30 0.70' and a line end."""
  return f'weights {" ".join(f"{w:.{DECIMALS}f}" for w in weights)}\n'


def said(tokenizer, prompt: np.ndarray, weights) -> dict[str, np.ndarray]:
  """Fields prompt [B, P'], plain_prompt [B, P] and condition [B, K].

  `weights` [B, K] are written after BOS, before the text. P' - P is one token
  per character of what is written, whatever the tokenizer makes of it.
  """
  weights = np.asarray(weights, np.float32)
  texts = [text(row) for row in weights]
  room = max(map(len, texts))
  wide = np.full((len(prompt), prompt.shape[1] + room), tokenizer.pad, np.int32)
  for row, ids, words in zip(wide, prompt, tokenizer.encode_batch(texts)):
    own = ids[ids != tokenizer.pad]
    full = [own[0], *words, *own[1:]]
    row[-len(full) :] = full
  return {'prompt': wide, 'plain_prompt': prompt, 'condition': weights}
