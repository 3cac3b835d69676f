"""A deferred merge made on a mesh: under jit, each device with its part.

Leaves are read by `deferred`, one at a time, and merged where they will live.
"""

import functools
import json
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from alignjax.core import naming, tree
from alignjax.core.errors import UserError
from alignjax.interop.opened import Opened
from alignjax.merge import memory
from alignjax.merge.deferred import reader
from alignjax.system import mesh as meshes


def onto(
  model: Opened,
  layout: Callable[[Any], Any],
  table: meshes.Table,
  mesh: jax.sharding.Mesh,
) -> Any:
  """The leaves of a merge on a mesh, placed by a table, as `layout` has them.

  On the devices are at once the result so far and one leaf of every model that
  it is made of; the host holds one leaf of one model.

  Args:
    model: of `opened`.
    layout: canonical tree -> the tree that is wanted, whose leaves are those,
      or stacked ones of them, under the names of `core.tree`.
    table, mesh: where leaves live.
  """
  canonical = naming.nested(
    {
      name: jax.ShapeDtypeStruct(spec.shape, spec.dtype)
      for name, spec in model.leaves.items()
    }
  )
  own = tree.named(meshes.shardings(canonical, table, mesh))
  shapes = jax.eval_shape(layout, canonical)
  places = tree.named(meshes.shardings(shapes, table, mesh))
  read = reader(model, lambda name, x: meshes.put(x, own[name]), _merged)
  out = {}
  for leaf, names in tree.canonical_names(shapes).items():
    spec, place = tree.named(shapes)[leaf], places[leaf]
    if len(spec.shape) == len(model.leaves[names[0]].shape):
      out[leaf] = read(names[0])
      continue
    # Layer by layer into their place: a stack would hold all of them twice.
    empty = functools.partial(jnp.zeros, spec.shape, spec.dtype)
    out[leaf] = jax.jit(empty, out_shardings=place)()
    fill = jax.jit(_filled, out_shardings=place, donate_argnums=0)
    for at, name in enumerate(names):
      out[leaf] = fill(out[leaf], read(name), at)
  return naming.nested(out)


def _filled(stack: jax.Array, layer: jax.Array, at: Any) -> jax.Array:
  return jax.lax.dynamic_update_index_in_dim(stack, layer, at, 0)


def _merged() -> tuple[Callable[..., Any], Callable[..., Any]]:
  """Compiled once for the leaves of one kind, whatever their layer."""
  programs: dict[Any, Any] = {}

  def kind(how, name):
    # What a random method draws depends on the whole name.
    return name if how.random else re.sub(r'layer_\d+', 'layer_0', name)

  def total(how, name, base, models):
    key = 'total', kind(how, name), base.shape
    if key not in programs:
      measure = functools.partial(memory.far_total, how, key[1])
      programs[key] = jax.jit(measure, out_shardings=_everywhere(base))
    return programs[key](base, models)

  def leaf(how, name, base, models, numbers, total, dtype):
    said = json.dumps(numbers, sort_keys=True)
    key = 'leaf', kind(how, name), base.shape, said

    def run(base, models, total):
      out = memory.far_leaf(how, key[1], base, models, numbers, total, dtype)
      return out, jnp.isfinite(out).all()

    if key not in programs:
      places = base.sharding, _everywhere(base)
      programs[key] = jax.jit(run, out_shardings=places)
    out, finite = programs[key](base, models, total)
    if not finite:
      raise UserError(
        f'leaf {name!r} has NaN or infinite weights in one of the inputs'
      )
    return out

  return total, leaf


def _everywhere(like: jax.Array) -> NamedSharding:
  """Where every host can look at a number that comes of such an array."""
  assert isinstance(like.sharding, NamedSharding)
  return NamedSharding(like.sharding.mesh, PartitionSpec())
