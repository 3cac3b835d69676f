"""Does transformers compute what we do from a directory that we wrote?

  python tests/bench/written_by_us.py --peer-python PYTHON

PYTHON has torch and transformers. Every family goes out twice through
`aj.save(model, path, 'hf')`: a golden model that came from transformers, and
one made here, whose config.json is written from numbers alone. Both sides
read the directory by their public door and their logits are compared. The
window of transformers' RecurrentGemma counts the query's own key; so does ours
here.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

LIMIT = 2e-5
MADE_HERE = {
  'gemma1': 'gemma1',
  'gemma2': 'gemma2',
  'gemma3': 'gemma3',
  'recurrentgemma': 'recurrentgemma_self',
}


def write(root: Path) -> list[Path]:
  """Directories, each with our logits beside the weights."""
  sys.path.insert(0, str(Path(__file__).parents[2]))
  import alignjax as aj
  from alignjax.api import LoadedModel
  from tests.golden import weights
  from tests.parity import golden, test_decode

  tokens = weights.tokens(50, 2, 26, test_decode.VOCAB)
  models = {}
  for family, name in MADE_HERE.items():
    found = golden.read(family)
    folder = golden.hugging_face(root / family, found, found.tensors)
    models[f'{family} of transformers'] = aj.load(folder, window_self=True)
    models[f'{family} of ours'] = LoadedModel(
      test_decode.CONFIGS[name], test_decode.parameters(name)
    )
  paths = []
  for name, model in models.items():
    path = root / name.replace(' ', '_')
    aj.save(model, path, 'hf')
    logits = np.asarray(aj.apply(aj.load(path, window_self=True), tokens))
    np.savez(path / 'ours.npz', tokens=tokens, logits=logits)
    paths.append(path)
  return paths


def compare(paths: list[str]) -> None:
  """In the peer's interpreter: a line per directory; fails beyond LIMIT."""
  import torch
  import transformers

  failed = 0
  for path in map(Path, paths):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
      path, attn_implementation='eager', output_loading_info=True
    )
    ours = np.load(path / 'ours.npz')
    with torch.no_grad():
      tokens = torch.from_numpy(ours['tokens']).long()
      logits = model.eval()(input_ids=tokens, use_cache=False).logits.numpy()
    gap = np.abs(logits - ours['logits']).max()
    problems = {key: value for key, value in info.items() if value}
    good = gap < LIMIT and not problems
    failed += not good
    print(
      f'{"ok  " if good else "FAIL"} {path.name}: {type(model).__name__},'
      f' logits up to {np.abs(logits).max():.2f} differ by {gap:.1e}'
      f' {problems or ""}'
    )
  print(f'transformers {transformers.__version__}: {failed} failures')
  sys.exit(failed > 0)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--peer-python')
  parser.add_argument('--compare', nargs='+', help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.compare:
    compare(args.compare)
  elif not args.peer_python:
    parser.error('--peer-python is needed')
  else:
    with tempfile.TemporaryDirectory() as root:
      paths = write(Path(root))
      command = [args.peer_python, __file__, '--compare', *map(str, paths)]
      sys.exit(subprocess.run(command).returncode)


if __name__ == '__main__':
  main()
