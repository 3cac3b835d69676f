"""WARP's inner loop: REINFORCE with KL to an EMA anchor (arXiv 2406.16768).

COMMAND: alignjax train --config=configs/papers/warp.py --workdir=runs/warp
  --config.start.policy=MODEL --config.tokenizer=TOKENIZER

kl_coef, ema_rate and temperature are the paper's; learning rate and batch are
those of a small model (paper: 1e-6 and 128 for Gemma 7B, 9,000 steps).
"""

from alignjax.core.lookup import defaults
from configs.base import online


def get_config():
  recipe = defaults(
    'recipes', 'warp', kl_coef=0.1, ema_rate=0.01, max_new_tokens=40
  )
  return online(recipe, steps=100, lr=1e-3)
