"""Norm, rotary embedding and gated feed-forward: maths and one Linen module.

Follows Gemma (arXiv 2403.08295), Gemma 2 (arXiv 2408.00118) and Griffin
(arXiv 2402.19427). Norms and rotary angles are float32 whatever the compute
dtype.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from alignjax.kernels.dense import geglu, linear, linear_turned

EPSILON = 1e-6


def rms_norm(
  x: Float[Array, '... D'], scale: Float[Array, ' D']
) -> Float[Array, '... D']:
  """x / rms(x) * (1 + scale), computed in float32, returned in x's dtype."""
  x32 = x.astype(jnp.float32)
  variance = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
  normed = x32 * jax.lax.rsqrt(variance + EPSILON)
  return (normed * (1 + scale.astype(jnp.float32))).astype(x.dtype)


def unit(x: Float[Array, '... D']) -> Float[Array, '... D']:
  """x / |x|, with zeros left as they are."""
  square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
  return x * jax.lax.rsqrt(jnp.maximum(square, 1e-12))


def rope(
  x: Float[Array, 'B T H h'],
  position: Int[Array, 'B T'],
  *,
  base: float,
  scale: float = 1.0,
  fraction: float = 1.0,
) -> Float[Array, 'B T H h']:
  """Rotary embedding of the leading `fraction` of h.

  Pairs are (i, i + r/2) of the r rotating channels; angles are divided by
  `scale`.
  """
  rotating = int(x.shape[-1] * fraction)
  half = rotating // 2
  timescale = base ** (jnp.arange(half, dtype=jnp.float32) / half)
  angle = position.astype(jnp.float32)[..., None, None] / timescale / scale
  sin, cos = jnp.sin(angle), jnp.cos(angle)
  a = x[..., :half].astype(jnp.float32)
  b = x[..., half:rotating].astype(jnp.float32)
  rotated = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
  rotated = rotated.astype(x.dtype)
  if rotating == x.shape[-1]:
    return rotated
  return jnp.concatenate([rotated, x[..., rotating:]], axis=-1)


def normal(config: Any, fan_in: int, gain: float = 1.0):
  """Initialiser of one matrix: `init_std`, or sqrt(gain / fan_in) (Griffin)."""
  griffin = config.init == 'griffin'
  return nn.initializers.normal(
    (gain / fan_in) ** 0.5 if griffin else config.init_std
  )


def project(
  module: nn.Module,
  name: str,
  x: Float[Array, 'B T *inputs'],
  init: Any,
  outputs: tuple[int, ...],
) -> Float[Array, 'B T *outputs']:
  """x through the linear map `name` of a module, [*inputs, *outputs].

  A module that has it among its `turned` maps holds it as [*outputs, *inputs],
  which is how a decode step reads it fastest (`decoder.turned`).
  """
  inputs = x.shape[2:]
  if name in module.turned:  # pyright: ignore
    w = module.param(name, init, (*outputs, *inputs))
    flat = x.reshape(*x.shape[:2], -1)
    out = linear_turned(flat, w.reshape(-1, flat.shape[-1]))
    return out.reshape(*x.shape[:2], *outputs)
  w = module.param(name, init, (*inputs, *outputs))
  return linear(x, w, len(inputs))


class FeedForward(nn.Module):
  """GeGLU with the tanh approximation: (gelu(x gate) * (x up)) down.

  `config` is a decoder `Config`; with `config.bias` each map has a bias.
  """

  config: Any
  turned: tuple[str, ...] = ()

  @nn.compact
  def __call__(self, x: Float[Array, 'B T D']) -> Float[Array, 'B T D']:
    c = self.config
    # Griffin draws gate and up as one array, whose leading 2 counts as fan-in.
    wide = normal(c, 2 * c.width)
    gate = checkpoint_name(project(self, 'gate', x, wide, (c.hidden,)), 'gate')
    up = checkpoint_name(project(self, 'up', x, wide, (c.hidden,)), 'up')
    if c.bias:
      zeros = nn.initializers.zeros
      gate += self.param('gate_bias', zeros, (c.hidden,))
      up += self.param('up_bias', zeros, (c.hidden,))
    narrow = normal(c, c.hidden, gain=2 / c.layers)
    out = project(self, 'down', geglu(gate, up), narrow, (c.width,))
    if c.bias:
      out += self.param('down_bias', nn.initializers.zeros, (c.width,))
    return out
