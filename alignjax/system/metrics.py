"""Where numbers go: JSON lines on disk and one progress line per job.

`metrics.jsonl` holds deterministic values only, so that a resumed run can be
compared byte by byte; times go to `timing.jsonl`.
"""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def append(path: Path, row: dict[str, Any]) -> None:
  """Adds one line. A killed process loses at most the line it was writing."""
  with open(path, 'a', encoding='utf-8') as file:
    file.write(json.dumps(_plain(row)) + '\n')


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


def cut(path: Path, step: int) -> None:
  """Drops what was written after `step`, atomically."""
  rows = [row for row in read(path) if row['step'] <= step]
  write_atomic(path, ''.join(json.dumps(row) + '\n' for row in rows))


def write_atomic(path: Path, text: str) -> None:
  """The file is the old one or the new one, never a part."""
  temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
  with open(temporary, 'w', encoding='utf-8') as file:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())
  os.replace(temporary, path)


@contextmanager
def progress(label: str, total: int, start: int = 0) -> Iterator[Callable]:
  """A progress line with rate and time left; yields advance(done, text).

  On a terminal a live bar; elsewhere a line every ten seconds.
  """
  if not sys.stderr.isatty():
    yield _plain_progress(label, total, start)
    return
  import rich.progress as rp

  columns = (
    rp.TextColumn('{task.description}'),
    rp.BarColumn(),
    rp.MofNCompleteColumn(),
    rp.TimeElapsedColumn(),
    rp.TextColumn('left'),
    rp.TimeRemainingColumn(),
    rp.TextColumn('{task.fields[text]}'),
  )
  from rich.console import Console

  with rp.Progress(*columns, console=Console(stderr=True)) as bar:
    task = bar.add_task(label, total=total, completed=start, text='')

    def advance(done: int, text: str = '') -> None:
      bar.update(task, completed=done, text=text)

    yield advance


def _plain_progress(label: str, total: int, start: int) -> Callable:
  began = last = time.monotonic()

  def advance(done: int, text: str = '') -> None:
    nonlocal last
    now = time.monotonic()
    if done < total and now - last < 10:
      return
    last = now
    left = (now - began) / max(done - start, 1) * (total - done)
    print(
      f'{label} {done}/{total} {text} {left:.0f} s left',
      file=sys.stderr,
      flush=True,
    )

  return advance


def _plain(row: dict[str, Any]) -> dict[str, Any]:
  """JSON has no NaN: a value that is not finite is written as a string."""
  return {
    k: str(v) if isinstance(v, float) and not math.isfinite(v) else v
    for k, v in row.items()
  }
