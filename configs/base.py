"""What the configs of single runs share: numbers and names, no wiring.

Config programs import it (`from configs.base import single`), so run
`alignjax` in the folder that holds `configs/`, or copy this file.
"""

from ml_collections import ConfigDict

from alignjax.core.lookup import defaults


def single(
  recipe: ConfigDict, *, steps: int, batch_size: int, lr: float
) -> ConfigDict:
  """One run of `recipe` from the model `start.policy`; add a source."""
  c = ConfigDict()
  c.seed = 0
  c.tokenizer = ''
  c.mesh = ConfigDict({'data': -1})
  c.model = ConfigDict({'name': 'start'})  # the shape of start.policy
  c.start = ConfigDict({'policy': ''})
  c.recipe = recipe
  c.optimizer = defaults('system', 'optimizer', lr=lr, warmup_steps=10)
  c.steps = steps
  c.batch_size = batch_size
  c.microbatches = 1
  c.log_every = 1
  c.save_every = 20
  c.keep = 2
  c.max_bad_steps = 5
  c.verify_every = 0
  return c


def online(recipe: ConfigDict, *, steps: int, lr: float) -> ConfigDict:
  """An online run on prompts cut from text, rewarded by Python's parser."""
  c = single(recipe, steps=steps, batch_size=32, lr=lr)
  c.source = defaults('data', 'sources.prompts', prompt_tokens=32)
  c.reward = defaults('rewards', 'verify.python_code')
  return c
