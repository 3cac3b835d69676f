"""Full-size runs through `alignjax plan`, a Markdown table beside their bars.

  python tests/bench/pods.py [NAME ...] [--layers N] [--out FOLDER]

Needs libtpu (`pip install alignjax[plan]`); each row takes minutes and a few
GiB of host memory. The records are left below --out, and a row whose record is
there is not compiled again.

A bar is a figure of the best public configuration that we know for the same
work (HBM peak in GiB, compute or whole step in seconds, wire in GiB per chip),
got with the same accounting: the fast clock, and nothing hidden in the step.
The ranges are what a user should expect.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
V5P, V5E, V6E = 'v5p:4x4x4', 'v5e:4x4', 'v6e:4x4'

# name: (config, words, bars)
ROWS = {
  '9b_outputs': (
    'gemma2_9b',
    ('--topology', V5P, '--config.model.remat=outputs'),
    {'peak': 8.1, 'unhidden': 1.05, 'wire': 56},
  ),
  '9b_products': (
    'gemma2_9b',
    ('--topology', V5P, '--config.model.remat=products'),
    {'peak': 40, 'unhidden': 0.95, 'wire': 56},
  ),
  '27b': (
    'gemma3_27b',
    ('--topology', V5P),
    {'peak': 17, 'compute': 2.9, 'wire': 165},
  ),
  '27b_two_slices': (
    'gemma3_27b',
    ('--topology', V5P, '--slices', '2')
    + ('--config.mesh.data=4', '--config.batch_size=128'),
    {},
  ),
  '2b': ('gemma2_2b', ('--topology', V5E), {}),
  'recurrentgemma_2b': ('recurrentgemma_2b', ('--topology', V6E), {}),
  '9b_rollout': (
    'gemma2_9b_rollout',
    ('--topology', V5P, '--step', 'rollout'),
    {},
  ),
}


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('names', nargs='*', metavar='NAME', help=', '.join(ROWS))
  parser.add_argument('--layers', type=int)
  parser.add_argument('--out', type=Path, default=Path('/tmp/alignjax_pods'))
  arguments = parser.parse_args()
  arguments.out.mkdir(parents=True, exist_ok=True)
  columns = ['run', 'fits', 'peak, GiB', 'compute, s', 'unhidden, s']
  columns += ['step, s', 'MFU', 'wire, GiB']
  print(f'| {" | ".join(columns)} |')
  print('|---' * len(columns) + '|', flush=True)
  for name in arguments.names or ROWS:
    bars = {} if arguments.layers else ROWS[name][2]
    for record in records(name, arguments.out, arguments.layers):
      print(row(f'{name} {record["step"]}', record, bars), flush=True)


def records(name, folder, layers=None):
  """Of one row, from its file in `folder` if there is one."""
  file = folder / (f'{name}_{layers}.json' if layers else f'{name}.json')
  if not file.exists():
    config, words, _ = ROWS[name]
    depth = ('--layers', str(layers)) if layers else ()
    plan(config, (*words, *depth), file)
  return json.loads(file.read_text())['records']


def plan(config, words, file):
  """Runs the command, its text beside its record."""
  command = [sys.executable, '-m', 'alignjax.cli.plan']
  command += [f'--config=configs/plan/{config}.py', *words, f'--json={file}']
  with open(file.with_suffix('.txt'), 'w') as text:
    print(' '.join(command[1:]), file=text, flush=True)
    with contextlib.suppress(KeyboardInterrupt):
      env = os.environ | {'PYTHONPATH': str(ROOT)}
      subprocess.run(command, stdout=text, cwd=ROOT, env=env)
  if not file.exists():
    raise SystemExit(f'{" ".join(command)}: no record')


def row(name, record, bars):
  seconds = record['seconds']
  if record['problem']:
    return f'| {name} | no: {record["problem"]} |' + ' |' * 6
  figures = {
    'peak': (record['hbm']['needs'] / 2**30,) * 2,
    'compute': seconds['compute'],
    'unhidden': (seconds['unhidden'],) * 2,
    'step': (seconds['low'], seconds['high']),
    'mfu': record['mfu'],
    'wire': (record['wire_bytes'] / 2**30,) * 2,
  }
  cells = []
  for what, (low, high) in figures.items():
    cell = f'{low:.3g}' if low == high else f'{low:.3g}-{high:.3g}'
    if bar := bars.get(what):
      cell += f' (bar {bar}: {"met" if low <= bar else "missed"})'
    cells.append(cell)
  return f'| {name} | {"yes" if record["fits"] else "no"} | ' + (
    ' | '.join(cells) + ' |'
  )


if __name__ == '__main__':
  main()
