"""Iterative BOND: best-of-2 of an anchor replaced by the policy (2407.14622).

COMMAND: alignjax train --config=configs/papers/bond.py --workdir=runs/bond
  --config.start.policy=MODEL --config.tokenizer=TOKENIZER

n, Jeffreys weight and 16 quantile samples are the paper's; it replaces the
anchor every 1,000 steps of a T5 on XSum.
"""

from alignjax.core.lookup import defaults
from configs.base import online


def get_config():
  recipe = defaults('recipes', 'bond', n=2, anchor_period=25, max_new_tokens=40)
  return online(recipe, steps=100, lr=1e-3)
