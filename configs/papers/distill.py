"""Distillation from a larger teacher: Gemma 2's, and Gemma 3's 256 ids.

COMMAND: alignjax train --config=configs/papers/distill.py --workdir=runs/small
  --config.start.policy=MODEL --config.teacher.path=TEACHER
  --config.tokenizer=TOKENIZER

The teacher may be of another size, family and file format; its tokenizer must
be the run's. `:sampled` uses 256 ids a position, drawn by the teacher's
probabilities, in place of the whole distribution. With the teacher run once,
beforehand, by the first command, the second needs none:

  alignjax teach --config=configs/papers/distill.py:sampled --out=RECORDS
    --config.teacher.path=TEACHER --config.tokenizer=TOKENIZER
  alignjax train --config=configs/papers/distill.py:recorded
    --workdir=runs/small --config.start.policy=MODEL
    --config.source.path=RECORDS --config.tokenizer=TOKENIZER
"""

from ml_collections import ConfigDict

from alignjax.core.lookup import defaults
from alignjax.core.types import UserError
from configs.base import single

VARIANTS = ('', 'sampled', 'recorded')


def get_config(variant=''):
  if variant not in VARIANTS:
    raise UserError(f'variant {variant!r}: expected one of {VARIANTS[1:]}')
  rows = defaults('data', 'sources.text', length=256)
  if variant == 'recorded':
    recipe = defaults('recipes', 'distill.recorded')
  else:
    targets = 'counts' if variant else 'full'
    recipe = defaults('recipes', 'distill', targets=targets)
  c = single(recipe, steps=200, batch_size=16, lr=3e-4)
  if variant == 'recorded':
    c.source = defaults('data', 'teacher.recorded', rows=rows)
  else:
    c.source = rows
    c.teacher = ConfigDict({'path': '', 'tokenizer': ''})
  return c
