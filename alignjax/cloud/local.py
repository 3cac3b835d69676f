"""Jobs as processes of this machine: a lock, one child at a time, signals.

Knows commands and exit codes, no graphs. A child never outlives this process,
and a signal to this process reaches the child exactly once.
"""

import contextlib
import ctypes
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from alignjax.core.errors import UserError

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
  """Holds a lock file; UserError if another process does."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with open(path, 'a') as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise UserError(
        f'{path.parent.parent} is in use by another run (process'
        f' {path.read_text("utf-8").strip() or "unknown"})'
      ) from None
    file.truncate(0)
    file.write(f'{os.getpid()}\n')
    file.flush()
    yield


def _end_with_parent() -> Callable[[], None] | None:
  """For the child, before exec: die when this process does (Linux only)."""
  if sys.platform != 'linux':
    return None
  prctl = ctypes.CDLL(None).prctl
  parent = os.getpid()

  def tie() -> None:
    prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died in between
      os._exit(1)

  return tie


class Exit(NamedTuple):
  """How a command ended: exit code (128 + n if signal n killed it, None if it
  was not started), and whether this process has been told to stop."""

  code: int | None
  stopped: bool


@contextlib.contextmanager
def children() -> Iterator[Callable[[Sequence[str]], Exit]]:
  """Gives `run(command) -> Exit`, which waits for the command.

  Inside, the first SIGINT or SIGTERM goes to the running child, once, and the
  child decides how to end; later ones do nothing (Ctrl-C may be impatient,
  `timeout` signals twice). After one, no further command is started.
  The child has its own process group, so that Ctrl-C reaches it only here.
  """
  child: subprocess.Popen | None = None
  received = sent = 0

  def pass_on() -> None:
    nonlocal sent
    if received and child is not None and not sent:
      sent = received
      child.send_signal(received)

  def handle(number: int, _frame: object) -> None:
    nonlocal received
    received = received or number
    pass_on()

  def run(command: Sequence[str]) -> Exit:
    nonlocal child
    sys.stdout.flush()
    if received:
      return Exit(None, True)
    child = subprocess.Popen(
      command,
      stdin=subprocess.DEVNULL,
      process_group=0,
      preexec_fn=_end_with_parent(),
    )
    pass_on()  # one that came before there was a child
    code = child.wait()
    child = None
    return Exit(code if code >= 0 else 128 - code, bool(received))

  before = {number: signal.signal(number, handle) for number in _SIGNALS}
  try:
    yield run
  finally:
    if child is not None:
      child.kill()
    for number, handler in before.items():
      signal.signal(number, handler)
