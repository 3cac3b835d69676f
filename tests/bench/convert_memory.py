"""Anonymous memory of converting a random checkpoint of a released shape.

  python tests/bench/convert_memory.py --shape gemma2-2b --where DIRECTORY

Writes a bfloat16 Hugging Face directory of that shape, converts it to ours and
back with a certificate each, and prints time, the largest RssAnon of the
process, and how many times the largest tensor that is. Needs three times the
checkpoint's size of disk.
"""

import argparse
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from watch import watched

from alignjax.interop import hf
from alignjax.models import preset
from alignjax.models.shapes import shapes


def random_checkpoint(path: Path, shape: str) -> tuple[int, int]:
  """Writes it; bytes of all leaves and of the largest."""
  config = preset.SHAPES[shape]
  leaves = {
    name: jax.ShapeDtypeStruct(leaf.shape, ml_dtypes.bfloat16)
    for name, leaf in shapes(config).items()
  }
  draw = np.random.default_rng(0)
  with hf.writer(path, config, leaves) as put:
    for name, leaf in leaves.items():
      # Finite numbers of every mantissa, near one.
      bits = draw.integers(0, 2**7, leaf.shape, np.uint16) | 0x3C00
      put(name, bits.view(ml_dtypes.bfloat16))
  sizes = [2 * int(np.prod(leaf.shape)) for leaf in leaves.values()]
  return sum(sizes), max(sizes)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--shape', default='gemma2-2b')
  parser.add_argument('--where', type=Path, required=True)
  args = parser.parse_args()
  a, b, c = (args.where / name for name in ('hf', 'ours', 'again'))
  total, largest = random_checkpoint(a, args.shape)
  print(f'{args.shape}: {total / 1e9:.2f} GB, largest {largest / 1e9:.2f} GB')
  for source, target, to in ((a, b, 'alignjax'), (b, c, 'hf')):
    words = str(source), str(target), '--to', to, '--verify', '--overwrite'
    command = [sys.executable, '-m', 'alignjax.cli.convert', *words]
    seconds, _, peak = watched(command)
    print(
      f'to {to}: {seconds:.0f} s, peak {peak / 1e9:.2f} GB of anonymous'
      f' memory, {peak / largest:.1f} times the largest tensor'
    )


if __name__ == '__main__':
  main()
