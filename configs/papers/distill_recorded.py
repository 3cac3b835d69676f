"""Distillation from a teacher that has been run once, beforehand.

COMMAND: alignjax train --config=configs/papers/distill_recorded.py
  --workdir=runs/small --config.start.policy=MODEL
  --config.source.path=RECORDS --config.tokenizer=TOKENIZER

RECORDS is what `alignjax teach` has written: 256 ids a position and how often
the teacher drew each of them.

  alignjax teach --config=configs/papers/distill.py --out=RECORDS
    --config.recipe.targets=counts --config.teacher.path=TEACHER
    --config.tokenizer=TOKENIZER
"""

from ml_collections import ConfigDict

from alignjax.core.lookup import defaults
from configs.base import single


def get_config() -> ConfigDict:
  recipe = defaults('recipes', 'distill.recorded')
  c = single(recipe, steps=200, batch_size=8, lr=3e-4)
  rows = defaults('data', 'sources.text', length=128)
  c.source = defaults('data', 'teacher.recorded', rows=rows)
  return c
