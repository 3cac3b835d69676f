"""Fingerprints of arrays: 64 bits that are the same on every mesh.

Each element's bits are mixed with its place in the whole array, and the
results are added modulo 2^32, twice. Addition of integers does not care for
order, so every device adds up the shard that it holds, wherever it lies: no
leaf is gathered, an array split four ways has the fingerprint of a whole one,
and what is compared are the arrays on the devices, not the files they came
from. Any single change is found for certain, since mixing is one to one; others
are missed with a chance of 2^-64. It is no protection against forgery.
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, UInt32

# Odd numbers without pattern (xxHash, MurmurHash), one per axis.
_STRIDES = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F)
_START, _SECOND = 0x165667B1, 0xCC9E2D51


def of(leaves: Mapping[str, jax.Array]) -> dict[str, str]:
  """Sixteen hexadecimal digits by name; waits for the arrays."""
  found = {}
  for name, x in leaves.items():
    # One at a time: programs with collectives that are in flight together may
    # wait for each other on a CPU, whose devices share their threads.
    found[name] = jax.device_get(_compiled(_everywhere(x))(x))
  return {n: f'{int(a):08x}{int(b):08x}' for n, (a, b) in found.items()}


def words(x: Array) -> tuple[UInt32[Array, ''], UInt32[Array, '']]:
  """The fingerprint of one array as two numbers, for use under jit."""
  bits = _bits(x)
  place = jnp.uint32(_START)
  for axis in range(bits.ndim):
    index = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    place += index * jnp.uint32(_STRIDES[axis % 4] + 2 * (axis // 4))
  first = _mixed(bits ^ place)
  second = (first ^ (first >> 15)) * jnp.uint32(_SECOND)
  second = second ^ (second >> 13)
  zero = jnp.uint32(0)
  # Both in one pass: on a CPU, XLA vectorises this reduction and not jnp.sum
  # of integers, which is twenty times slower.
  return jax.lax.reduce(
    (first, second),
    (zero, zero),
    lambda a, b: (a[0] + b[0], a[1] + b[1]),
    range(bits.ndim),
  )


@functools.cache
def _compiled(place: NamedSharding | None):
  return jax.jit(words, out_shardings=place)


def _everywhere(x: jax.Array) -> NamedSharding | None:
  """Every process must be able to read the result."""
  if isinstance(x.sharding, NamedSharding):
    return NamedSharding(x.sharding.mesh, PartitionSpec())
  return None


def _bits(x: Array) -> UInt32[Array, '...']:
  if x.dtype == jnp.bool_:
    return x.astype(jnp.uint32)
  width = min(x.dtype.itemsize, 4)  # eight bytes become a last axis of two
  kind = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[width]
  return jax.lax.bitcast_convert_type(x, kind).astype(jnp.uint32)


def _mixed(x: UInt32[Array, '...']) -> UInt32[Array, '...']:
  """A one-to-one map that spreads every bit (MurmurHash3's finalizer)."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
  return x ^ (x >> 16)
