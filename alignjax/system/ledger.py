"""Where the seconds of a run went: a ledger that adds up to the wall clock.

A second belongs to what the device was doing; if it was idle, to compilation;
else to what the host was doing. So data that were fetched behind a step cost
nothing, and a reward on the host costs what no decoding hid. Nothing here
waits in the loop: one thread of its own notes when watched arrays are there.
It knows names and clocks, no training, and writes no file.
"""

import collections
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from queue import SimpleQueue
from typing import Any

import jax

from alignjax.core.types import Stage

Span = tuple[float, float, str]  # begin, end, name
Row = dict[str, Any]  # of timing.jsonl; `spent` maps names to seconds

USEFUL = ('step', 'rollout', 'score', 'stages')
NAMES = (
  *USEFUL,
  *('data', 'checkpoint', 'compile', 'startup', 'other', 'lost'),
)
# What a start costs is paid again by a run that lost nothing.
_KEPT = ('startup', 'compile', 'lost')


class Ledger:
  """The open account of one process; made by `keep`."""

  def __init__(self, clock: Callable[[], float], since: float):
    self.clock = clock
    self._folded = self._turned = self._ready = since
    self._names = ['startup']
    self._spent: dict[str, float] = {}
    self._host: list[Span] = []
    self._device: list[Span] = []
    self._compiled: list[Span] = []
    self._flight: collections.deque[tuple[float, str]] = collections.deque()
    self._queue: SimpleQueue[list[Any] | None] = SimpleQueue()
    self._lock = threading.Lock()

  def turn(self, name: str) -> None:
    """From now on, time outside of every phase goes to `name`."""
    self._close_span()
    self._names[0] = name

  @contextmanager
  def phase(self, name: str) -> Iterator[None]:
    """The host does `name`; an inner phase interrupts an outer one."""
    self._close_span()
    self._names.append(name)
    try:
      yield
    finally:
      self._close_span()
      self._names.pop()

  def watch(self, name: str, pytree: Any) -> None:
    """The device is busy with `name` until the arrays in `pytree` are there.

    They must not be donated. Arrays come in the order they are watched in.
    """
    leaves = jax.tree.leaves(pytree)  # what is NumPy's is there
    arrays = [x for x in leaves if hasattr(x, 'block_until_ready')]
    with self._lock:
      self._flight.append((self.clock(), name))
    self._queue.put(arrays)

  def fold(self) -> None:
    """Settles the time until now; as often as one likes, so in every step."""
    self._close_span()
    now = self._turned
    with self._lock:
      device, self._device = self._device, []
      compiled, self._compiled = self._compiled, []
      if self._flight:
        since, name = self._flight[0]
        device.append((max(since, self._ready), now, name))
    host, self._host = self._host, []
    spent = charge(self._folded, now, (device, compiled, host))
    self._spent = added([{'spent': self._spent}, {'spent': spent}])
    self._folded = now

  def take(self) -> dict[str, float]:
    """Seconds by name since the last call; they add up to the wall clock."""
    self.fold()
    spent, self._spent = self._spent, {}
    return spent

  def _close_span(self) -> None:
    now = self.clock()
    self._host.append((self._turned, now, self._names[-1]))
    self._turned = now

  def _wait(self) -> None:
    """The thread: notes when each watched thing is ready, until None comes."""
    while (arrays := self._queue.get()) is not None:
      for array in arrays:
        try:
          array.block_until_ready()
        except Exception:  # whoever uses the array is told
          break
      with self._lock:
        since, name = self._flight.popleft()
        now = self.clock()
        self._device.append((max(since, self._ready), now, name))
        self._ready = now

  def _compile(self, event: str, duration_secs: float, **_: Any) -> None:
    if event.startswith('/jax/core/compile/'):
      now = self.clock()
      with self._lock:
        self._compiled.append((now - duration_secs, now, 'compile'))


_JOIN_S = 10.0
_OPEN: ContextVar[Ledger | None] = ContextVar('ledger', default=None)


@contextmanager
def keep(
  since: float | None = None, clock: Callable[[], float] = time.monotonic
) -> Iterator[Ledger]:
  """The ledger of this block; its time starts at `since`, with 'startup'."""
  book = Ledger(clock, clock() if since is None else since)
  thread = threading.Thread(target=book._wait, name='ledger', daemon=True)
  thread.start()
  jax.monitoring.register_event_duration_secs_listener(book._compile)
  token = _OPEN.set(book)
  try:
    yield book
  finally:
    _OPEN.reset(token)
    jax.monitoring.unregister_event_duration_listener(book._compile)
    book._queue.put(None)
    # A thread that is inside XLA when the interpreter ends aborts the process.
    # It waits for work in flight only, but that of a lost host never comes.
    thread.join(_JOIN_S)


@contextmanager
def phase(name: str) -> Iterator[None]:
  """`Ledger.phase` of the open ledger; nothing where none is open.

  Other threads than the one that opened it have none.
  """
  book = _OPEN.get()
  if book is None:
    yield
    return
  with book.phase(name):
    yield


def watch(name: str, pytree: Any) -> None:
  """`Ledger.watch` of the open ledger; nothing where none is open."""
  if book := _OPEN.get():
    book.watch(name, pytree)


def timed(stage: Stage) -> Stage:
  """The stage, on the ledger by the name of the function that made it."""
  maker = getattr(stage, '__qualname__', '').split('.')[0]
  name = maker if maker in USEFUL else 'stages'

  def run(bundle, batch, key):
    with phase(name):
      batch = stage(bundle, batch, key)
    watch(name, batch)
    return batch

  return run


def charge(
  begin: float, end: float, layers: Iterable[Iterable[Span]]
) -> dict[str, float]:
  """Seconds by name between `begin` and `end`; earlier layers come first.

  What no span covers is 'other'.
  """
  spent: dict[str, float] = {}
  free = [(begin, end)]
  for layer in layers:
    for start, stop, name in layer:
      left = []
      for low, high in free:
        a, b = max(low, start), min(high, stop)
        if a >= b:
          left.append((low, high))
          continue
        spent[name] = spent.get(name, 0.0) + b - a
        left += [(x, y) for x, y in ((low, a), (b, high)) if x < y]
      free = left
  if rest := sum(high - low for low, high in free):
    spent['other'] = spent.get('other', 0.0) + rest
  return spent


def added(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
  """Seconds by name in rows of timing.jsonl."""
  out: dict[str, float] = {}
  for row in rows:
    for name, seconds in row.get('spent', {}).items():
      out[name] = out.get(name, 0.0) + seconds
  return out


def lost(rows: Sequence[Row], step: int) -> Row | None:
  """What a run that resumes at `step` writes for the `rows` that it cuts off.

  Their work is done again, so it is lost; starting and compiling keep their
  names. None if there is nothing to tell. A row is cut once, so its time is
  counted once. Work after the last row that a kill left is not known.
  """
  if not rows:
    return None
  spent: dict[str, float] = {}
  for name, seconds in added(rows).items():
    kept = name if name in _KEPT else 'lost'
    spent[kept] = spent.get(kept, 0.0) + seconds
  again = _lost_steps(rows)
  again += max(row['step'] for row in rows) - step
  return {'step': step, 'spent': spent, 'lost': {'steps': again}}


def closing(rows: Sequence[Row], step: int, spent: dict[str, float]) -> Row:
  """The last row of a process: its rest, and the totals of the whole run."""
  total = added([*rows, {'spent': spent}])
  return {
    'step': step,
    'spent': spent,
    'total': {
      'spent': total,
      'goodput': goodput(total),
      'lost_steps': _lost_steps(rows),
    },
  }


def _lost_steps(rows: Iterable[Row]) -> int:
  return sum(row.get('lost', {}).get('steps', 0) for row in rows)


def goodput(total: Mapping[str, float]) -> float:
  """The useful share of all seconds; 0 without any."""
  useful = sum(total.get(name, 0.0) for name in USEFUL)
  return useful / (sum(total.values()) or 1.0)
