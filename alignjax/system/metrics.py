"""Where numbers go: JSON lines on disk.

`metrics.jsonl` holds deterministic values only, so that a resumed run can be
compared byte by byte; times go to `timing.jsonl`.
"""

import json
import math
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import jax

from alignjax.core import files
from alignjax.core.errors import UserError
from alignjax.core.types import Metrics
from alignjax.system.ledger import Ledger


def append(path: Path, row: dict[str, Any]) -> None:
  """Adds one line. A killed process loses at most the line it was writing.

  Of several processes the first writes, here and in `cut`.
  """
  if jax.process_index():
    return
  with open(path, 'a', encoding='utf-8') as file:
    file.write(json.dumps(plain(row)) + '\n')


def read(path: Path) -> list[dict[str, Any]]:
  """All complete lines."""
  if not path.exists():
    return []
  rows = []
  for line in path.read_text('utf-8').splitlines():
    try:
      rows.append(json.loads(line))
    except json.JSONDecodeError:
      break  # a kill cut this line short
  return rows


def cut(
  path: Path,
  step: int,
  account: Callable[[list[dict[str, Any]], int], dict[str, Any] | None]
  | None = None,
) -> None:
  """Drops what was written after `step`, atomically.

  `account(dropped, step)` may give a row to be written in its place.
  """
  if jax.process_index():
    return
  rows = read(path)
  kept = [row for row in rows if row['step'] <= step]
  dropped = [row for row in rows if row['step'] > step]
  if account and (row := account(dropped, step)):
    kept.append(row)
  files.write(path, ''.join(json.dumps(row) + '\n' for row in kept))


def recorder(
  workdir: Path,
  advance: Callable,
  *,
  book: Ledger,
  last: int,
  log_every: int,
  max_bad_steps: int,
) -> Generator[None, tuple[int, Metrics, Any] | None, None]:
  """A coroutine: send (step, metrics, tokens) after each step, None to flush.

  A step is looked at when the next one has been dispatched, so that the device
  never waits for the host. Writes a row of metrics.jsonl and timing.jsonl each
  `log_every` steps and for the `last`; the latter with the seconds by name from
  `book`. Starting and compiling are no part of its `seconds`.

  Raises UserError when `skipped` reaches `max_bad_steps`.
  """
  pending, tokens = None, 0
  while True:
    item = yield
    if pending is not None:
      step, metrics, count = jax.device_get(pending)
      tokens += int(count)
      book.fold()
      row = {name: metric.number for name, metric in metrics.items()}
      if row['skipped'] >= max_bad_steps:
        raise UserError(
          f'step {step}: loss or gradient was not finite for '
          f'{int(row["skipped"])} steps in a row (max_bad_steps = '
          f'{max_bad_steps}); the last checkpoint is unharmed'
        )
      if step % log_every == 0 or step == last:
        append(workdir / 'metrics.jsonl', {'step': int(step), **row})
        spent = book.take()
        begun = spent.get('startup', 0.0) + spent.get('compile', 0.0)
        seconds = max(sum(spent.values()) - begun, 1e-9)
        rate = tokens / seconds
        timing = {'step': int(step), 'seconds': seconds, 'tokens': tokens}
        timing |= {'tokens_per_s': rate, 'spent': spent}
        append(workdir / 'timing.jsonl', timing)
        advance(int(step), f'{_headline(row)} {rate:,.0f} tok/s')
        tokens = 0
    pending = item


def _headline(row: dict[str, float]) -> str:
  shown = [name for name in ('reward', 'nll', 'anchor_kl', 'kl') if name in row]
  return ' '.join(f'{name} {row[name]:.3f}' for name in shown)


def plain(row: dict[str, Any]) -> dict[str, Any]:
  """JSON has no NaN: a value that is not finite is written as a string."""
  return {
    k: str(v) if isinstance(v, float) and not math.isfinite(v) else v
    for k, v in row.items()
  }
