"""What the planned runs share: a released shape, packed text, Adam."""

from ml_collections import ConfigDict

from alignjax.core.lookup import defaults
from configs.base import single


def sft(shape: str, *, rows: int, mesh: dict[str, int], remat: str = 'full'):
  """Fine-tuning of a released model on `rows` rows of 4096 tokens a step."""
  c = single(defaults('recipes', 'sft'), steps=1000, batch_size=rows, lr=1e-5)
  c.tokenizer = 'tokenizer.model'
  c.model = defaults(
    'models', 'preset', shape=shape, dtype='bfloat16', remat=remat
  )
  c.mesh = ConfigDict(mesh)
  c.source = defaults('data', 'sources.text', length=4096)
  return c
