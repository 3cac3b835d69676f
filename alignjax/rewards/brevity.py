"""Two rewards that pull apart: code that Python accepts, and few tokens.

`python_brevity` is `verify.python_code` with one more score, `brevity`: the
share of the room for tokens that a response leaves, 1 for none, 0 for all. A
score for code grows with what is said, so a policy has to choose.
"""

from typing import Any

import numpy as np

from alignjax.core.types import Batch, Reward, UserError
from alignjax.rewards import verify

NAMES = ('score', *verify.INDICATORS, 'brevity')


def python_brevity(
  tokenizer: verify.Text, *, min_tokens: int = 12, first: str = 'score'
) -> Reward:
  """Scores [B, N, K]: `score`, the hack indicators and `brevity`.

  `first` is the one that methods with one objective optimise.
  """
  if first not in NAMES:
    raise UserError(
      f'reward.first: found {first!r}, expected one of {list(NAMES)}'
    )
  python = verify.python_code(tokenizer, min_tokens=min_tokens)
  names = (first, *(name for name in NAMES if name != first))
  columns = [NAMES.index(name) for name in names]

  def reward(bundle: Any, batch: Batch, key: Any) -> Any:
    code = np.asarray(python(bundle, batch, key), np.float32)
    mask = np.asarray(batch['mask'], np.float32)
    short = 1 - mask.mean(-1, keepdims=True)
    return np.concatenate([code, short], axis=-1)[..., columns]

  reward.names = names
  reward.host = True
  return reward
