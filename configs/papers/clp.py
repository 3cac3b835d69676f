"""CLP against rewarded soups and weights in the prompt (arXiv 2407.15762).

COMMAND: alignjax run --config=configs/papers/clp.py --workdir=runs/clp
  --config.policy=MODEL --config.tokenizer=TOKENIZER

Two rewards that pull apart, code that parses and brevity. For each seed: CLP
with all weights, attention only and the last layer only copied; one run per
reward, merged linearly (soups); one run that reads the weights in its prompt.
All are evaluated at the same weights, and the report draws objective 1 against
objective 2 with hypervolumes: CLP should enclose the soups. The soups get as
many steps per run as CLP in all, so twice the compute. What it gave is in
docs/papers.md; half an hour on one core with the model of the quickstart.
`:tiny` is the same path with a few steps, to see that it works.
"""

from ml_collections import ConfigDict

from alignjax.cloud.jobs import Job
from alignjax.core.lookup import defaults
from configs.base import online

OBJECTIVES = ('score', 'brevity')
OWN = ('policy', 'copied', 'seeds', 'shares', 'prompts')  # not of a run

VARIANTS = ('', 'tiny')


def get_config(variant: str = '') -> ConfigDict:
  tiny = variant == 'tiny'
  recipe = defaults(
    'recipes',
    'clp',
    objectives=OBJECTIVES,
    kl_coef_low=0.05,
    kl_coef_high=0.05,
    groups=2 if tiny else 4,
    max_new_tokens=16 if tiny else 40,
  )
  c = online(recipe, steps=3 if tiny else 120, lr=1e-4)
  # Brevity: the share of the room for tokens that a response leaves.
  brevity = {'name': 'text.length', 'target': 0}
  brevity['tolerance'] = recipe.max_new_tokens
  c.reward = defaults(
    'rewards',
    'compose.stack',
    parts={'score': {'name': 'verify.python_code'}, 'brevity': brevity},
    weights={},
  )
  c.policy = ''
  c.batch_size = 8 if tiny else 16
  c.source.max_bytes = 300_000 if tiny else 2_000_000
  c.copied = ('full', 'attention', 'logits')
  c.seeds = 1 if tiny else 3
  # Of the first objective; the second gets the rest.
  c.shares = (0.0, 0.5, 1.0) if tiny else (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
  c.prompts = 8 if tiny else 128
  return c


def jobs(c: ConfigDict):
  """The graph: what each command reads and writes."""
  shared = {
    'tokenizer': c.tokenizer,
    'model': c.model.to_dict(),
    'start': {'policy': c.policy, 'reference': '@policy'},
    'reward': c.reward.to_dict(),
  }
  numbers = {k: v for k, v in c.to_dict().items() if k not in OWN} | shared
  models = [{'name': 'init', 'kind': 'init', 'path': c.policy}]
  needs = []
  for seed in range(c.seeds):
    for made, compared in _seed(c, numbers, seed):
      yield made
      needs.append(made.name)
      models += compared
  yield Job(
    'evaluate',
    'evaluate',
    shared
    | {
      'temperature': c.recipe.temperature,
      'max_new_tokens': c.recipe.max_new_tokens,
      'mesh': {'data': -1},
      'seed': c.seed,
      'source': c.source.to_dict() | {'part': 'held_out', 'held_out': 0.3},
      'prompts': c.prompts,
      'responses': 4,
      'reference_responses': 4,
      'batch_size': min(c.prompts, 32),
      'samples': 4,
      'models': models,
      'reference': 'init',
      'objectives': list(OBJECTIVES),
    },
    needs=tuple(needs),
  )
  yield Job('report', 'report', {}, needs=('evaluate', *needs))


def _seed(c: ConfigDict, numbers: dict, seed: int):
  """(job, its entries in the evaluation) of one seed."""
  numbers = numbers | {'seed': c.seed + 1 + seed}
  recipe = c.recipe.to_dict()
  points = [(share, round(1 - share, 6)) for share in c.shares]

  def entries(run, kind, field):
    return [
      {
        'name': f'{run} {w[0]:g}',
        'kind': kind,
        'path': f'@{run}/model',
        field: list(w),
      }
      for w in points
    ]

  for copied in c.copied:
    run = f'clp_{copied}_{seed}'
    own = {'recipe': recipe | {'copied': copied}}
    made = Job(run, 'train', numbers | own)
    yield made, entries(run, f'CLP {copied}', 'weights')

  run, low = f'told_{seed}', c.recipe.kl_coef_low
  drawn = {k: recipe[k] for k in ('max_new_tokens', 'response_count')}
  told = {'name': 'clp.told', 'objectives': OBJECTIVES, 'kl_coef': low}
  source = {'name': 'weighted', 'rows': c.source.to_dict()}
  made = Job(run, 'train', numbers | {'recipe': told | drawn, 'source': source})
  yield made, entries(run, 'told', 'said')

  # (1 - a) R - a log ratio is REINFORCE with kl_coef a / (1 - a).
  alone = {'name': 'reinforce', 'kl_coef': low / (1 - low)} | drawn
  experts = [f'expert_{name}_{seed}' for name in OBJECTIVES]
  for name, run in zip(OBJECTIVES, experts):
    reward = c.reward.to_dict()
    reward['weights'] = {other: float(other == name) for other in OBJECTIVES}
    yield Job(run, 'train', numbers | {'recipe': alone, 'reward': reward}), []
  for w in points:
    run = f'soup_{seed}_{round(100 * w[0]):03d}'
    merge = {
      'method': 'linear',
      'base': c.policy,
      'models': [f'@{expert}/model' for expert in experts],
      'weights': list(w),
    }
    entry = {
      'name': f'soup_{seed} {w[0]:g}',
      'kind': 'soup',
      'path': f'@{run}/model',
      'at': list(w),
    }
    yield Job(run, 'merge', merge, needs=tuple(experts)), [entry]
