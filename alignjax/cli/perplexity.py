"""`alignjax perplexity`: models on the same held-out text.

Writes W/perplexity.json, which the report reads. Models may differ in size,
family and format, not in their tokenizer. What was read of a model is kept in
W/rows, so that a killed command goes on with the next.
"""

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alignjax.cli import config as configs
from alignjax.cli import console
from alignjax.core import files
from alignjax.core.errors import UserError


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog='alignjax perplexity',
    description='Nats per token and perplexity of models on the same text, '
    'with 95%% intervals, and what each saves against a reference.',
    epilog='The config: tokenizer, mesh, batch_size, seed, source (rows of '
    "text, part 'held_out'), models (each a name and a path; kind and series "
    'say how it is drawn) and reference, the name of one of them. '
    'configs/papers/distill.py has one.',
    allow_abbrev=False,
  )
  parser.add_argument(
    '--config', required=True, metavar='F', help='program or resolved JSON'
  )
  parser.add_argument('--workdir', required=True, type=Path, metavar='W')
  return parser


def main(argv: Sequence[str]) -> int:
  """Exit code; raises UserError for bad input."""
  arguments, rest = _parser().parse_known_args(list(argv))
  config, _, rest = configs.load(['--config', arguments.config, *rest])
  if rest:
    raise UserError(
      f'unknown argument {rest[0]!r}; `alignjax perplexity --help`'
    )
  fields = 'tokenizer mesh source models reference seed'.split()
  configs.check(config, arguments.config, fields, batch_size=1)
  names = [entry['name'] for entry in config.models]
  if len(set(names)) < len(names):
    raise UserError(f'models: two have one name: {names}')
  if config.reference not in names:
    raise UserError(
      f'reference: {config.reference!r} is none of the models {names}'
    )
  _measure(config, arguments.workdir)
  return console.OK


def _measure(config: Any, workdir: Path) -> None:
  from alignjax.cli import kept, parts
  from alignjax.core import lookup
  from alignjax.perplexity import Read
  from alignjax.system import mesh as meshes

  tokens = parts.tokenizer(config.tokenizer)
  mesh = meshes.make(dict(config.mesh))
  meshes.check_rows(mesh, config.batch_size, 1)
  source = lookup.build(
    'data', config.source, tokens, config.batch_size, config.seed
  )
  if len(source) < 2 or 'loss_mask' not in source.rows(_some(0)):
    raise UserError(
      f'source.name = {config.source["name"]!r}: expected at least two rows of'
      " text, as of 'sources.text'"
    )
  # All are opened and compared before the first is read.
  models = {
    entry['name']: parts.of_tokenizer(
      entry['path'], tokens, f'models: {entry["name"]}'
    )
    for entry in config.models
  }
  workdir.mkdir(parents=True, exist_ok=True)
  parts.compilation_cache(workdir)
  shared = [configs.plain(config)[name] for name in ('source', 'tokenizer')]
  found = {}
  for number, (name, model) in enumerate(models.items(), start=1):
    stamp = json.dumps([shared, parts.digest(model)], sort_keys=True)
    file = workdir / 'rows' / (re.sub(r'[^A-Za-z0-9.]+', '_', name) + '.npz')
    arrays = kept.load(file, stamp)
    if arrays is None:
      label = f'perplexity {number}/{len(models)} {name}'
      read = _read(model, tokens, source, mesh, label)
      arrays = read._asdict()
      kept.save(file, stamp, arrays)
    found[name] = Read(**arrays)
  document = _document(config, models, found)
  text = json.dumps(document, indent=1)
  files.write(workdir / 'perplexity.json', text + '\n')
  for row in document['models']:
    value, nll = row['perplexity'], row['nll']
    print(
      f'{row["name"]}: perplexity {value["mean"]:.3f}'
      f' [{value["low"]:.3f}, {value["high"]:.3f}],'
      f' {nll["mean"]:.4f} nats per token'
    )


def _some(row: int) -> Any:
  import numpy as np

  return np.array([row])


def _read(model: Any, tokens: Any, source: Any, mesh: Any, label: str) -> Any:
  from alignjax import perplexity
  from alignjax.cli import parts
  from alignjax.models import sharding
  from alignjax.system import mesh as meshes
  from alignjax.system.progress import progress
  from alignjax.system.rows import to_mesh

  params = parts.load_params(model, model.config)
  places = meshes.shardings(params, sharding.TABLE, mesh)
  params = meshes.put(params, places)
  read = perplexity.reader(parts.language_model(model.config, tokens))
  with meshes.current(mesh), progress(label, len(source)) as advance:
    return perplexity.everything(
      lambda batch: read(params, to_mesh(batch, meshes.rows(mesh))),
      source,
      advance,
    )


def _document(config: Any, models: Any, found: Any) -> dict[str, Any]:
  from alignjax import perplexity

  reference = found[config.reference]
  sizes = {
    name: sum(x.size for x in model.leaves.values())
    for name, model in models.items()
  }
  return {
    'format': 1,
    'reference': config.reference,
    'rows': len(reference.tokens),
    'tokens': int(reference.tokens.sum()),
    'models': [
      {
        'name': entry['name'],
        'kind': entry.get('kind', 'run'),
        'series': entry.get('series', ''),
        'parameters': sizes[entry['name']],
        **perplexity.compare(found[entry['name']], reference),
      }
      for entry in config.models
    ],
  }


if __name__ == '__main__':
  raise SystemExit(console.call('perplexity', main))
