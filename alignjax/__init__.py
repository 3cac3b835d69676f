"""alignjax: alignment methods for Gemma-class models, on one training loop.

import alignjax as aj
model = aj.load('path')                 # .config .params .tokenizer
logits = aj.apply(model, tokens)        # [B, T, V] float32
texts = aj.sample(model, prompts, max_new_tokens=64, key=key)
aj.save(model, 'other')
merged = aj.merge('slerp', base=params0, models=[params1, params2], t=0.5)
"""

from typing import Any


def __getattr__(name: str) -> Any:
  # On first use, so that `alignjax --help` does not import JAX.
  if name in ('load', 'apply', 'sample', 'save'):
    from alignjax import api

    return getattr(api, name)
  if name == 'merge':
    import alignjax.merge as room

    return room  # the package can be called
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
