"""The recurrent mixer: a gated branch times convolution and RG-LRU.

Griffin (arXiv 2402.19427, section 2.4), with DeepMind's rules for packed rows:
position 0 begins a document, and nothing crosses that line. Padding (position
-1) touches no state. Its memory is a state and a few inputs of fixed size,
whatever the length; it never looks at segments.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from alignjax.kernels.linear_recurrence import linear_recurrence
from alignjax.models.layers import normal, project

LayerCache = dict[str, Any]

# Constant c of the RG-LRU: log a = -c * r * softplus(p).
SHARPNESS = 8.0
# Radii between which a = sigmoid(Lambda) is drawn, uniform in area.
RADII = (0.9, 0.999)
# Below this the slope of the square root is held: at most 1000.
_SMALLEST = 2.5e-7


class Recurrent(nn.Module):
  """Recurrent mixer; `config` is a decoder `Config`."""

  config: Any
  turned: tuple[str, ...] = ()

  @nn.compact
  def __call__(
    self,
    x: Float[Array, 'B T D'],
    position: Int[Array, 'B T'],
    cache: LayerCache | None = None,
  ):
    """-> ([B, T, D], cache). Position -1 marks padding.

    A chunk continues what the cache holds unless it begins at position 0. It
    may be padded on either side, row by row.
    """
    c = self.config
    width, blocks = c.lru_width, c.lru_width // c.heads
    zeros, wide = nn.initializers.zeros, normal(c, c.width)

    def gate(name):
      # The fan-in of Griffin's gates counts all the blocks.
      w = self.param(name, normal(c, width), (c.heads, blocks, blocks))
      return w, self.param(f'{name}_bias', zeros, (c.heads, blocks))

    y = project(self, 'y', x, wide, (width,))
    y = jax.nn.gelu(y + self.param('y_bias', zeros, (width,)), approximate=True)
    u = project(self, 'x', x, wide, (width,))
    u += self.param('x_bias', zeros, (width,))
    taps = normal(c, c.conv_width, gain=0.01)
    u, history = conv(
      u,
      self.param('conv', taps, (c.conv_width, width)),
      self.param('conv_bias', zeros, (width,)),
      position,
      None if cache is None else cache['conv'],
    )
    h, last = rg_lru(
      u,
      gate('input_gate'),
      gate('a_gate'),
      self.param('a_param', decay, (width,)),
      position,
      None if cache is None else cache['h'],
      implementation=c.recurrence,
    )
    narrow = normal(c, width, gain=2 / c.layers)
    x = project(self, 'out', (h * y).astype(x.dtype), narrow, (c.width,))
    x += self.param('out_bias', zeros, (c.width,))
    return x, None if cache is None else {'h': last, 'conv': history}


def empty(config: Any, batch: int) -> LayerCache:
  """A cache that holds nothing: the state and the last inputs of the conv."""
  history = (batch, config.conv_width - 1, config.lru_width)
  return {
    'h': jnp.zeros((batch, config.lru_width), jnp.float32),
    'conv': jnp.zeros(history, config.dtype),
  }


def decay(key, shape, dtype=jnp.float32) -> Float[Array, ' E']:
  """Draws p so that exp(-softplus(p)) is uniform in area between `RADII`.

  Griffin, arXiv 2402.19427, section 2.4.
  """
  low, high = (radius**2 for radius in RADII)
  area = low + (high - low) * jax.random.uniform(key, shape, jnp.float32)
  log_radius = 0.5 * jnp.log(area + 1e-8)
  return jnp.log(jnp.expm1(-log_radius)).astype(dtype)


def conv(
  x: Float[Array, 'B T E'],
  w: Float[Array, 'K E'],
  b: Float[Array, ' E'],
  position: Int[Array, 'B T'],
  history: Float[Array, 'B K-1 E'] | None = None,
):
  """Causal depthwise convolution inside documents; the last tap is the present.

  A tap s steps back counts only where position >= s: documents begin at 0.

  Args:
    x: inputs.
    w, b: taps and bias.
    position: in the document; -1 = padding, before or after a row's tokens.
    history: the K - 1 real inputs before; None = zeros.

  Returns:
    Outputs in x's dtype and the next `history` (None without one).
  """
  reach, length = w.shape[0] - 1, x.shape[1]
  real = position >= 0
  x = jnp.where(real[..., None], x, 0)
  if history is None:
    before = jnp.pad(x, ((0, 0), (reach, 0), (0, 0)))
  else:
    before, history = _continued(history, x.astype(history.dtype), real)
  out = b.astype(jnp.float32)
  for s in range(reach + 1):
    tap = before[:, reach - s : reach - s + length].astype(jnp.float32)
    tap = jnp.where((position >= s)[..., None], tap, 0)
    out = out + tap * w[reach - s].astype(jnp.float32)
  return out.astype(x.dtype), history


def _continued(history, x, real):
  """-> (history and x in one piece [B, K-1+T, E], the last K-1 real inputs).

  History goes straight before the first real token, over padding, so that
  taps need not know about padding.
  """
  length, reach = x.shape[1], history.shape[1]
  if length == 1:
    whole = jnp.concatenate([history, x], axis=1)
    return whole, jnp.where(real[..., None], whole[:, 1:], history)
  some = jnp.any(real, axis=1)
  first = jnp.where(some, jnp.argmax(real, axis=1), length)
  end = jnp.where(some, length - jnp.argmax(real[:, ::-1], axis=1), length)

  def row(history, x, first, end):
    x = jnp.pad(x, ((reach, 0), (0, 0)))
    x = jax.lax.dynamic_update_slice_in_dim(x, history, first, axis=0)
    return x, jax.lax.dynamic_slice_in_dim(x, end, reach, axis=0)

  return jax.vmap(row)(history, x, first, end)


def rg_lru(
  u: Float[Array, 'B T E'],
  input_gate: tuple[Array, Array],
  a_gate: tuple[Array, Array],
  a_param: Float[Array, ' E'],
  position: Int[Array, 'B T'],
  h0: Float[Array, 'B E'] | None = None,
  *,
  implementation: str = 'auto',
) -> tuple[Float[Array, 'B T E'], Float[Array, 'B E']]:
  """States of the real-gated linear recurrent unit, and the last; float32.

  Griffin, arXiv 2402.19427, equations 1 to 4, with p = -Lambda:
  a = exp(-8 r softplus(p)), h_t = a_t h_{t-1} + sqrt(1 - a_t^2) i_t u_t.

  Args:
    u: inputs.
    input_gate, a_gate: (w [H, b, b], bias [H, b]) of the gates i and r.
    a_param: p.
    position: 0 forgets the past, and the input enters whole; -1 (padding)
      leaves the state as it was.
    h0: state before the first column; None = zeros.
    implementation: of `linear_recurrence`.
  """
  i = jax.nn.sigmoid(block_diagonal(u, *input_gate))
  r = jax.nn.sigmoid(block_diagonal(u, *a_gate))
  log_a = -SHARPNESS * r * jax.nn.softplus(a_param.astype(jnp.float32))
  start, padding = (position == 0)[..., None], (position < 0)[..., None]
  a = jnp.where(start, 0, jnp.where(padding, 1, jnp.exp(log_a)))
  # expm1: 1 - exp() has no digits left where a is close to 1.
  enters = sqrt(-jnp.expm1(2 * log_a))
  enters = jnp.where(start, 1, jnp.where(padding, 0, enters))
  x = enters * i * u.astype(jnp.float32)
  return linear_recurrence(x, a, h0, implementation=implementation)


def block_diagonal(
  x: Float[Array, '... E'], w: Float[Array, 'H b b'], bias: Float[Array, 'H b']
) -> Float[Array, '... E']:
  """A linear map of each of H groups of channels; float32 out."""
  # Groups lead: XLA's CPU code has no other such product of bfloat16.
  groups = jnp.moveaxis(x.reshape(-1, *w.shape[:2]), 1, 0)
  out = jnp.einsum(
    'hni,hij->hnj', groups, w, preferred_element_type=jnp.float32
  )
  out = jnp.moveaxis(out, 0, 1) + bias.astype(jnp.float32)
  return out.reshape(x.shape)


@jax.custom_jvp
def sqrt(x: Float[Array, '...']) -> Float[Array, '...']:
  """Square root whose slope is at most 1000, so that a = 1 has a gradient."""
  return jnp.sqrt(x)


@sqrt.defjvp
def _sqrt_jvp(primals, tangents):
  (x,), (dx,) = primals, tangents
  return sqrt(x), dx * 0.5 * jax.lax.rsqrt(jnp.maximum(x, _SMALLEST))
