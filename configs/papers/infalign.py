"""CTRL against the plain win rate, under best-of-4 and worst-of-4 (2412.19792).

COMMAND: alignjax run --config=configs/papers/infalign.py
  --workdir=runs/infalign --config.start.policy=MODEL
  --config.tokenizer=TOKENIZER

calibrate -> for each transform a few KL strengths and seeds -> evaluate ->
report. The paper's figure is the win rate of the best (worst) of 4 against KL:
a positive scale of exp should lead under best-of-4, a negative one under
worst-of-4, identity in the plain win rate, each at equal KL. Half an
hour on one core with the model of the quickstart, and docs/papers.md tells what
it gave; `:tiny` is the same path in two minutes.
"""

from ml_collections import ConfigDict

from alignjax.cloud.jobs import Job
from alignjax.core.lookup import defaults
from configs import base

TRANSFORMS = {  # name: transform, scale
  'identity': ('identity', 0.0),
  'exp': ('exp', 10.0),
  'negative_exp': ('exp', -10.0),
}
# Strengths with which all reach about the same KL. The negative scale tells bad
# completions from one another, and of those there are soon few.
KL_COEFS = {
  'identity': (0.05, 0.1, 0.2),
  'exp': (0.05, 0.1, 0.2),
  'negative_exp': (0.01, 0.02, 0.05),
}

VARIANTS = ('', 'tiny')


def get_config(variant: str = '') -> ConfigDict:
  tiny = variant == 'tiny'
  recipe = defaults(
    'recipes', 'infalign', max_new_tokens=40, response_count=4, temperature=0.8
  )
  # Ten times this rate moves the policy by noise: a KL of 5 where 0.6 is best.
  c = base.online(recipe, steps=2 if tiny else 80, lr=1e-4)
  c.start.reference = '@policy'
  return base.experiment(
    c,
    tiny=tiny,
    responses=4 if tiny else 32,  # for calibration, of each prompt
    kl_coefs={k: v[:1] if tiny else v for k, v in KL_COEFS.items()},
    seeds=1 if tiny else 3,
  )


def jobs(c: ConfigDict):
  """The graph: what each command reads and writes."""
  numbers = c.to_dict()
  fields = ('tokenizer', 'model', 'start', 'reward', 'batch_size', 'seed')
  yield Job(
    'calibrate',
    'calibrate',
    {field: numbers[field] for field in fields}
    | {
      'source': numbers['source'],
      'responses': c.graph.responses,
      'temperature': c.recipe.temperature,
      'max_new_tokens': c.recipe.max_new_tokens,
    },
  )
  source = {
    'name': 'calibrated',
    'path': '@calibrate',
    'rows': numbers['source'],
  }
  arms = []
  for name, (word, scale) in TRANSFORMS.items():
    for kl_coef in c.graph.kl_coefs[name]:
      recipe = {'transform': word, 'transform_scale': scale, 'kl_coef': kl_coef}
      changes = {
        'recipe': numbers['recipe'] | recipe,
        'source': source,
        'needs': ('calibrate',),
      }
      arms.append(base.Arm(name, {'kl_coef': kl_coef}, changes))
  yield from base.compared(c, arms)
