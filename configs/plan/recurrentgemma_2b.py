"""RecurrentGemma 2B, supervised fine-tuning on packed rows of 4096 tokens.

COMMAND: alignjax plan --config=configs/plan/recurrentgemma_2b.py
         --topology v6e:4x4
"""

from configs.plan.common import sft


def get_config():
  return sft(
    'recurrentgemma-2b', rows=16, mesh={'data': 1, 'fsdp': 16, 'tensor': 1}
  )
