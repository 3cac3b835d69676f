"""What the configs of single online runs share: numbers and names, no wiring.

A config program imports it by path (`from configs.base import online`), so run
`alignjax` in the folder that holds `configs/`, or copy this file.
"""

from ml_collections import ConfigDict

from alignjax.core.lookup import defaults


def online(recipe: ConfigDict, *, steps: int, lr: float) -> ConfigDict:
  """An online run of `recipe` on prompts cut from text."""
  c = ConfigDict()
  c.seed = 0
  c.tokenizer = ''
  c.mesh = ConfigDict({'data': -1})
  c.model = defaults(
    'models',
    'gemma',
    vocab_size=1536,
    width=160,
    hidden=384,
    layers=4,
    heads=4,
    kv_heads=2,
    head_dim=40,
    window=32,
    unroll=2,
  )
  c.start = ConfigDict({'policy': ''})
  c.source = defaults('data', 'sources.prompts', prompt_tokens=32)
  c.reward = defaults('rewards', 'verify.python_code')
  c.recipe = recipe
  c.optimizer = defaults('system', 'optimizer', lr=lr, warmup_steps=10)
  c.steps = steps
  c.batch_size = 32
  c.microbatches = 1
  c.log_every = 1
  c.save_every = 20
  c.keep = 2
  c.max_bad_steps = 5
  return c
