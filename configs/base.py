"""What configs share: the numbers of a run, and the jobs of experiments.

Config programs import it (`from configs.base import single`), so run
`alignjax` in the folder that holds `configs/`, or copy this file.

A paper's experiment is the config of one run, which `alignjax train` takes as
it is, with a section `graph`: what `alignjax run` varies, and how the results
are evaluated.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from alignjax.cloud.jobs import Job
from alignjax.core.lookup import defaults

INIT = 'init'  # what an evaluation calls the model that all runs start from


def single(
  recipe: ConfigDict, *, steps: int, batch_size: int, lr: float
) -> ConfigDict:
  """One run of `recipe` from the model `start.policy`; add a source."""
  c = ConfigDict()
  c.seed = 0
  c.tokenizer = ''
  c.mesh = ConfigDict({'data': -1})
  c.model = ConfigDict({'name': 'start'})  # the shape of start.policy
  # A model's path; with c.start = {'policy': merged(...)} a merge of some.
  c.start = ConfigDict({'policy': ''})
  c.recipe = recipe
  c.optimizer = defaults('system', 'optimizer', lr=lr, warmup_steps=10)
  c.steps = steps
  c.batch_size = batch_size
  c.microbatches = 1
  c.log_every = 1
  c.save_every = 20
  c.keep = 2
  c.max_bad_steps = 5
  c.verify_every = 0
  return c


def online(recipe: ConfigDict, *, steps: int, lr: float) -> ConfigDict:
  """An online run on prompts cut from text, rewarded by Python's parser."""
  c = single(recipe, steps=steps, batch_size=32, lr=lr)
  c.source = defaults('data', 'sources.prompts', prompt_tokens=32)
  c.reward = defaults('rewards', 'verify.python_code')
  return c


def experiment(c: ConfigDict, *, tiny: bool, **numbers: Any) -> ConfigDict:
  """The online run `c` with a section `graph` of `numbers`; tiny: in minutes.

  Documents are taken in the order of their hashes, the held-out ones first: a
  larger share of few bytes would leave nothing to train on, and another share
  for the evaluation would be of prompts that were trained on.
  """
  c.source.max_bytes = 1_000_000 if tiny else 3_000_000
  c.batch_size = 8 if tiny else 16
  if tiny:
    c.recipe.max_new_tokens = 16
    c.optimizer.warmup_steps = 2
  c.graph = ConfigDict(numbers)
  c.graph.evaluate = ConfigDict(
    dict(
      prompts=16 if tiny else 160,
      responses=4,
      reference_responses=8,
      batch_size=16 if tiny else 32,
      samples=4,
    )
  )
  return c


def train(
  c: ConfigDict, name: str, *, needs: Sequence[str] = (), **changes: Any
) -> Job:
  """The run `c` as a job, with `changes` of its sections and numbers."""
  numbers = c.to_dict()
  numbers.pop('graph')
  return Job(name, 'train', numbers | changes, tuple(needs))


def merged(
  method: str, base: Any, models: Sequence[Any], **numbers: Any
) -> dict[str, Any]:
  """A merge that stands for a model's path: made where it is used.

  The fields of a `merge` job, but for where it is written. Base and models are
  paths, or such merges again.
  """
  return dict(method=method, base=base, models=list(models)) | numbers


class Arm(NamedTuple):
  """Runs of an experiment that differ in their seeds only.

  Attributes:
    series: arms of one series look alike in the report, a line joins them.
    numbers: what tells it from others of its series.
    changes: of the run, as for `train`.
  """

  series: str
  numbers: Mapping[str, float]
  changes: Mapping[str, Any]

  @property
  def name(self) -> str:
    """'reinforce_0_1': also that of its jobs, with the seed behind it."""
    numbers = (f'{x:g}' for x in self.numbers.values())
    words = [*self.series.lower().split(), *numbers]
    return '_'.join(words).replace('.', '_')


def model(name: str, kind: str, path: Any, **more: Any) -> dict[str, Any]:
  """A model of an evaluation; '@job' needs a path inside, or means its model.

  path: or what `merged` gives.
  more: `liti_rate`; `series`, which of several LITI paths, or of other kinds
  the arm: models of one arm look alike in the report; and an arm's `numbers`.
  Models that differ in their names only are its seeds, and are averaged.
  """
  if isinstance(path, str) and path.startswith('@') and '/' not in path:
    path += '/model'
  return dict(name=name, kind=kind, path=path) | more


def evaluate(
  c: ConfigDict,
  models: Sequence[Mapping[str, Any]],
  *,
  needs: Sequence[str],
  name: str = 'evaluate',
) -> Job:
  """`models` and the init, on held-out prompts and in the run's sampling."""
  init = model(INIT, 'init', c.start.policy)
  fields = ('tokenizer', 'mesh', 'model', 'reward', 'seed')
  numbers = c.to_dict()
  return Job(
    name,
    'evaluate',
    {field: numbers[field] for field in fields}
    | numbers['graph']['evaluate']
    | {
      'start': {'policy': c.start.policy},
      'temperature': c.recipe.temperature,
      'max_new_tokens': c.recipe.max_new_tokens,
      'source': numbers['source'] | {'part': 'held_out'},
      'models': [init, *models],
      'reference': INIT,
    },
    tuple(needs),
  )


def report(*needs: str) -> Job:
  """The page of everything that the graph has left."""
  return Job('report', 'report', {}, tuple(needs))


def seeded(c: ConfigDict, arms: Iterable[Arm]) -> tuple[list[Job], list[dict]]:
  """Runs of every arm under `graph.seeds` seeds: as jobs, and as models.

  All arms see the same prompts in the same order under a seed.
  """
  jobs, models = [], []
  for arm in arms:
    for seed in range(1, c.graph.seeds + 1):
      name = f'{arm.name}_{seed}'
      jobs.append(train(c, name, seed=c.seed + seed, **arm.changes))
      more = {'series': arm.series, 'numbers': dict(arm.numbers)}
      models.append(model(name, 'run', f'@{name}', **more))
  return jobs, models


def compared(c: ConfigDict, arms: Iterable[Arm]):
  """The runs of `seeded` arms, their evaluation, and its page."""
  jobs, models = seeded(c, arms)
  yield from jobs
  yield evaluate(c, models, needs=[job.name for job in jobs])
  yield report('evaluate')
