"""`alignjax evaluate`: models on the same prompts, against a reference.

Writes W/evaluation.json, which the report reads. Each model's responses are
kept in W/responses as they finish, so that a killed evaluation goes on. A model
with a `guidance_scale` is sampled, and as the reference scored, under guidance;
with `embedding.path`, the diversity of a prompt's responses is measured too. A
model's `path` may be a merge, which is then made in memory.
"""

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from alignjax.cli import config as configs
from alignjax.cli import console
from alignjax.core import files
from alignjax.core.errors import UserError


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
  check(config, arguments.config)
  _evaluate(config, arguments.workdir)
  return console.OK


def check(config, file: str) -> None:
  """Raises UserError for what is missing or wrong at a glance."""
  embedding: Any = config.get('embedding') or {}
  configs.check(
    config,
    file,
    'tokenizer model source reward models reference seed'.split(),
    prompts=2,  # one has no interval
    responses=2 if embedding.get('path') else 1,
    reference_responses=2,  # which are compared with one another
    batch_size=1,
    max_new_tokens=1,
    temperature=1e-6,
    samples=0,
  )
  names = [entry['name'] for entry in config.models]
  if len(set(names)) < len(names):
    raise UserError(f'models: two have one name: {names}')
  if config.reference not in names:
    raise UserError(
      f'reference: {config.reference!r} is none of the models {names}'
    )


class Setting(NamedTuple):
  """What all models of an evaluation share."""

  tokens: Any
  shape: Any
  reward: Any
  source: Any
  batches: list
  directories: dict[str, Any]
  writers: dict[tuple[int, float], Any]


def setting_of(config) -> Setting:
  """Builds and checks everything before anything is computed."""
  import numpy as np

  from alignjax import evaluate
  from alignjax.cli import parts
  from alignjax.core import lookup

  tokens = parts.tokenizer(config.tokenizer)
  shape = parts.model_config(config, tokens)
  model = parts.language_model(shape, tokens)
  source = lookup.build(
    'data', config.source, tokens, config.batch_size, config.seed
  )
  directories = {}
  for entry in config.models:
    found = parts.opened(
      entry['path'],
      shape,
      f'models: {entry["name"]}',
      weights=entry.get('weights') or None,
    )
    directories[entry['name']] = found
  if config.prompts > len(source) or config.prompts % config.batch_size:
    raise UserError(
      f'prompts = {config.prompts}: expected a multiple of batch_size = '
      f'{config.batch_size}, at most the {len(source)} prompts there are'
    )
  scales = {_scale(config, entry['name']) for entry in config.models}
  if scales != {1.0} and 'uncond' not in source.rows(np.arange(1)):
    raise UserError(
      'models: guidance_scale needs negative prompts; set source.uncond'
    )
  reward = parts.reward(config, tokens, source)
  return Setting(
    tokens=tokens,
    shape=shape,
    reward=parts.with_diversity(reward, config, tokens),
    source=source,
    batches=[
      source.batch(k) for k in range(config.prompts // config.batch_size)
    ],
    directories=directories,
    writers={
      (count, scale): evaluate.writer(
        model,
        count=count,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        guidance_scale=scale,
        reference_guidance_scale=_scale(config, config.reference),
      )
      for count in (config.responses, config.reference_responses)
      for scale in scales
    },
  )


def _scale(config, name: str) -> float:
  """The guidance under which a model is sampled; the reference scored too."""
  (entry,) = [entry for entry in config.models if entry['name'] == name]
  return float(entry.get('guidance_scale', 1.0))


def _evaluate(config, workdir: Path) -> None:
  import numpy as np

  from alignjax.cli import parts

  setting = setting_of(config)
  guests = guests_of(config, setting)
  workdir.mkdir(parents=True, exist_ok=True)
  parts.compilation_cache(workdir)
  results = evaluated(config, workdir, setting, guests)
  ids = np.concatenate([batch['id'] for batch in setting.batches])
  write(workdir, document(config, setting, results, ids))


def guests_of(config, setting: Setting) -> tuple[dict[str, Any], dict]:
  """(parameters, digests) of the models that the reward reads."""
  from alignjax.cli import parts
  from alignjax.rewards import compose

  return parts.guests(config, setting.tokens, compose.roles(setting.reward))


def evaluated(
  config, workdir: Path, setting: Setting, guests: tuple[dict[str, Any], dict]
) -> dict[str, Any]:
  """Name -> `Responses` to the setting's batches; kept in W/responses."""
  from alignjax.cli import kept, parts
  from alignjax.evaluate import Responses

  roles, read = guests
  plain = configs.plain(config)
  plain.pop('models')
  plain.pop('objectives', None)  # what is drawn, not what is written

  def load(name):
    return parts.load_params(setting.directories[name], setting.shape)

  digests = {
    name: (parts.digest(directory), _scale(config, name))
    for name, directory in setting.directories.items()
  }
  reference = load(config.reference)
  others = [name for name in digests if name != config.reference]
  words = {e['name']: list(e.get('said') or ()) for e in config.models}
  stamps = {name: (digests[name], words[name]) for name in digests}
  results = {}
  for name in (config.reference, *others):
    # The end of a LITI line is the merged model itself: written once.
    twin = next((o for o in results if stamps[o] == stamps[name]), None)
    if twin is not None and twin != config.reference:
      results[name] = results[twin]
      continue
    stamp = json.dumps(
      [plain, digests[name], digests[config.reference], read, *words[name]],
      sort_keys=True,
    )
    file = re.sub(r'[^A-Za-z0-9.]+', '_', name) + '.npz'
    arrays = kept.load(workdir / 'responses' / file, stamp)
    if arrays is None:
      bundle = {**roles, 'policy': load(name), 'reference': reference}
      label = f'evaluate {len(results) + 1}/{len(digests)} {name}'
      arrays = _responses(
        config, setting, bundle, label, name, words[name]
      )._asdict()
      kept.save(workdir / 'responses' / file, stamp, arrays)
    results[name] = Responses(**arrays)
  return results


def _responses(config, setting: Setting, bundle, label, name: str, words):
  import jax

  from alignjax import evaluate
  from alignjax.data import weighted
  from alignjax.system.progress import progress

  is_reference = name == config.reference
  count = config.reference_responses if is_reference else config.responses
  batches = setting.batches
  if words:  # a model that is told its weights in the prompt
    batches = [
      batch
      | weighted.said(
        setting.tokens, batch['prompt'], [words] * len(batch['id'])
      )
      for batch in batches
    ]
  with progress(label, config.prompts) as advance:
    return evaluate.responses(
      setting.writers[count, _scale(config, name)],
      bundle,
      batches,
      setting.reward,
      jax.random.key(config.seed),
      advance,
    )


def _weights(entry) -> list[float]:
  """What a model's objectives weigh: mixed, told, or merged `at`."""
  for field in ('weights', 'said', 'at'):
    if entry.get(field):
      return list(entry[field])
  return []


def document(config, setting: Setting, results, ids) -> dict[str, Any]:
  """evaluation.json, of responses to the prompts of these `ids`."""
  from alignjax import evaluate
  from alignjax.stages.score import names as score_names

  names = score_names(setting.reward)
  reference = results[config.reference]
  rows = [
    {
      'name': entry['name'],
      'kind': entry['kind'],
      'liti_rate': entry.get('liti_rate'),
      'series': entry.get('series', ''),
      'weights': _weights(entry),
      'numbers': configs.plain(entry.get('numbers') or {}),
      **evaluate.compare(results[entry['name']], reference, names),
    }
    for entry in config.models
  ]
  samples = []
  some = ids[: config.samples]
  for p, (number, facts) in enumerate(zip(some, setting.source.records(some))):
    written = {}
    for name, found in results.items():
      text = setting.tokens.decode(
        found.response[p, 0][found.mask[p, 0]].tolist()
      )
      score = float(found.rewards[p, 0, 0])
      written[name] = {'text': text, 'reward': score}
    samples.append(
      {'id': int(number), 'prompt': facts['prompt'], 'responses': written}
    )
  return {
    'format': 1,
    'reference': config.reference,
    'prompts': len(ids),
    'responses': config.responses,
    'temperature': config.temperature,
    'max_new_tokens': config.max_new_tokens,
    'models': rows,
    'objectives': list(config.get('objectives') or ()),
    'best_of_n': evaluate.best_of_n(reference),
    'samples': samples,
  }


def write(workdir: Path, document: dict[str, Any]) -> None:
  """W/evaluation.json, which the report reads."""
  text = json.dumps(document, indent=1)
  files.write(workdir / 'evaluation.json', text + '\n')


if __name__ == '__main__':
  raise SystemExit(console.call('evaluate', main))
