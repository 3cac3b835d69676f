"""A process watched while it runs: its time and its anonymous memory."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any, NamedTuple


class Watched(NamedTuple):
  """Seconds on the wall and on cores, and the largest RssAnon in bytes."""

  wall: float
  cpu: float
  peak: int


def watched(command: list[str], log: Path | None = None) -> Watched:
  """Runs a command, its output in `log` if that is given; ends if it fails."""
  before, peak = os.times(), 0
  begun = time.perf_counter()
  out: IO[Any] | None = log.open('w') if log else None
  process = subprocess.Popen(command, stdout=out, stderr=out)
  while process.poll() is None:
    try:
      status = Path(f'/proc/{process.pid}/status').read_text()
    except OSError:
      break
    if match := re.search(r'RssAnon:\s+(\d+) kB', status):
      peak = max(peak, 1024 * int(match[1]))
    time.sleep(0.01)
  failed = process.wait()
  wall, after = time.perf_counter() - begun, os.times()
  if out is not None:
    out.close()
  if failed:
    said = log.read_text()[-2000:] if log else ''
    sys.exit(f'{" ".join(command)} failed: {said}')
  return Watched(wall, sum(after[2:4]) - sum(before[2:4]), peak)
