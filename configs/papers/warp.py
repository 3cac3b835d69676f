"""WARP: rounds of runs, SLERP, and LITI back to the start (2406.16768).

COMMAND: alignjax run --config=configs/papers/warp.py --workdir=runs/warp
  --config.start.policy=MODEL --config.tokenizer=TOKENIZER

Each round trains M runs from its init, with a fresh optimizer, an anchor that
begins at the init, and prompts in another order; merges them by SLERP of their
task vectors; and interpolates from its init towards the merge, which is the
next round's init. Fronts walk from the first init, the SFT model, towards the
merge of every round, and in round 1 towards the merges of 1, 2, ... M runs; of
round 1 the report also draws the angles and norms of the task vectors. A third
evaluation compares the moving anchor with REINFORCE's usual one, the SFT model,
at several KL strengths and numbers of steps. All of it under three seeds.

On disk are the runs and the merge of every round, seed_1_round_3_slerp/model at
last; with graph.write_rounds=False that of the last round alone. All other
merges, the inits of the rounds and the points of the fronts, are made where
they are used, on the devices of the run that begins there. A point to keep is
one command: alignjax merge liti --base MODEL --models
runs/warp/seed_1_round_3_slerp/model --liti_rate 0.3 --out O.

Expected: the moving anchor above every fixed one in reward against KL; every
front above the straight line between its ends; fronts rise from round to round,
with diminishing returns, and with M. kl_coef, ema_rate, temperature and
liti_rate are the paper's, and so is the ratio of the rounds' steps (9,000,
7,000 and 5,000 for Gemma 7B, with lr 1e-6 and batches of 128); learning rate
and batch are those of a small model. The paper merges two runs a round, and up
to five where it varies M. What it gave is in docs/papers.md; forty minutes on
one core with the model of the quickstart. `:tiny` is the same path in minutes,
with one seed, and shows no paper's curve. `alignjax train` with the same config
is one run of it.
"""

from collections.abc import Sequence
from typing import Any

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
    base.online(recipe, steps=100, lr=3e-4),
    tiny=tiny,
    seeds=1 if tiny else 3,
    runs=2 if tiny else 3,
    steps=(6, 4) if tiny else (72, 56, 40),  # of each round
    liti_rate=0.3,  # towards the next round's init
    rates=(0.3, 0.6) if tiny else (0.1, 0.3, 0.5, 0.8),  # of the fronts
    write_rounds=True,  # a model directory of every round's merge
    sft_coefs=(0.1,) if tiny else (0.01, 0.03, 0.1),  # to the SFT model
    lengths=(6,) if tiny else (36, 72, 144),  # steps, to compare anchors
  )


def jobs(c: ConfigDict):
  """The graph: what each command reads and writes."""
  by_round, by_count, done = [], [], []
  for seed in range(1, c.graph.seeds + 1):
    made, rounds, counts = replica(c, seed)
    yield from made
    by_round += rounds
    by_count += counts
    done += [job.name for job in made]
  yield Job(
    'geometry',  # the paper's figures 3 and 15
    'inspect',
    {'base': c.start.policy, 'models': outputs(_runs(c, 1, 1))},
    _runs(c, 1, 1),
  )
  made, compared = base.seeded(c, anchors(c))
  yield from made
  needs = [job.name for job in made]
  yield base.evaluate(c, compared, name='evaluate_anchors', needs=needs)
  yield base.evaluate(c, by_round, name='evaluate_rounds', needs=done)
  yield base.evaluate(c, by_count, name='evaluate_runs', needs=done)
  names = ('evaluate_anchors', 'evaluate_rounds', 'evaluate_runs', 'geometry')
  yield base.report(*names)


def replica(c: ConfigDict, seed: int) -> tuple[list[Job], list, list]:
  """All rounds under one seed: jobs, the fronts by round, and those by M."""
  init, made, fronts, counts = c.start.policy, [], [], []
  for i, steps in enumerate(c.graph.steps, start=1):
    runs, above = _runs(c, seed, i), tuple(job.name for job in made)
    made += [
      base.train(
        c,
        name,
        steps=steps,
        seed=c.seed + 1000 * seed + 100 * i + m,
        start={'policy': init},
        needs=above,
      )
      for m, name in enumerate(runs, start=1)
    ]
    slerp = base.merged('slerp', init, outputs(runs))
    if c.graph.write_rounds or i == len(c.graph.steps):
      name = f'seed_{seed}_round_{i}_slerp'
      made.append(Job(name, 'merge', slerp, (*above, *runs)))
      slerp = f'@{name}/model'
    fronts += path(c, slerp, f'round {i}', seed)
    if i == 1:
      counts = subsets(c, runs, slerp, seed)
    init = base.merged('liti', init, [slerp], liti_rate=c.graph.liti_rate)
  return made, fronts, counts


def _runs(c: ConfigDict, seed: int, i: int) -> tuple[str, ...]:
  """The jobs that train in round i."""
  return tuple(
    f'seed_{seed}_round_{i}_run_{m}' for m in range(1, c.graph.runs + 1)
  )


def anchors(c: ConfigDict):
  """WARP's moving anchor, and REINFORCE's fixed one, by number of steps."""
  recipe, start = c.recipe.to_dict(), c.start.to_dict() | {'anchor': '@policy'}
  for steps in c.graph.lengths:
    number = {'steps': steps}
    yield base.Arm('EMA anchor', number, number)
    for coef in c.graph.sft_coefs:
      fixed = {'recipe': recipe | {'ema_rate': 0.0, 'kl_coef': coef}}
      fixed |= {'start': start}
      yield base.Arm(f'SFT anchor {coef:g}', number, number | fixed)


def outputs(runs: Sequence[str]) -> list[str]:
  """The models that these jobs write."""
  return [f'@{run}/model' for run in runs]


def subsets(c: ConfigDict, runs: Sequence[str], slerp: Any, seed: int) -> list:
  """Round 1 by the number of runs that are merged, against LERP of all."""
  init, trained = c.start.policy, outputs(runs)
  models = [
    base.model(f'run {m} ({seed})', 'run', run, series='runs')
    for m, run in enumerate(trained, start=1)
  ]
  lerp = base.merged('linear', init, trained)
  models.append(base.model(f'LERP ({seed})', 'lerp', lerp, series='LERP'))
  models += path(c, trained[0], 'M = 1', seed, alone=True)
  for count in range(2, len(runs)):
    some = base.merged('slerp', init, trained[:count])
    models += path(c, some, f'M = {count}', seed)
  return models + path(c, slerp, f'M = {len(runs)}', seed)


def path(
  c: ConfigDict, end: Any, series: str, seed: int, *, alone: bool = False
) -> list:
  """A front from the first init, the SFT model, and its end, as models.

  alone: the end is a run, of which nothing is merged.
  """
  models = [
    base.model(
      f'{series}, {rate:g} ({seed})',
      'liti',
      base.merged('liti', c.start.policy, [end], liti_rate=rate),
      liti_rate=rate,
      series=series,
    )
    for rate in c.graph.rates
  ]
  name = f'{series}, 1 ({seed})'
  kind = {'kind': 'liti', 'liti_rate': 1.0} if alone else {'kind': 'slerp'}
  return [*models, base.model(name, path=end, series=series, **kind)]
