"""Where arrays live inside a program: dimensions to axes of the mesh in use.

The mesh is the one that `jax.set_mesh` made current; without one, and on a
single device, everything here is the identity. Models say which dimension is
which by the names below, and no more: the compiler places the rest. Tables of
parameters belong to the models, meshes to `system.mesh`.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec

# What a dimension is called -> mesh axes that split it. ROWS of a batch are
# split over both data-like axes; the vocabulary of logits over what is left
# when rows keep 'data' only.
ROWS = ('data', 'fsdp')
COLUMNS = 'seq'
HEADS = 'tensor'
HIDDEN = 'tensor'
VOCABULARY = ('fsdp', 'tensor')

Axes = str | tuple[str, ...] | None
Spec = tuple[Axes, ...]


def mesh() -> Any:
  """The current mesh, None if there is none or nothing to split."""
  current = jax.sharding.get_abstract_mesh()
  return None if current.empty or current.size == 1 else current


def present(spec: Sequence[Axes], shape: Sequence[int], sizes: Any) -> Spec:
  """`spec` without axes that the mesh lacks; a dimension of 1 is never split.

  Args:
    spec: axes of every dimension.
    shape: of the array.
    sizes: mesh axis -> size.
  """

  def axes(entry: Axes, size: int) -> Axes:
    kept = tuple(a for a in names(entry) if sizes.get(a, 1) > 1 and size > 1)
    return kept[0] if len(kept) == 1 else kept or None

  return tuple(axes(entry, size) for entry, size in zip(spec, shape))


def names(entry: Axes) -> tuple[str, ...]:
  """The axes of one dimension."""
  return (entry,) if isinstance(entry, str) else entry or ()


def ways(entry: Axes, sizes: Any) -> int:
  """Parts into which the axes of one dimension split it."""
  return math.prod(sizes.get(name, 1) for name in names(entry))


def dividing(spec: Sequence[Axes], shape: Sequence[int], sizes: Any) -> Spec:
  """`present`, and without the axes of dimensions that they do not divide."""
  return tuple(
    axes if size % ways(axes, sizes) == 0 else None
    for axes, size in zip(present(spec, shape, sizes), shape)
  )


def split(axis: str) -> bool:
  """Whether the current mesh splits anything over `axis`."""
  current = mesh()
  return current is not None and current.shape.get(axis, 1) > 1


def constrain(x: jax.Array, *dims: Axes) -> jax.Array:
  """`x` placed by the axes of its leading dimensions, where they divide."""
  current = mesh()
  if current is None:
    return x
  spec = (*dims, *[None] * (x.ndim - len(dims)))
  spec = dividing(spec, x.shape, current.shape)
  return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def moved(x: jax.Array, forward: Spec, backward: Spec) -> jax.Array:
  """`x` placed by `forward`, its cotangent by `backward`.

  A plain constraint holds for the cotangent as well, which for gathered
  weights would sum gradients on every chip instead of scattering them.
  """
  del backward
  return constrain(x, *forward)


def _moved_forward(x, forward, backward):
  return moved(x, forward, backward), None


def _moved_backward(forward, backward, saved, g):
  del forward, saved
  return (constrain(g, *backward),)


moved.defvjp(_moved_forward, _moved_backward)


def without(spec: Spec, axis: str) -> Spec:
  """`spec` with `axis` taken from every dimension: gathered over it."""

  return tuple(
    tuple(name for name in names(entry) if name != axis) or None
    for entry in spec
  )
