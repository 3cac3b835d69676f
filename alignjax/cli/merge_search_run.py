"""A search for the numbers of a merge: trials, the merges, the evaluation.

What `merge_search` has checked is carried out here, in one process: the models
are read once, the sampler is compiled once, and between trials only the policy
changes.
"""

import json
from collections.abc import Mapping
from typing import Any

import jax

from alignjax import evaluate as measuring
from alignjax.cli import config as configs
from alignjax.cli import evaluate, merge_search_show, parts
from alignjax.cli.merge_search import BEST, DEFAULT, Search, config_of, planned
from alignjax.core import files, naming
from alignjax.core.errors import UserError
from alignjax.merge import driver
from alignjax.merge import search as searching
from alignjax.merge.memory import merge
from alignjax.models import decoder
from alignjax.system import metrics
from alignjax.system.progress import progress


def run(search: Search) -> None:
  """Trials, merges on disk, evaluation; prints the table. Raises UserError."""
  args = search.args
  config = config_of(args, search.plain, search.entries)
  guests = evaluate.guests_of(config, search.setting)
  args.workdir.mkdir(parents=True, exist_ok=True)
  _claim(search, guests[1])
  parts.compilation_cache(args.workdir)
  rows = _trials(search, config, guests[0])
  best = searching.best(rows)
  rules = searching.where(search.space, best['numbers'])
  # SLERP and LERP with default numbers are kinds that the report judges.
  known = {'slerp': 'slerp', 'linear': 'lerp', 'lerp': 'lerp'}
  kinds = {DEFAULT: known.get(args.method, DEFAULT), BEST: BEST}
  added, setting = [], search.setting
  directories = dict(setting.directories)
  for name, folder, where in (
    (DEFAULT, 'model_default', ()),
    (BEST, 'model', rules),
  ):
    (path,) = driver.run(planned(args, search.fixed, folder, where))
    added.append({'name': name, 'kind': kinds[name], 'path': str(path)})
    directories[name] = parts.opened(str(path), setting.shape, name)
  config = config_of(args, search.plain, [*search.entries, *added])
  setting = setting._replace(directories=directories)
  results = evaluate.evaluated(config, args.workdir, setting, guests)
  ids = [i for batch in setting.batches for i in batch['id'].tolist()]
  searched = sum(len(batch['id']) for batch in search.batches[0])
  told = merge_search_show.judged(
    results, search.seen, searched, args.kl_coef, BEST
  )
  held = [i for i, seen in zip(ids, search.seen) if not seen]
  document = evaluate.document(config, setting, told.results, held)
  for model in document['models']:
    model['objective'] = told.objectives[model['name']]
  document['search'] = {
    'trial': best['trial'],
    'trials': len(rows),
    'numbers': best['numbers'],
    'where': list(rules),
    'kl_coef': args.kl_coef,
    'objectives': [row['objective'] for row in rows],
    'searched': told.searched,
    'gains': told.gains,
  }
  evaluate.write(args.workdir, document)
  print(merge_search_show.table(document))
  print(f'wrote {args.workdir / "model"}, {args.workdir / "evaluation.json"}')


def _claim(search: Search, guests: Mapping[str, str]) -> None:
  """W/config.json says what is searched; another search is refused.

  How many trials is not part of it: more continue the same search.
  """
  args = search.args
  told = ('method', 'population', 'kl_coef', 'seed', 'held_out', 'group')
  found = {
    **{name: getattr(args, name) for name in told},
    'extrapolate': args.extrapolate,
    'search': {k: list(v) for k, v in search.space.intervals.items()},
    'groups': search.space.groups,
    'fixed': search.fixed,
    'evaluation': search.plain,
    'base': search.entries[0]['path'],
    'models': [entry['path'] for entry in search.entries[1:]],
    'digests': {
      **{n: parts.digest(d) for n, d in search.setting.directories.items()},
      **guests,
    },
  }
  file = args.workdir / 'config.json'
  if file.exists():
    old = json.loads(file.read_text('utf-8'))
    if changed := configs.difference(old, found):
      raise UserError(
        f'{args.workdir} holds another search: {"; ".join(changed)}; expected '
        'the same command, or another --workdir'
      )
  elif (args.workdir / 'search.jsonl').exists():
    raise UserError(
      f'{args.workdir} has trials, but no {file.name} of a search'
    )
  files.write(file, configs.to_json(found))


def _trials(search: Search, config, guests) -> list[dict[str, Any]]:
  """All trials; models and base are in memory until it is done."""
  args, setting = search.args, search.setting
  directories = list(setting.directories.values())
  base, *models = (
    naming.nested({name: found.load(name) for name in found.leaves})
    for found in directories
  )

  def stacked(params):
    return jax.device_put(decoder.stacked(setting.shape, params))

  reference = stacked(base)
  write = setting.writers[config.responses, 1.0]

  def measure(numbers):
    try:
      merged = merge(
        args.method,
        base=base,
        models=models,
        group=args.group,
        where=searching.where(search.space, numbers),
        extrapolate=args.extrapolate,
        **search.fixed,
      )
    except UserError as error:
      return {'objective': None, 'refused': str(error)}
    bundle = {**guests, 'policy': stacked(merged), 'reference': reference}
    found = measuring.responses(
      write,
      bundle,
      search.batches[0],
      setting.reward,
      jax.random.key(config.seed),
    )
    return searching.measured(found.rewards[..., 0], found.kl, args.kl_coef)

  file = args.workdir / 'search.jsonl'
  started = len(metrics.read(file))
  with progress('search', args.trials, started) as advance:

    def step(rows):
      last = rows[-1]['objective']
      said = 'refused' if last is None else f'{last:.4f}'
      top = searching.best(rows)['objective']
      advance(len(rows), f'best {top:.4f} last {said}')

    return searching.run(
      search.space,
      measure,
      file,
      trials=args.trials,
      population=args.population,
      seed=args.seed,
      step=step,
    )
