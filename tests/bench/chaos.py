"""Kills every program many times, at other moments each time.

  python -m tests.bench.chaos [--kills 20] [--seed 1] [--programs sft run]

Prints one line per program; fails at the first bit that differs.
"""

import argparse
import tempfile
import time
from pathlib import Path

from tests.chaos import programs


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--kills', type=int, default=20)
  parser.add_argument('--seed', type=int, default=1)
  parser.add_argument('--programs', nargs='+', default=programs.NAMES)
  options = parser.parse_args()
  for name in options.programs:
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as where:
      lives = programs.survive(
        name, Path(where), options.seed, kills=options.kills
      )
    print(
      f'{name}: {options.kills} kills in {lives} lives, '
      f'{time.monotonic() - begun:.0f} s: weights, metrics.jsonl and data '
      'order as without',
      flush=True,
    )


if __name__ == '__main__':
  main()
