"""GRPO and its relatives on one reward (arXiv 2402.03300).

COMMAND: alignjax train --config=configs/papers/grpo.py --workdir=runs/grpo
  --config.start.policy=MODEL --config.tokenizer=TOKENIZER

Variants are numbers of one recipe: configs/papers/grpo.py:dapo, :dr_grpo and
:gspo (arXiv 2503.14476, 2503.20783, 2507.18071). Groups are of 8 (paper: 64);
learning rate and steps are those of a small model. Expect the reward to rise
and `flat_groups`, the share of prompts that teach nothing, with it.
"""

from alignjax.core.lookup import defaults
from configs.base import online

VARIANTS = {
  '': {},
  'dapo': dict(mean_over='token', clip_high=0.28, kl_coef=0.0),
  'dr_grpo': dict(mean_over='constant', divide_by_std=False, kl_coef=0.0),
  'gspo': dict(ratio_of='sequence', clip_low=3e-4, clip_high=4e-4, kl_coef=0.0),
}


def get_config(variant: str = ''):
  numbers = dict(response_count=8, updates=2, max_new_tokens=40)
  recipe = defaults('recipes', 'grpo', **numbers, **VARIANTS[variant])
  c = online(recipe, steps=100, lr=1e-4)
  if recipe.kl_coef:
    c.start.reference = '@policy'
  return c
