"""Norm, rotary embedding and gated feed-forward: maths and one Linen module.

Follows Gemma (arXiv 2403.08295) and Gemma 2 (arXiv 2408.00118). Norms and
rotary angles are float32 whatever the compute dtype.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

EPSILON = 1e-6


def rms_norm(
  x: Float[Array, '... D'], scale: Float[Array, ' D']
) -> Float[Array, '... D']:
  """x / rms(x) * (1 + scale), computed in float32, returned in x's dtype."""
  x32 = x.astype(jnp.float32)
  variance = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
  normed = x32 * jax.lax.rsqrt(variance + EPSILON)
  return (normed * (1 + scale.astype(jnp.float32))).astype(x.dtype)


def rope(
  x: Float[Array, 'B T H h'],
  position: Int[Array, 'B T'],
  *,
  base: float,
  scale: float = 1.0,
) -> Float[Array, 'B T H h']:
  """Rotary embedding on pairs (i, i + h/2); angles divided by `scale`."""
  half = x.shape[-1] // 2
  timescale = base ** (jnp.arange(half, dtype=jnp.float32) / half)
  angle = position.astype(jnp.float32)[..., None, None] / timescale / scale
  sin, cos = jnp.sin(angle), jnp.cos(angle)
  a, b = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
  rotated = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
  return rotated.astype(x.dtype)


class FeedForward(nn.Module):
  """GeGLU with the tanh approximation: (gelu(x gate) * (x up)) down."""

  hidden: int
  init_std: float

  @nn.compact
  def __call__(self, x: Float[Array, 'B T D']) -> Float[Array, 'B T D']:
    width = x.shape[-1]
    init = nn.initializers.normal(self.init_std)
    gate = self.param('gate', init, (width, self.hidden))
    up = self.param('up', init, (width, self.hidden))
    down = self.param('down', init, (self.hidden, width))
    return (jax.nn.gelu(x @ gate, approximate=True) * (x @ up)) @ down
