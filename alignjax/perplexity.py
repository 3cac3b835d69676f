"""How well models predict text that they were not trained on.

The loss of every row of a source, read in float32 and summed on the host in
float64. Means are over tokens; their 95% intervals are over rows, as the tokens
of a row are not independent. Nothing here samples.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from alignjax.core.types import Batch, Model, Params
from alignjax.losses.logprob import gather_logp, over_tokens, targets


class Read(NamedTuple):
  """What one model made of some rows.

  Attributes:
    nll: nats of a row's tokens together, [rows].
    tokens: how many of them count, [rows].
  """

  nll: np.ndarray
  tokens: np.ndarray


def reader(model: Model) -> Callable[[Params, Batch], tuple[Any, Any]]:
  """A jitted (parameters, batch) -> nll and tokens of each row, [B]."""
  policy = model.policy('policy')

  @jax.jit
  def read(params, batch):
    bundle = {'policy': params}
    weights = policy.view(bundle, batch)
    features, _ = policy.features(weights, batch)
    tokens, mask = targets(batch)
    logp = over_tokens(gather_logp, [(policy, weights, features)], tokens)
    return -jnp.where(mask, logp, 0.0).sum(-1), mask.sum(-1)

  return read


def everything(
  read: Callable[[Batch], tuple[Any, Any]],
  source: Any,
  advance: Callable[[int, str], None] = lambda done, text: None,
) -> Read:
  """`read` of all rows of a source, in their order; `advance(rows, text)`."""
  rows, size = len(source), source.batch_size
  found = Read(np.zeros(rows), np.zeros(rows, np.int64))
  for begin in range(0, rows, size):
    ids = np.arange(begin, min(begin + size, rows))
    # The last batch is filled up: one shape, one program.
    nll, tokens = read(source.rows(np.resize(ids, size)))
    found.nll[ids] = np.asarray(nll)[: len(ids)]
    found.tokens[ids] = np.asarray(tokens)[: len(ids)]
    so_far = found.nll.sum() / max(found.tokens.sum(), 1)
    advance(begin + len(ids), f'nll {so_far:.3f}')
  return found


def interval(nll: np.ndarray, tokens: np.ndarray) -> dict[str, float]:
  """Nats per token and the normal 95% interval of that ratio over rows.

  Of a difference too: `nll` may be that of two models, row by row.
  """
  total = tokens.sum()
  mean = nll.sum() / total
  # The ratio's error to first order: what each row adds beyond its tokens.
  beyond = nll - mean * tokens
  rows = len(nll)
  error = np.sqrt(rows / (rows - 1) * np.square(beyond).sum()) / total
  return {'mean': mean, 'low': mean - 1.96 * error, 'high': mean + 1.96 * error}


def compare(found: Read, reference: Read) -> dict[str, dict[str, float]]:
  """The row of a model: nats per token, perplexity, nats saved per token.

  'gain' is what the reference needs beyond this model on the same rows; the
  rows' own difficulty cancels, so its interval is the narrower one.
  """
  nll = interval(found.nll, found.tokens)
  return {
    'nll': nll,
    'perplexity': {name: float(np.exp(x)) for name, x in nll.items()},
    'gain': interval(reference.nll - found.nll, found.tokens),
  }
