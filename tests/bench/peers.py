"""Tokens per CPU-second against transformers and Tunix: same shape and cores.

  python tests/bench/peers.py --transformers PYTHON --tunix PYTHON --pairs 5

PYTHON is an interpreter that has the peer: torch with transformers, or
google-tunix on Python 3.12. A side without one is left out; ours needs neither.
Every measurement is a process of its own, sides take turns, and all of a pair
run on the same cores: one by default, where no thread waits for another. On
more (--cores) torch's threads spin at every barrier, which other work on the
machine makes ten times dearer; they are told to wait passively.

What is compared is work per CPU-second (user and system time of the process),
which other work disturbs least; wall-clock rates stand beside it. The first
call of everything, compilation included, is timed apart. Generation counts new
tokens over the whole call, the reading of the prompt included; the share of
memory bandwidth is that of reading every weight once per new token.

The model has the Gemma 2 shape, caps and sandwich norms included, 54.5 M
parameters: 12 layers (6 local, 6 global), width 512, hidden 1536, 8 query and 4
key-value heads of 64, 32768 tokens; 16.8 M of them are the tied embedding, as
large vocabularies are this family's mark. All numbers are float32.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile

import sides

SIDES = ('ours', 'transformers', 'tunix')
WHAT = ('train', 'generate')


def measured(side: str, what: str, pythons, args, cache: str):
  """One measurement in its own process, as JSON."""
  environment = os.environ | {
    'JAX_PLATFORMS': 'cpu',
    'JAX_COMPILATION_CACHE_DIR': f'{cache}/{side}',
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
  }
  if side == 'transformers':
    environment['OMP_WAIT_POLICY'] = 'PASSIVE'
  if what == 'stream':
    environment |= {'OPENBLAS_NUM_THREADS': '1', 'OMP_NUM_THREADS': '1'}
  command = [pythons[side], __file__, '--run', f'{side}_{what}']
  for name in ('rows', 'length', 'steps', 'prompt', 'new', 'repeats', 'cores'):
    command += [f'--{name}', str(getattr(args, name))]
  command += ['--batches', *map(str, args.batches)]
  done = subprocess.run(
    command, capture_output=True, text=True, env=environment
  )
  if done.returncode:
    sys.exit(f'{side} {what} failed:\n{done.stderr[-4000:]}')
  return json.loads(done.stdout.splitlines()[-1])


def middle(values, digits: int = 1) -> str:
  """Median, and the range."""
  numbers = statistics.median(values), min(values), max(values)
  value, low, high = (f'{x:.{digits}f}' for x in numbers)
  return f'{value} ({low} to {high})'


def report(results, bandwidths) -> None:
  """Prints a line per side and measurement, then our ratios."""
  names = list(dict.fromkeys(name for _, name in results))
  present = list(dict.fromkeys(side for side, _ in results))
  for name in names:
    print(f'\n{name}')
    for side in present:
      runs = results[side, name]
      rates = [r['per_cpu_s'] for r in runs]
      walls = statistics.median(r['per_s'] for r in runs)
      compiled = [r['compile_s'] for r in runs]
      line = (
        f'  {side:13} {middle(rates)} tokens per CPU-second; {walls:.1f} per'
        f' second; compile {compiled[0]:.1f} s'
      )
      if len(compiled) > 1 and side != 'transformers':
        line += f', from the cache {statistics.median(compiled[1:]):.1f} s'
      if name == 'generate 1' and bandwidths:
        share = 4 * sides.PARAMETERS * statistics.median(rates)
        share /= statistics.median(bandwidths)
        line += f"; {share:.0%} of a core's memory bandwidth"
      print(line)
    for side in present:
      if side == 'ours' or 'ours' not in present:
        continue
      ratios = [
        a['per_cpu_s'] / b['per_cpu_s']
        for a, b in zip(results['ours', name], results[side, name])
      ]
      print(f'  ours / {side}: {middle(ratios, 2)}, {len(ratios)} pairs')
  if bandwidths:
    giga = [x / 1e9 for x in bandwidths]
    print(f'\none core reads {middle(giga)} GB/s')


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--transformers', help='a Python that has transformers')
  parser.add_argument('--tunix', help='a Python that has google-tunix')
  parser.add_argument('--pairs', type=int, default=5)
  parser.add_argument('--sides', nargs='+', choices=SIDES, default=SIDES)
  parser.add_argument('--what', nargs='+', choices=WHAT, default=WHAT)
  parser.add_argument('--rows', type=int, default=4, help='training batch')
  parser.add_argument('--length', type=int, default=256)
  parser.add_argument('--steps', type=int, default=10)
  parser.add_argument('--batches', type=int, nargs='+', default=[1, 8, 32])
  parser.add_argument('--prompt', type=int, default=64)
  parser.add_argument('--new', type=int, default=128)
  parser.add_argument('--repeats', type=int, default=3)
  parser.add_argument('--cores', type=int, default=1, help='0: all')
  parser.add_argument('--json', help='file for every number')
  parser.add_argument('--run', help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.cores:
    allowed = sorted(os.sched_getaffinity(0))[: args.cores]
    os.sched_setaffinity(0, allowed)
  if args.run:
    print(json.dumps(getattr(sides, args.run)(args)))
    return

  pythons = {
    'ours': sys.executable,
    'transformers': args.transformers,
    'tunix': args.tunix,
  }
  present = [side for side in args.sides if pythons[side]]
  results, bandwidths = {}, []
  with tempfile.TemporaryDirectory() as cache:
    for pair in range(args.pairs):
      if 'generate' in args.what and 1 in args.batches:
        bandwidths.append(measured('ours', 'stream', pythons, args, cache))
      for what in args.what:
        # Who goes first changes, so that a drift of the machine favours none.
        turn = pair % len(present)
        for side in present[turn:] + present[:turn]:
          found = measured(side, what, pythons, args, cache)
          for name, rates in found.items():
            results.setdefault((side, name), []).append(rates)
            print(f'{pair + 1} {side} {name}: {rates}', file=sys.stderr)
  report(results, bandwidths)
  if args.json:
    numbers = {f'{side}/{name}': runs for (side, name), runs in results.items()}
    with open(args.json, 'w') as file:
      json.dump(numbers | {'stream': bandwidths}, file, indent=1)


if __name__ == '__main__':
  main()
