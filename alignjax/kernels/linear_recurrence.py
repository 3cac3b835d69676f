"""The linear recurrence h_t = a_t h_{t-1} + x_t, per channel, in float32.

'associative' is the meaning, with plain autodiff. The others share one custom
VJP, whose backward pass is the same recurrence run backwards in time and which
saves nothing but `a` and `h`: 'linear' steps through time, 'pallas' is a TPU
kernel. Gates, resets and padding are the model's: a = 0 forgets, and a = 1
with x = 0 leaves the state as it was.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from alignjax.core import placement
from alignjax.core.errors import UserError
from alignjax.kernels import linear_recurrence_pallas as pallas

IMPLEMENTATIONS = ('auto', 'associative', 'linear', 'pallas')


def linear_recurrence(
  x: Float[Array, 'B T E'],
  a: Float[Array, 'B T E'],
  h0: Float[Array, 'B E'] | None = None,
  *,
  implementation: str = 'auto',
) -> tuple[Float[Array, 'B T E'], Float[Array, 'B E']]:
  """All states and the last one, both float32.

  Reverse-mode derivatives only, but for 'associative'. RG-LRU: Griffin, arXiv
  2402.19427, section 2.4 and appendix A.

  Args:
    x: what enters; float32 or bfloat16, as `a`.
    a: what remains of the state, in [0, 1].
    h0: state before the first column; None = zeros.
    implementation: 'auto' goes by the platform that the program is lowered
      for. 'pallas' elsewhere than on a TPU is interpreted, slowly.

  Raises:
    UserError: no implementation has that name.
  """
  if implementation not in IMPLEMENTATIONS:
    raise UserError(
      f'model.recurrence: found {implementation!r}, expected one of '
      f'{list(IMPLEMENTATIONS)}'
    )
  x, a = jnp.asarray(x), jnp.asarray(a)
  if h0 is None:
    h0 = jnp.zeros(x[:, 0].shape, jnp.float32)
  h0 = jnp.asarray(h0, jnp.float32)
  if x.shape[1] == 1:
    # Decoding: nothing to sweep over, and nothing worth a kernel.
    last = a[:, 0].astype(jnp.float32) * h0 + x[:, 0].astype(jnp.float32)
    return last[:, None], last
  if implementation == 'associative':
    return _associative(x, a, h0)
  static = _Static(implementation, str(x.dtype), str(a.dtype))
  return _placed(functools.partial(_recurrence, static), x, a, h0)


def _placed(recurrence, x, a, h0):
  """On a mesh every chip sweeps its own rows and channels."""
  mesh = placement.mesh()
  if mesh is None:
    return recurrence(x, a, h0)
  rows, _, channels = placement.dividing(
    (placement.ROWS, None, placement.HIDDEN), x.shape, mesh.shape
  )
  over, last = (
    PartitionSpec(rows, None, channels),
    PartitionSpec(rows, channels),
  )
  return jax.shard_map(
    recurrence,
    in_specs=(over, over, last),
    out_specs=(over, last),
    check_vma=False,
  )(x, a, h0)


class _Static(NamedTuple):
  """What a program is compiled for."""

  implementation: str
  x_dtype: str
  a_dtype: str


def _associative(x, a, h0):
  """h by doubling: log2(T) passes over everything."""
  a, x = a.astype(jnp.float32), x.astype(jnp.float32)
  x = x.at[:, 0].add(a[:, 0] * h0)

  def then(first, second):
    return first[0] * second[0], second[0] * first[1] + second[1]

  h = jax.lax.associative_scan(then, (a, x), axis=1)[1]
  return h, h[:, -1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _recurrence(static, x, a, h0):
  return _sweep(static.implementation, False, x, a, h0)


def _recurrence_fwd(static, x, a, h0):
  h, last = _sweep(static.implementation, False, x, a, h0)
  return (h, last), (a, h0, h)


def _recurrence_bwd(static, residuals, gradients):
  a, h0, h = residuals
  d_h, d_last = gradients
  # g_t = d_h_t + a_{t+1} g_{t+1}: what reaches h_t, and with it x_t.
  g, d_h0 = _sweep(static.implementation, True, d_h, a, d_last)
  earlier = jnp.concatenate([h0[:, None], h[:, :-1]], axis=1)
  d_a = (g * earlier).astype(static.a_dtype)
  return g.astype(static.x_dtype), d_a, d_h0


_recurrence.defvjp(_recurrence_fwd, _recurrence_bwd)


def _sweep(implementation, reverse, x, a, carry):
  """One pass over time -> (out [B, T, E], carry [B, E]).

  Forwards, out_t = carry = a_t carry + x_t. In reverse the carry is multiplied
  after it was read, out_t = carry + x_t and carry = a_t out_t, so that nobody
  has to shift `a` by one column.
  """
  if implementation == 'linear':
    return _linear(reverse, x, a, carry)
  kernel = functools.partial(pallas.sweep, reverse=reverse)
  if implementation == 'pallas':
    default = functools.partial(kernel, interpret=True)
    return jax.lax.platform_dependent(x, a, carry, tpu=kernel, default=default)
  # A GPU would launch a kernel per column: doubling has log2(T) steps.
  return jax.lax.platform_dependent(
    x,
    a,
    carry,
    cpu=functools.partial(_linear, reverse),
    tpu=kernel,
    default=functools.partial(_doubling, reverse),
  )


def _linear(reverse, x, a, carry):
  """Column by column, each written in place: no transpose, nothing stacked.

  On a CPU two to four times as fast as `lax.scan`, whose columns must lead, and
  more than that next to doubling or parallel chunks.
  """
  length = x.shape[1]

  def column(i, state):
    carry, out = state
    i = length - 1 - i if reverse else i
    x_i, a_i = (
      jax.lax.dynamic_index_in_dim(y, i, axis=1, keepdims=False) for y in (x, a)
    )
    out_i = (carry if reverse else a_i * carry) + x_i
    out = jax.lax.dynamic_update_index_in_dim(out, out_i, i, axis=1)
    return (a_i * out_i if reverse else out_i), out

  out = jnp.zeros(x.shape, jnp.float32)
  carry, out = jax.lax.fori_loop(0, length, column, (carry, out))
  return out, carry


def _doubling(reverse, x, a, carry):
  if not reverse:
    return _associative(x, a, carry)
  # Reversed in time, the first column is multiplied by nothing.
  flipped = jnp.flip(a, axis=1)
  shifted = jnp.pad(
    flipped[:, :-1], ((0, 0), (1, 0), (0, 0)), constant_values=1
  )
  out, last = _associative(jnp.flip(x, axis=1), shifted, carry)
  return jnp.flip(out, axis=1), a[:, 0] * last
