"""PPO with a value role that starts as the policy (arXiv 1707.06347).

COMMAND: alignjax train --config=configs/papers/ppo.py --workdir=runs/ppo
  --config.start.policy=MODEL --config.tokenizer=TOKENIZER

The value role learns three times as fast as the policy; two updates go over
each rollout. Learning rate, batch and steps are those of a small model. Expect
`loss/value` to fall first, and the reward to rise after it.
"""

from alignjax.core.lookup import defaults
from configs.base import online


def get_config():
  recipe = defaults(
    'recipes', 'ppo', response_count=2, updates=2, max_new_tokens=40
  )
  c = online(recipe, steps=100, lr=1e-4)
  c.start.reference = '@policy'
  c.start.value = '@policy'
  c.optimizer.table = (('value/.*', 3.0), ('.*', 1.0))
  return c
