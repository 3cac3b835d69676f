"""Gemma 2 9B, WARP's inner run: 256 prompts of 256 tokens, 4 x 1024 new ones.

COMMAND: alignjax plan --config=configs/plan/gemma2_9b_rollout.py
  --topology v5p:4x4x4 --step rollout
"""

from alignjax.core.lookup import defaults
from configs.plan.common import sft


def get_config():
  mesh = {'data': 4, 'fsdp': 16, 'tensor': 1}
  c = sft('gemma2-9b', rows=256, mesh=mesh)
  c.recipe = defaults('recipes', 'warp', response_count=4, max_new_tokens=1024)
  c.reward = defaults('rewards', 'verify.python_code')
  c.source = defaults('data', 'sources.prompts', prompt_tokens=256)
  c.microbatches = 4
  return c
