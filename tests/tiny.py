"""The smallest real parts: a byte-level decoder, prompts, rewards."""

import jax
import jax.numpy as jnp
import numpy as np

from alignjax.data.sources import Rows
from alignjax.data.tokenizer import ByteTokenizer
from alignjax.models.gemma import gemma
from alignjax.policies import lm

TOKENS = ByteTokenizer()


def config(**changes):
  numbers = dict(
    family='gemma2',
    vocab_size=272,  # ten rows that the tokenizer does not have
    width=32,
    hidden=48,
    layers=3,
    heads=4,
    kv_heads=2,
    head_dim=8,
    window=8,
    init_std=0.1,
  )
  return gemma(**numbers | changes)


def model(**changes):
  return lm.model(config(**changes), TOKENS)


def prompts(rows=8, width=12, seed=0):
  """Prompts of different lengths, left-padded."""
  rng = np.random.default_rng(seed)
  out = np.zeros((rows, width), np.int32)
  for i, row in enumerate(out):
    length = 2 + (i * 5) % (width - 1)
    row[-length:] = rng.integers(6, 262, length)
    row[-length] = TOKENS.bos
  return out


def prompt_source(batch_size=8, rows=32, seed=0):
  fields = {'prompt': prompts(rows)}
  facts = [{'prompt': str(i)} for i in range(rows)]
  return Rows(fields, facts, batch_size, seed)


def segment_source(batch_size=4, rows=16, documents=4, length=10, seed=0):
  """Pools of segments; a document draws from few tokens of its own."""
  rng = np.random.default_rng(seed)
  shape = (rows, documents, 2, length)
  own = rng.integers(6, 262, (rows, documents, 1, 4))
  tokens = np.take_along_axis(
    np.broadcast_to(own, (*shape[:3], 4)), rng.integers(0, 4, shape), axis=-1
  )
  tokens = tokens.reshape(rows, 2 * documents, length).astype(np.int32)
  lengths = rng.integers(3, length + 1, tokens.shape[:2])
  mask = np.arange(length) < lengths[..., None]
  fields = {'response': np.where(mask, tokens, TOKENS.pad), 'mask': mask}
  return Rows(fields, [{}] * rows, batch_size, seed)


def batch(rows=8, seed=0):
  return {
    'id': jnp.arange(rows, dtype=jnp.int32),
    'prompt': jnp.asarray(prompts(rows, seed=seed)),
  }


def evenness(bundle, batch, key):
  """A reward with a gradient to climb: the share of even tokens."""
  even = (batch['response'] % 2 == 0) & batch['mask']
  score = even.sum(-1) / jnp.maximum(batch['mask'].sum(-1), 1)
  return score[..., None].astype(jnp.float32)


def two(bundle, batch, key):
  """Two rewards: the share of even tokens, and of small ones."""
  small = (batch['response'] < 128) & batch['mask']
  share = small.sum(-1) / jnp.maximum(batch['mask'].sum(-1), 1)
  even = evenness(bundle, batch, key)
  return jnp.concatenate([even, share[..., None].astype(jnp.float32)], axis=-1)


two.names = ('even', 'small')


def bundle(model, *roles, seed=0):
  return {
    role: jax.jit(model.init)(jax.random.key(seed + i))
    for i, role in enumerate(roles)
  }


def check_logits(found, expected) -> None:
  """Equal but for float32 rounding: within 2e-5 of the largest logit.

  It grows with the logits, and depends on the processor: a fused multiply-add
  halves it.
  """
  atol = 2e-5 * float(np.abs(expected).max())
  np.testing.assert_allclose(found, expected, rtol=0, atol=atol)
