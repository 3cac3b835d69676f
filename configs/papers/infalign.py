"""CTRL against the plain win rate, under best-of-4 and worst-of-4 (2412.19792).

COMMAND: alignjax run --config=configs/papers/infalign.py
  --workdir=runs/infalign --config.policy=MODEL --config.tokenizer=TOKENIZER

calibrate -> for each transform a few KL strengths and seeds -> evaluate ->
report. The paper's figure is the win rate of the best (worst) of 4 against KL:
a positive scale of exp should lead under best-of-4, a negative one under
worst-of-4, identity in the plain win rate, each at equal KL. About 40 minutes
on two cores with the model of the quickstart; `:tiny` is the same path in two.
"""

from ml_collections import ConfigDict

from alignjax.cloud.jobs import Job
from alignjax.core.lookup import defaults
from configs.base import online

# Name: transform, scale. Normalised, so that one grid of kl_coef serves all.
TRANSFORMS = {
  'identity': ('identity', 0.0),
  'exp': ('exp', 10.0),
  'negative_exp': ('exp', -10.0),
}


def get_config(variant: str = '') -> ConfigDict:
  tiny = variant == 'tiny'
  recipe = defaults('recipes', 'infalign', max_new_tokens=16 if tiny else 40)
  c = online(recipe, steps=2 if tiny else 60, lr=1e-3)
  c.policy = ''
  c.batch_size = 8 if tiny else 32
  c.recipe.temperature = 0.8
  c.source.max_bytes = 1_000_000 if tiny else 2_000_000
  c.responses = 4 if tiny else 32  # for calibration, of each prompt
  c.kl_coefs = (0.1,) if tiny else (0.05, 0.2)
  c.seeds = 1 if tiny else 3
  c.prompts = 8 if tiny else 256
  return c


def jobs(c: ConfigDict):
  """The graph: what each command reads and writes."""
  shared = {
    'tokenizer': c.tokenizer,
    'model': c.model.to_dict(),
    'start': {'policy': c.policy, 'reference': '@policy'},
    'reward': c.reward.to_dict(),
  }
  drawn = {
    'temperature': c.recipe.temperature,
    'max_new_tokens': c.recipe.max_new_tokens,
  }
  prompts = c.source.to_dict()
  yield Job(
    'calibrate',
    'calibrate',
    shared
    | drawn
    | {
      'source': prompts,
      'responses': c.responses,
      'batch_size': c.batch_size,
      'seed': c.seed,
    },
  )
  models = [{'name': 'init', 'kind': 'init', 'path': c.policy}]
  for name, (transform, scale) in TRANSFORMS.items():
    for kl_coef in c.kl_coefs:
      for seed in range(c.seeds):
        run = f'{name}_{kl_coef:g}_{seed}'.replace('.', '_')
        recipe = c.recipe.to_dict() | {
          'transform': transform,
          'transform_scale': scale,
          'kl_coef': kl_coef,
        }
        numbers = c.to_dict()
        for extra in ('policy', 'responses', 'kl_coefs', 'seeds', 'prompts'):
          numbers.pop(extra)
        yield Job(
          run,
          'train',
          numbers
          | shared
          | {
            'recipe': recipe,
            'seed': c.seed + 1 + seed,
            'source': {
              'name': 'calibrated',
              'path': '@calibrate',
              'rows': prompts,
            },
          },
          needs=('calibrate',),
        )
        models.append({'name': run, 'kind': 'run', 'path': f'@{run}/model'})
  runs = tuple(model['name'] for model in models[1:])
  yield Job(
    'evaluate',
    'evaluate',
    shared
    | drawn
    | {
      'mesh': {'data': -1},
      'seed': c.seed,
      'source': prompts | {'part': 'held_out', 'held_out': 0.3},
      'prompts': c.prompts,
      'responses': 8,
      'reference_responses': 8,
      'batch_size': min(c.prompts, 32),
      'samples': 4,
      'models': models,
      'reference': 'init',
    },
    needs=runs,
  )
  yield Job('report', 'report', {}, needs=('evaluate', *runs))
