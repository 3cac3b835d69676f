"""Merging against mergekit and against `cp`: wall time and anonymous memory.

  python tests/bench/merge.py --where DIRECTORY --layers 6 --mergekit PYTHON

Writes three bfloat16 checkpoints of Gemma-2-2B's widths with so many layers and
a table of 64k rows (6 layers: 1.1 GB), Hugging Face's format, one base and two
fine-tunes of it. Then, each as a process of its own with its start, side by
side and in turns: `cp` of what a merge reads and writes, our slerp of two and
linear of three models, and mergekit's. `--cold` drops the checkpoints from the
page cache before each run. Needs five times a checkpoint's size of disk, and
three times of free memory.
"""

import argparse
import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from watch import Watched, watched

from alignjax.interop import hf
from alignjax.models import preset
from alignjax.models.shapes import shapes

NAMES = ('base', 'a', 'b')
BF16 = np.dtype(ml_dtypes.bfloat16)


def checkpoints(where: Path, layers: int, rows: int) -> int:
  """Writes what is not there yet; bytes of one."""
  config = dataclasses.replace(
    preset.SHAPES['gemma2-2b'], layers=layers, vocab_size=rows
  )
  leaves = {
    name: jax.ShapeDtypeStruct(leaf.shape, BF16)
    for name, leaf in shapes(config).items()
  }
  for seed, path in enumerate(NAMES):
    if (where / path).exists():
      continue
    with hf.writer(where / path, config, leaves) as put:
      for i, (name, leaf) in enumerate(leaves.items()):
        x = 0.02 * noise(leaf.shape, i)
        if seed:
          x += 0.001 * noise(leaf.shape, 1000 * seed + i)
        put(name, x.astype(BF16))
  return sum(2 * int(np.prod(leaf.shape)) for leaf in leaves.values())


def noise(shape, seed) -> np.ndarray:
  return np.random.default_rng(seed).standard_normal(shape, np.float32)


def forget(where: Path) -> None:
  """Drops the checkpoints from the page cache."""
  os.sync()
  for file in where.rglob('*.safetensors'):
    with file.open('rb') as stream:
      os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def touch(size: int) -> None:
  """Has the system take `size` bytes of memory, and leave them free again.

  A virtual machine gives idle memory back to its host, and whoever writes to it
  next pays for that: here nobody's run does. Only what is free is taken: more
  would push the checkpoints out of the page cache.
  """
  facts = Path('/proc/meminfo').read_text().split()
  free = 1024 * int(facts[facts.index('MemFree:') + 1])
  code = f'import numpy as np; np.ones({min(size, free * 9 // 10)} // 8)'
  subprocess.run([sys.executable, '-c', code], check=True)


def mergekit_config(where: Path, method: str) -> Path:
  """YAML of the merge that is ours as nearly as mergekit has it."""
  models = [where / name for name in NAMES]
  if method == 'slerp':
    # Two models about their base, as one vector each: its nuslerp.
    lines = [
      'merge_method: nuslerp',
      f'base_model: {models[0]}',
      'models:',
      *(
        f'  - model: {m}\n    parameters:\n      weight: 0.5'
        for m in models[1:]
      ),
    ]
  else:
    lines = [
      'merge_method: linear',
      'models:',
      *(f'  - model: {m}\n    parameters:\n      weight: 1.0' for m in models),
    ]
  path = where / f'{method}.yaml'
  path.write_text('\n'.join([*lines, 'dtype: bfloat16', '']))
  return path


def commands(where: Path, mergekit: str | None) -> dict[str, list[str]]:
  base, a, b = (str(where / name) for name in NAMES)
  ours = [sys.executable, '-m', 'alignjax.cli.merge']
  out = str(where / 'out')
  found = {
    # What a slerp must at least do: read two models, write one.
    'cp (reads 2, writes 1)': [
      'sh',
      '-c',
      f'mkdir {out}; cp -r {a} {out}/; cat {b}/*.safetensors > /dev/null',
    ],
    'cp (reads 3, writes 1)': [
      'sh',
      '-c',
      f'mkdir {out}; cp -r {a} {out}/; cat {b}/*.safetensors'
      f' {base}/*.safetensors > /dev/null',
    ],
    'ours slerp': [
      *(*ours, 'slerp', '--base', base, '--models', a, b),
      *('--t', '0.5', '--out', out),
    ],
    'ours linear': [*ours, 'linear', '--models', base, a, b, '--out', out],
  }
  if mergekit:
    tool = str(Path(mergekit).parent / 'mergekit-yaml')
    for method in ('slerp', 'linear'):
      config = str(mergekit_config(where, method))
      found[f'mergekit {method}'] = [tool, config, out]
  return found


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--where', type=Path, required=True)
  parser.add_argument('--layers', type=int, default=6)
  parser.add_argument('--rows', type=int, default=65536)
  parser.add_argument('--pairs', type=int, default=3)
  parser.add_argument('--cold', action='store_true')
  parser.add_argument('--mergekit', metavar='PYTHON')
  args = parser.parse_args()
  args.where.mkdir(parents=True, exist_ok=True)
  size = checkpoints(args.where, args.layers, args.rows)
  print(f'{size / 1e9:.2f} GB a checkpoint, {"cold" if args.cold else "warm"}')
  runs: dict[str, list[Watched]] = {}
  for _ in range(args.pairs):
    for name, command in commands(args.where, args.mergekit).items():
      shutil.rmtree(args.where / 'out', ignore_errors=True)
      os.sync()
      if args.cold:
        forget(args.where)
      touch(3 * size)
      runs.setdefault(name, []).append(watched(command, args.where / 'log'))
  shutil.rmtree(args.where / 'out', ignore_errors=True)
  for name, found in runs.items():
    wall, cpu, peak = (sorted(x)[len(x) // 2] for x in zip(*found))
    print(f'{name:24} {wall:7.2f} s wall {cpu:7.2f} s CPU {peak / 1e6:8.0f} MB')
  for method, reads in (('slerp', 2), ('linear', 3)):
    own = [found.wall for found in runs[f'ours {method}']]
    for other in (f'cp (reads {reads}, writes 1)', f'mergekit {method}'):
      if other in runs:
        ratios = sorted(b.wall / a for a, b in zip(own, runs[other]))
        said = ' '.join(f'{ratio:.2f}' for ratio in ratios)
        print(f'{other} takes {said} of the time of our {method}')


if __name__ == '__main__':
  main()
