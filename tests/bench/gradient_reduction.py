"""What it costs to add up gradients of chips in bfloat16.

  python tests/bench/gradient_reduction.py [--chips 64 --ring 16]

Layer weights are used in bfloat16, so every chip's gradient of them comes out
in bfloat16, and on a pod a ring adds them up in that dtype: `ring` chips one
after the other, then the sums of the rings. Here each chip's gradient is
computed by itself, and the same numbers are added in that order in bfloat16
and in float32. Errors are norms of differences over norms, per leaf, against
the mean of float32 gradients of a float32 model. The CPU's own collectives
would not show it: they add bfloat16 in float32.
"""

import argparse
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from alignjax.core import tree
from alignjax.models import decoder
from alignjax.models.gemma import gemma


def gradients(config, params, rows):
  """One chip's gradient of its mean loss, for every chip: float32 trees."""

  def loss(params, tokens):
    logits = decoder.apply(config, params, tokens[None, :-1])
    picked = jnp.take_along_axis(
      jax.nn.log_softmax(logits), tokens[None, 1:, None], axis=-1
    )
    return -jnp.mean(picked)

  one = jax.jit(jax.grad(loss))
  return [jax.device_get(tree.named(one(params, row))) for row in rows]


def ring_sum(parts, ring, dtype):
  """Sums within rings, then of rings, every partial sum rounded to `dtype`."""

  def add(parts):
    return functools.reduce(lambda a, b: (a + b).astype(dtype), parts)

  parts = [jnp.asarray(x, dtype) for x in parts]
  return add([add(parts[i : i + ring]) for i in range(0, len(parts), ring)])


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--chips', type=int, default=64)
  parser.add_argument('--ring', type=int, default=16)
  parser.add_argument('--length', type=int, default=256)
  options = parser.parse_args()
  config = gemma(
    vocab_size=512, width=256, hidden=512, layers=4, heads=4, window=64
  )
  narrow = dataclasses.replace(config, dtype='bfloat16')
  params = decoder.init(config, jax.random.key(0))
  # A skewed vocabulary: gradients of rows agree in part, as those of text do.
  shape = (options.chips, options.length)
  rows = jax.random.categorical(
    jax.random.key(1), -jnp.log(1.0 + jnp.arange(512)), shape=shape
  )
  exact = gradients(config, params, rows)
  parts = gradients(narrow, params, rows)
  found = {'computed in bfloat16': [], 'and added in bfloat16': []}
  found['adding alone'] = []
  for name in exact[0]:
    if not name.endswith(('/q', '/k', '/v', '/o', '/gate', '/up', '/down')):
      continue  # norms and the embedding are reduced in float32
    mean = sum(np.float64(x[name]) for x in exact)
    wide, thin = (
      np.float64(ring_sum([x[name] for x in parts], options.ring, dtype))
      for dtype in (jnp.float32, jnp.bfloat16)
    )
    size = np.linalg.norm
    found['computed in bfloat16'].append(size(wide - mean) / size(mean))
    found['and added in bfloat16'].append(size(thin - mean) / size(mean))
    found['adding alone'].append(size(thin - wide) / size(wide))
  for what, errors in found.items():
    low, middle, high = np.quantile(errors, [0, 0.5, 1])
    print(f'{what}: median {middle:.2%}, {low:.2%} to {high:.2%} of the norm')


if __name__ == '__main__':
  main()
