"""A fixed probe and its logits, computed from files in bounded memory.

Layer by layer in float32: at any time one layer, or the embedding as stored, is
in memory. No whole model, and no comparison: that is the certificate's.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from alignjax.core import naming
from alignjax.interop.opened import Opened
from alignjax.models import decoder
from alignjax.models.config import Config
from alignjax.models.layers import rms_norm

SEED = 20_240_221  # of the probe, the same for every model
LENGTH = 32
DOCUMENT = 20  # length of the first document of the packed row
BOS = 2
ROWS = 8192  # of the embedding, multiplied at a time


class Probe(NamedTuple):
  """Two rows of LENGTH tokens; the second packs two documents."""

  tokens: np.ndarray
  position: np.ndarray
  segment: np.ndarray


def probe(rows: int) -> Probe:
  """The probe of a model with that many rows of embedding."""
  draw = np.random.Generator(np.random.Philox(SEED))
  low = min(BOS + 1, rows - 1)
  tokens = draw.integers(low, rows, (2, LENGTH)).astype(np.int32)
  position = np.tile(np.arange(LENGTH, dtype=np.int32), (2, 1))
  position[1, DOCUMENT:] -= DOCUMENT
  tokens[position == 0] = min(BOS, rows - 1)
  segment = np.ones_like(tokens)
  segment[1, DOCUMENT:] = 2
  return Probe(tokens, position, segment)


def logits(
  model: Opened,
  what: Probe,
  rows: int,
  step: Callable[[str], None] = lambda text: None,
) -> Iterator[np.ndarray]:
  """Float32 logits of the probe, ROWS of the vocabulary at a time."""
  config = dataclasses.replace(
    model.config,
    dtype='float32',
    remat='none',
    attention='plain',
    recurrence='associative',
    vocab_size=rows,
  )
  used, tokens = np.unique(what.tokens, return_inverse=True)
  table = jnp.asarray(model.load('embedding')[used].astype(np.float32))
  x = decoder.embed(config, table, jnp.asarray(tokens.reshape(2, LENGTH)))
  for i in range(config.layers):
    params = {}
    for name in model.leaves:
      if name.startswith(f'layer_{i}/'):
        leaf = model.load(name).astype(np.float32)
        params[name.removeprefix(f'layer_{i}/')] = jnp.asarray(leaf)
    # Layers of a kind are one program: the number in the pattern says which.
    x = _layer(
      config,
      i % len(config.pattern),
      naming.nested(params),
      x,
      what.position,
      what.segment,
    )
    x.block_until_ready()
    del params
    step(f'layer {i} of {model.path.name}')
  x = rms_norm(x, jnp.asarray(model.load('final_norm').astype(np.float32)))
  table = model.load('embedding')
  for start in range(0, rows, ROWS):
    part = table[start : min(start + ROWS, rows)].astype(np.float32)
    yield np.asarray(_unembed(config, jnp.asarray(part), x))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _layer(config: Config, index: int, params, x, position, segment):
  return decoder.layer(config, index, params, x, position, segment)


@functools.partial(jax.jit, static_argnums=0)
def _unembed(config: Config, table, x):
  return decoder.unembed(config, {'embedding': table}, x)
