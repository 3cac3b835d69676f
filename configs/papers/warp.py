"""WARP: rounds of runs, SLERP, and LITI back to the start (2406.16768).

COMMAND: alignjax run --config=configs/papers/warp.py --workdir=runs/warp
  --config.start.policy=MODEL --config.tokenizer=TOKENIZER

Each round trains M runs from its init, with a fresh optimizer, an anchor that
begins at the init, and prompts in another order; merges them by SLERP of their
task vectors; and interpolates from its init towards the merge, which is the
next round's init. Fronts walk from the first init, the SFT model, towards the
merge of every round, and in round 1 towards the merges of 1, 2, ... M runs. Of
round 1 the report also draws the angles and norms of the task vectors.

Expected: every front lies above the straight line between its ends; fronts
rise from round to round, with diminishing returns, and with M. kl_coef,
ema_rate, temperature and liti_rate are the paper's, and so is the ratio of the
rounds' steps (9,000, 7,000 and 5,000 for Gemma 7B, with lr 1e-6 and batches of
128); learning rate and batch are those of a small model. The paper merges two
runs a round, and up to five where it varies M. An estimate, not a measurement:
half an hour on two cores with the model of the quickstart; `:tiny` is the same
path in minutes and shows no paper's curve. `alignjax train` with the same
config is one run of it.
"""

from ml_collections import ConfigDict

from alignjax.cloud.jobs import Job
from alignjax.core.lookup import defaults
from configs import base

VARIANTS = ('', 'tiny')


def get_config(variant: str = '') -> ConfigDict:
  tiny = variant == 'tiny'
  recipe = defaults(
    'recipes', 'warp', kl_coef=0.1, ema_rate=0.01, max_new_tokens=40
  )
  return base.experiment(
    base.online(recipe, steps=100, lr=1e-3),
    tiny=tiny,
    runs=2 if tiny else 3,
    steps=(6, 4) if tiny else (90, 70, 50),  # of each round
    liti_rate=0.3,  # towards the next round's init
    rates=(0.3, 0.6) if tiny else (0.1, 0.3, 0.5, 0.8),  # of the fronts
  )


def jobs(c: ConfigDict):
  """The graph: what each command reads and writes."""
  start = c.start.policy
  init, above = start, ()
  fronts, front_jobs = [], []
  for i, steps in enumerate(c.graph.steps, start=1):
    runs = [f'round_{i}_run_{m}' for m in range(1, c.graph.runs + 1)]
    for m, name in enumerate(runs, start=1):
      yield base.train(
        c,
        name,
        steps=steps,
        seed=c.seed + 100 * i + m,
        start={'policy': init},
        needs=above,
      )
    slerp = f'round_{i}_slerp'
    yield merge('slerp', slerp, init, runs, needs=(*above, *runs))
    yield front(c, i, slerp)
    fronts += path(c, slerp, f'front_{i}', f'round {i}')
    front_jobs += [slerp, f'front_{i}']
    if i == 1:
      yield geometry(init, runs)
      yield from subsets(c, runs)
    if i < len(c.graph.steps):
      following = f'round_{i + 1}_init'
      yield merge(
        *('liti', following, init, [slerp]),
        liti_rate=c.graph.liti_rate,
        needs=(*above, slerp),
      )
      init, above = f'@{following}/model', (following,)
  yield base.evaluate(c, fronts, name='evaluate_rounds', needs=front_jobs)
  yield base.report('evaluate_rounds', 'evaluate_runs', 'geometry')


def subsets(c: ConfigDict, runs: list[str]):
  """Round 1 by the number of runs that are merged, against LERP of all."""
  models = [
    base.model(f'run {m}', 'run', f'@{name}')
    for m, name in enumerate(runs, start=1)
  ]
  yield merge('linear', 'lerp', c.start.policy, runs, needs=runs)
  models.append(base.model('lerp', 'lerp', '@lerp'))
  needs = [*runs, 'lerp']
  for count in range(1, len(runs)):
    merged = runs[0]
    if count > 1:
      merged = f'slerp_of_{count}'
      some = runs[:count]
      yield merge('slerp', merged, c.start.policy, some, needs=some)
    name = f'of_{count}'
    yield front(c, name, merged)
    models += path(c, merged, f'front_{name}', f'M = {count}')
    needs += [merged, f'front_{name}']
  last = 'round_1_slerp'
  models += path(c, last, 'front_1', f'M = {len(runs)}')
  needs += [last, 'front_1']
  yield base.evaluate(c, models, name='evaluate_runs', needs=needs)


def geometry(init, models) -> Job:
  """How the task vectors from `init` lie (the paper's figures 3 and 15)."""
  merged = [f'@{model}/model' for model in models]
  fields = {'base': init, 'models': merged}
  return Job('geometry', 'inspect', fields, tuple(models))


def merge(method, name, init, models, *, needs, **numbers) -> Job:
  """Task vectors are those from `init`."""
  merged = [f'@{model}/model' for model in models]
  fields = {'method': method, 'base': init, 'models': merged}
  return Job(name, 'merge', fields | numbers, tuple(needs))


def front(c: ConfigDict, name, merged: str) -> Job:
  """From the first init, the SFT model, towards `merged`."""
  return merge(
    *('liti', f'front_{name}', c.start.policy, [merged]),
    liti_rate=list(c.graph.rates),
    needs=(merged,),
  )


def path(c: ConfigDict, merged: str, job: str, series: str):
  """The models of a front and its end, as an evaluation names them."""
  for rate in c.graph.rates:
    yield base.model(
      *(f'{series}, {rate:g}', 'liti', f'@{job}/liti_{rate:.2f}'),
      liti_rate=rate,
      series=series,
    )
  if '_run_' in merged:  # of one run nothing is merged
    yield base.model(
      *(f'{series}, 1', 'liti', f'@{merged}'), liti_rate=1.0, series=series
    )
  else:
    yield base.model(series, 'slerp', f'@{merged}', series=series)
