"""Prompts that come with the rewards of reference responses.

A calibration is a folder that `alignjax calibrate` writes: for every row of a
source, the rewards of M responses of a reference policy, ascending. It belongs
to those prompts in that order; others are refused.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from alignjax.core import lookup
from alignjax.core.errors import UserError
from alignjax.data.sources import Rows

FORMAT = 1
FACTS, REWARDS = 'calibration.json', 'rewards.npy'


def calibrated(
  tokenizer, batch_size: int, seed: int, *, path: str = '', rows: dict
) -> Rows:
  """The source of section `rows`, each row with `ref_reward` [M] from `path`.

  Raises UserError where the calibration is missing, damaged, or of prompts
  other than these.
  """
  source = lookup.build('data', rows, tokenizer, batch_size, seed)
  rewards = read(path, fingerprint(source), len(source))
  fields = source.fields | {'ref_reward': rewards}
  return dataclasses.replace(source, fields=fields)


def fingerprint(rows: Rows) -> str:
  """One name for the prompts and their order."""
  prompts = np.ascontiguousarray(rows.fields['prompt'], np.int32)
  return hashlib.sha256(repr(prompts.shape).encode() + prompts.data).hexdigest()


def read(path: str, prompts: str, count: int) -> np.ndarray:
  """float32 [rows, M] of a calibration of these `count` prompts."""
  folder = Path(path)
  try:
    facts: dict[str, Any] = json.loads((folder / FACTS).read_text('utf-8'))
    rewards = np.load(folder / REWARDS, allow_pickle=False)
  except FileNotFoundError as error:
    raise UserError(
      f'source.path: no calibration at {path!r} ({Path(error.filename).name} '
      'is missing); `alignjax calibrate` makes one'
    ) from None
  except (OSError, ValueError) as error:
    raise UserError(f'source.path: {path}: not readable ({error})') from None
  if facts.get('format') != FORMAT:
    raise UserError(
      f'{folder / FACTS}: format {facts.get("format")!r}, expected {FORMAT}'
    )
  if rewards.ndim != 2 or len(rewards) != facts.get('rows'):
    raise UserError(
      f'{folder / REWARDS}: shape {rewards.shape}, expected '
      f'{facts.get("rows")} rows'
    )
  if len(rewards) != count or facts.get('prompts') != prompts:
    raise UserError(
      f'{path} calibrates {len(rewards)} other prompts than the {count} of '
      'source.rows: same text, tokenizer, lengths and part are needed'
    )
  if not np.isfinite(rewards).all():
    row = int(np.flatnonzero(~np.isfinite(rewards).all(1))[0])
    raise UserError(f'{folder / REWARDS}: row {row} has no rewards')
  return rewards.astype(np.float32)
