"""Two rewards that pull apart: code that Python accepts, and few tokens.

`python_brevity` is `verify.python_code` with one more score, `brevity`: the
share of the room for tokens that a response leaves, 1 for none, 0 for all. A
score for code grows with what is said, so a policy has to choose.
"""

import numpy as np

from alignjax.core.types import Reward
from alignjax.rewards import verify


def python_brevity(tokenizer: verify.Text, *, min_tokens: int = 12) -> Reward:
  """Scores [B, N, K], named `score`, the hack indicators, and `brevity`."""
  python = verify.python_code(tokenizer, min_tokens=min_tokens)

  def reward(bundle, batch, key):
    code = np.asarray(python(bundle, batch, key), np.float32)
    mask = np.asarray(batch['mask'], np.float32)
    return np.concatenate([code, 1 - mask.mean(-1, keepdims=True)], axis=-1)

  reward.names = ('score', *verify.INDICATORS, 'brevity')
  reward.host = True
  return reward
