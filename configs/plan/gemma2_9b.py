"""Gemma 2 9B, supervised fine-tuning on packed rows of 4096 tokens.

COMMAND: alignjax plan --config=configs/plan/gemma2_9b.py --topology v5p:4x4x4

Shapes only: no weights, no data and no tokenizer file are read.
"""

from configs.plan.common import sft


def get_config():
  return sft('gemma2-9b', rows=64, mesh={'data': 4, 'fsdp': 16, 'tensor': 1})
