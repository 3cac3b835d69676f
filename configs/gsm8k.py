"""Group-relative RL on grade-school sums: GSM8K's files as they are.

COMMAND: alignjax train --config=configs/gsm8k.py --workdir=runs/gsm8k
  --config.start.policy=MODEL --config.tokenizer=TOKENIZER
  --config.source.path=gsm8k_train.jsonl

Rows of JSONL have a `question` and an `answer` whose number follows '####'
(arXiv 2110.14168). The reward is a stack: 1 for the right number, a little for
saying '####' at all, and a score of 0 for a response that takes longer than
ten seconds to judge. A model that cannot do sums earns nothing here: start
from one that was tuned to follow instructions.
"""

from alignjax.core.lookup import defaults
from configs.base import single


def get_config():
  recipe = defaults(
    'recipes',
    'grpo',
    response_count=8,
    updates=2,
    kl_coef=0.02,
    max_new_tokens=256,
  )
  c = single(recipe, steps=1000, batch_size=64, lr=1e-6)
  c.start.reference = '@policy'
  c.source = defaults(
    'data', 'sources.prompts', field='question', whole=True, prompt_tokens=256
  )
  c.reward = defaults(
    'rewards',
    'compose.stack',
    parts={
      'right': {
        'name': 'compose.bounded',
        'part': {'name': 'text.answer'},
        'limit_s': 10.0,
      },
      'marked': {'name': 'text.pattern', 'regex': '####'},
    },
    weights={'right': 1.0, 'marked': 0.1},
  )
  return c
