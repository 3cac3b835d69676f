"""Supervised fine-tuning on conversations, the loss on model turns only.

COMMAND: alignjax train --config=configs/chat_sft.py --workdir=runs/chat
  --config.source.path=CHAT.jsonl --config.start.policy=MODEL
  --config.tokenizer=TOKENIZER

Each row of the file: {"messages": [{"role": "user", "content": "..."},
{"role": "model", "content": "..."}, ...]}.
"""

from alignjax.core.lookup import defaults
from configs.base import single


def get_config():
  c = single(defaults('recipes', 'sft'), steps=200, batch_size=8, lr=3e-4)
  c.source = defaults('data', 'sources.chat', length=256)
  return c
