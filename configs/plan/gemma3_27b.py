"""Gemma 3 27B, supervised fine-tuning on packed rows of 4096 tokens.

COMMAND: alignjax plan --config=configs/plan/gemma3_27b.py --topology v5p:4x4x4
"""

from configs.plan.common import sft


def get_config():
  return sft('gemma3-27b', rows=64, mesh={'data': 2, 'fsdp': 32, 'tensor': 1})
