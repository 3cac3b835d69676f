"""The next batch, drawn and sent to the device while the step runs.

One batch ahead, in one thread, and never past the end. It decides nothing
about order: batch k is the source's, and what is saved with step k is the
source's state of step k, whatever has been drawn since.
"""

from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from alignjax.core.types import Batch, Source

# The source's state after a batch, told of it or not.
State = Callable[[], dict[str, Any]]


def ahead(
  source: Source,
  begin: int,
  end: int,
  place: Callable[[dict[str, Any]], Batch],
) -> Generator[tuple[Batch, State], None, None]:
  """Batches begin .. end - 1 after `place`, each with the source's state.

  A source that listens is drawn from only when its batch is asked for. What
  goes wrong in drawing a batch is raised when that batch is asked for.
  """
  batches = source.batches(begin)
  # A source that does not say so might listen.
  if getattr(source, 'listens', True):
    for _ in range(begin, end):
      yield place(next(batches)), source.state
    return

  def draw():
    batch = place(next(batches))
    state = source.state()
    return batch, lambda: state

  with ThreadPoolExecutor(1, thread_name_prefix='prefetch') as pool:
    coming = None
    for k in range(begin, end):
      now = (coming or pool.submit(draw)).result()
      coming = pool.submit(draw) if k + 1 < end else None
      yield now
