"""RLOO: REINFORCE against the other responses' mean (arXiv 2402.14740).

COMMAND: alignjax train --config=configs/papers/reinforce.py --workdir=runs/rloo
  --config.start.policy=MODEL --config.tokenizer=TOKENIZER

Four responses to each of 32 prompts, KL to the start in the reward. The paper
trains 7B models with 2 or 4 responses, kl_coef 0.03 to 0.1 and batches of 256
to 512; learning rate and steps here are those of a small model. Expect the
reward to rise while `kl` levels off; `--config.recipe.kl_in=loss` moves the
pull from the reward to the loss.
"""

from alignjax.core.lookup import defaults
from configs.base import online


def get_config():
  recipe = defaults(
    'recipes', 'reinforce', kl_coef=0.05, response_count=4, max_new_tokens=40
  )
  c = online(recipe, steps=100, lr=1e-4)
  c.start.reference = '@policy'
  return c
