import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from alignjax.system import fingerprint
from alignjax.system import mesh as meshes


def of(x):
  return fingerprint.of({'x': x})['x']


@pytest.mark.parametrize(
  'axes, spec',
  [
    ({'data': 4}, ('data',)),
    ({'data': 4}, ()),
    ({'fsdp': 2, 'tensor': 2}, ('fsdp', 'tensor')),
    ({'fsdp': 2, 'tensor': 2}, (None, ('tensor', 'fsdp'))),
  ],
)
def test_a_mesh_changes_nothing_and_nothing_is_gathered(axes, spec):
  x = jax.random.normal(jax.random.key(0), (64, 32))
  place = NamedSharding(meshes.make(axes), PartitionSpec(*spec))
  there = jax.device_put(x, place)
  assert of(there) == of(x)
  compiled = fingerprint._compiled(fingerprint._everywhere(there))
  text = compiled.lower(there).compile().as_text()
  assert text is not None
  moved = [line for line in text.splitlines() if ' all-gather(' in line]
  # A number or two per device, never the array.
  assert all('[64' not in line and '[32' not in line for line in moved)
  assert bool(moved) == bool(spec)


@pytest.mark.parametrize('kind', ['float32', 'bfloat16', 'int32', 'uint8'])
def test_every_bit_and_every_place_counts(kind):
  x = np.arange(24).reshape(2, 3, 4).astype(jnp.dtype(kind))
  seen = {of(jnp.asarray(x))}
  raw = x.view(np.uint8).reshape(-1)
  for i in range(raw.size):
    for bit in range(8):
      raw[i] ^= 1 << bit
      seen.add(of(jnp.asarray(x)))
      raw[i] ^= 1 << bit
  assert len(seen) == 1 + 8 * raw.size
  swapped = x.copy()
  swapped[0, 0, 0], swapped[1, 2, 3] = x[1, 2, 3], x[0, 0, 0]
  assert of(jnp.asarray(swapped)) not in seen
  assert of(jnp.asarray(x.reshape(4, 6))) not in seen


def test_changes_that_would_cancel_in_a_sum():
  x = jax.random.normal(jax.random.key(0), (1000,))
  signs = x.at[3].set(-x[3]).at[7].set(-x[7])
  assert of(x) != of(signs)
  assert of(jnp.zeros(8)) != of(jnp.zeros(8).at[2].set(-0.0))
  assert of(jnp.float32(1)) != of(jnp.float32(2))
  assert of(jnp.array([True, False])) != of(jnp.array([False, True]))
