"""Gemma 2 2B, supervised fine-tuning on packed rows of 4096 tokens.

COMMAND: alignjax plan --config=configs/plan/gemma2_2b.py --topology v5e:4x4
"""

from configs.plan.common import sft


def get_config():
  return sft('gemma2-2b', rows=16, mesh={'data': 1, 'fsdp': 16, 'tensor': 1})
