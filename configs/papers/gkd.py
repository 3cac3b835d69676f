"""GKD: on-policy distillation from a larger teacher (arXiv 2306.13649).

COMMAND: alignjax train --config=configs/papers/gkd.py --workdir=runs/gkd
  --config.start.policy=MODEL --config.teacher.path=TEACHER
  --config.tokenizer=TOKENIZER

The Jensen-Shannon mix of 0.5 and answers of the student only are among the
paper's settings; learning rate and batch are those of a small model.
"""

from ml_collections import ConfigDict

from alignjax.core.lookup import defaults
from configs.base import single


def get_config():
  recipe = defaults('recipes', 'gkd', max_new_tokens=40)
  c = single(recipe, steps=100, batch_size=32, lr=3e-4)
  c.teacher = ConfigDict({'path': '', 'tokenizer': ''})
  c.source = defaults('data', 'sources.prompts', prompt_tokens=32)
  # For `on_policy` below 1: the text that follows a prompt is its answer.
  c.source.response_tokens = 40
  return c
