"""WARP: rounds of runs, SLERP, and LITI back to the start (2406.16768).

COMMAND: alignjax run --config=configs/papers/warp.py --workdir=runs/warp
  --config.start.policy=MODEL --config.tokenizer=TOKENIZER

Each round trains M runs from its init, with a fresh optimizer, an anchor that
begins at the init, and prompts in another order; merges them by SLERP of their
task vectors; and interpolates from its init towards the merge, which is the
next round's init. Fronts walk from the first init, the SFT model, towards the
merge of every round, and in round 1 towards the merges of 1, 2, ... M runs. Of
round 1 the report also draws the angles and norms of the task vectors.

On disk are the runs and the merge of every round, round_3_slerp/model at last;
with graph.write_rounds=False that of the last round alone. All other merges,
the inits of the rounds and the points of the fronts, are made where they are
used, on the devices of the run that begins there. A point to keep is one
command: alignjax merge liti --base MODEL --models runs/warp/round_3_slerp/model
--liti_rate 0.3 --out O.

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
    runs=2 if tiny else 3,
    steps=(6, 4) if tiny else (72, 56, 40),  # of each round
    liti_rate=0.3,  # towards the next round's init
    rates=(0.3, 0.6) if tiny else (0.1, 0.3, 0.5, 0.8),  # of the fronts
    write_rounds=True,  # a model directory of every round's merge
  )


def jobs(c: ConfigDict):
  """The graph: what each command reads and writes."""
  init, fronts, above = c.start.policy, [], ()
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
    above = (*above, *runs)
    slerp = base.merged('slerp', init, outputs(runs))
    if c.graph.write_rounds or i == len(c.graph.steps):
      name = f'round_{i}_slerp'
      yield Job(name, 'merge', slerp, above)
      slerp, above = f'@{name}/model', (*above, name)
    fronts += path(c, slerp, f'round {i}')
    if i == 1:
      yield Job(
        'geometry',  # the paper's figures 3 and 15
        'inspect',
        {'base': init, 'models': outputs(runs)},
        tuple(runs),
      )
      yield subsets(c, runs, slerp, above)
    init = base.merged('liti', init, [slerp], liti_rate=c.graph.liti_rate)
  yield base.evaluate(c, fronts, name='evaluate_rounds', needs=above)
  yield base.report('evaluate_rounds', 'evaluate_runs', 'geometry')


def outputs(runs: Sequence[str]) -> list[str]:
  """The models that these jobs write."""
  return [f'@{run}/model' for run in runs]


def subsets(c: ConfigDict, runs: Sequence[str], slerp: Any, needs) -> Job:
  """Round 1 by the number of runs that are merged, against LERP of all."""
  init, trained = c.start.policy, outputs(runs)
  models = [
    base.model(f'run {m}', 'run', run) for m, run in enumerate(trained, start=1)
  ]
  lerp = base.merged('linear', init, trained)
  models.append(base.model('lerp', 'lerp', lerp))
  for count in range(1, len(runs)):
    some = base.merged('slerp', init, trained[:count])
    end = some if count > 1 else trained[0]
    models += path(c, end, f'M = {count}', alone=count == 1)
  models += path(c, slerp, f'M = {len(runs)}')
  return base.evaluate(c, models, name='evaluate_runs', needs=needs)


def path(c: ConfigDict, end: Any, series: str, *, alone: bool = False):
  """A front from the first init, the SFT model, and its end, as models.

  alone: the end is a run, of which nothing is merged.
  """
  for rate in c.graph.rates:
    point = base.merged('liti', c.start.policy, [end], liti_rate=rate)
    yield base.model(
      f'{series}, {rate:g}', 'liti', point, liti_rate=rate, series=series
    )
  if alone:
    yield base.model(f'{series}, 1', 'liti', end, liti_rate=1.0, series=series)
  else:
    yield base.model(series, 'slerp', end, series=series)
