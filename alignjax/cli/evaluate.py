"""`alignjax evaluate`: models on the same prompts, against a reference.

Writes W/evaluation.json, which the report reads. Each model's responses are
kept in W/responses as they finish, so that a killed evaluation goes on.
"""

import argparse
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

from alignjax.cli import config as configs
from alignjax.cli import console
from alignjax.core.types import UserError


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog='alignjax evaluate',
    description='Sample models on the same prompts; reward, KL to a '
    'reference, length, entropy, log-quantile and win rate with 95%% '
    'intervals.',
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
    raise UserError(f'unknown argument {rest[0]!r}; `alignjax evaluate --help`')
  names = [entry['name'] for entry in config.models]
  if len(set(names)) < len(names):
    raise UserError(f'models: two have one name: {names}')
  if config.reference not in names:
    raise UserError(
      f'reference: {config.reference!r} is none of the models {names}'
    )
  _evaluate(config, arguments.workdir)
  return console.OK


def _evaluate(config, workdir: Path) -> None:
  import jax

  from alignjax import evaluate
  from alignjax.cli import parts
  from alignjax.core import lookup
  from alignjax.models import decoder
  from alignjax.stages.score import names as score_names
  from alignjax.system import metrics, model_dir

  tokens = parts.tokenizer(config.tokenizer)
  shape = parts.model_config(config.model, tokens)
  model = parts.language_model(shape, tokens)
  reward = lookup.build('rewards', config.reward, tokens)
  source = lookup.build(
    'data', config.source, tokens, config.batch_size, config.seed
  )
  # All directories are looked at before anything is computed.
  found = [model_dir.read(entry['path']) for entry in config.models]
  for entry, directory in zip(config.models, found):
    parts.check_config(directory, shape, f'models: {entry["name"]}')
  if config.prompts > len(source) or config.prompts % config.batch_size:
    raise UserError(
      f'prompts = {config.prompts}: expected a multiple of batch_size = '
      f'{config.batch_size}, at most the {len(source)} prompts there are'
    )
  workdir.mkdir(parents=True, exist_ok=True)
  parts.compilation_cache(workdir)
  settings = configs.plain(config)
  settings.pop('models')

  def load(directory):
    return decoder.stacked(shape, model_dir.load(directory))

  order = sorted(
    range(len(found)), key=lambda i: config.models[i]['name'] != config.reference
  )
  reference_params = load(found[order[0]])
  batches = [
    source.batch(k) for k in range(config.prompts // config.batch_size)
  ]
  writers = {
    count: evaluate.writer(
      model,
      count=count,
      max_new_tokens=config.max_new_tokens,
      temperature=config.temperature,
    )
    for count in (config.responses, config.reference_responses)
  }
  results = {}
  for i in order:
    name = config.models[i]['name']
    stamp = json.dumps(
      [settings, model_dir.digest(found[i]), model_dir.digest(found[order[0]])],
      sort_keys=True,
    )
    file = workdir / 'responses' / f'{re.sub(r"[^A-Za-z0-9.]+", "_", name)}.npz'
    kept = _kept(file, stamp)
    if kept is None:
      is_reference = i == order[0]
      bundle = {'policy': load(found[i]), 'reference': reference_params}
      count = config.reference_responses if is_reference else config.responses
      label = f'evaluate {len(results) + 1}/{len(order)} {name}'
      with metrics.progress(label, config.prompts) as advance:
        done = 0

        def count_rows(rows, advance=advance):
          nonlocal done
          done += rows
          advance(done)

        kept = evaluate.responses(
          writers[count],
          bundle,
          batches,
          reward,
          jax.random.key(config.seed),
          count_rows,
        )
      _keep(file, stamp, kept)
    results[name] = kept
  _write(config, workdir, tokens, source, batches, results, score_names(reward))


def _kept(file: Path, stamp: str):
  """Responses written before under the same stamp, else None."""
  import zipfile

  import numpy as np

  from alignjax.evaluate import Responses

  try:
    with np.load(file, allow_pickle=False) as arrays:
      if str(arrays['stamp']) != stamp:
        return None
      return Responses(**{name: arrays[name] for name in Responses._fields})
  except (OSError, ValueError, KeyError, zipfile.BadZipFile):
    return None


def _keep(file: Path, stamp: str, found) -> None:
  import numpy as np

  file.parent.mkdir(exist_ok=True)
  partial = file.with_suffix('.partial')
  with open(partial, 'wb') as out:
    np.savez(out, stamp=np.array(stamp), **found._asdict())
  os.replace(partial, file)


def _write(config, workdir, tokens, source, batches, results, names) -> None:
  import numpy as np

  from alignjax import evaluate
  from alignjax.system import metrics

  reference = results[config.reference]
  rows = [
    {
      'name': entry['name'],
      'kind': entry['kind'],
      'liti_rate': entry.get('liti_rate'),
      **evaluate.compare(results[entry['name']], reference, names),
    }
    for entry in config.models
  ]
  ids = np.concatenate([batch['id'] for batch in batches])[: config.samples]
  samples = []
  for p, (number, facts) in enumerate(zip(ids, source.records(ids))):
    written = {}
    for name, found in results.items():
      text = tokens.decode(found.response[p, 0][found.mask[p, 0]].tolist())
      score = float(found.rewards[p, 0, 0])
      written[name] = {'text': text, 'reward': score}
    samples.append(
      {'id': int(number), 'prompt': facts['prompt'], 'responses': written}
    )
  document = {
    'format': 1,
    'reference': config.reference,
    'prompts': config.prompts,
    'responses': config.responses,
    'temperature': config.temperature,
    'max_new_tokens': config.max_new_tokens,
    'models': rows,
    'best_of_n': evaluate.best_of_n(reference),
    'samples': samples,
  }
  text = json.dumps(document, indent=1)
  metrics.write_atomic(workdir / 'evaluation.json', text + '\n')


if __name__ == '__main__':
  raise SystemExit(console.call('evaluate', main))
