"""One progress line per job, with its rate and the time that is left."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress(label: str, total: int, start: int = 0) -> Iterator[Callable]:
  """A progress line with rate and time left; yields advance(done, text).

  On a terminal a live bar; elsewhere a line every ten seconds.
  """
  jax = sys.modules.get('jax')  # without it there is one process
  if jax and jax.process_index():
    yield lambda done, text='': None
    return
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
