"""The jitted functions of a run, with shapes where a run has arrays.

What is planned must be what runs: the step is the one that `alignjax.train`
compiles, the rollout is the recipe's own stage, and arguments carry the
shardings that the mesh gives them. Allocates nothing, reads no data, and
compiles nothing.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.extend
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec

from alignjax import train
from alignjax.core.errors import UserError
from alignjax.core.types import Batch, Recipe, TrainState
from alignjax.models import decoder
from alignjax.models.config import Config
from alignjax.step import init_state
from alignjax.system import mesh as meshes


class Program(NamedTuple):
  """One compiled function of a run.

  Attributes:
    name: 'train', 'rollout', or 'stage' and the fields that it adds.
    fn: jitted.
    args: what it is called with: shapes, dtypes, shardings.
    arguments: kind -> bytes of `args` on one device, exact before padding.
    resident: kind -> bytes on the device beside the arguments.
    cache: bytes of key-value caches on one device, inside the temporaries.
    rows, length: sequences and positions of each, over all devices.
    new: positions of `length` that are sampled.
    count: calls in a step.
  """

  name: str
  fn: Callable[..., Any]
  args: tuple[Any, ...]
  arguments: dict[str, int]
  resident: dict[str, int]
  cache: int
  rows: int
  length: int
  new: int = 0
  count: int = 1


def abstract_mesh(axes: Mapping[str, int], devices: int) -> AbstractMesh:
  """The mesh of `meshes.make` without devices: for shapes, not programs."""
  sizes = dict(axes) or {'data': -1}
  if unknown := [name for name in sizes if name not in meshes.AXES]:
    raise UserError(
      f'mesh: no axis {unknown[0]!r}; known axes: {list(meshes.AXES)}'
    )
  known = math.prod(size for size in sizes.values() if size != -1)
  free = [name for name, size in sizes.items() if size == -1]
  if len(free) > 1 or devices % known or (not free and known != devices):
    raise UserError(
      f'mesh: {dict(axes)} does not fill the {devices} devices of the topology'
    )
  for name in free:
    sizes[name] = devices // known
  return AbstractMesh(
    tuple(sizes.values()),
    tuple(sizes),
    axis_types=(AxisType.Auto,) * len(sizes),
  )


def state(
  recipe: Recipe,
  tx: optax.GradientTransformation,
  start: Mapping[str, Any],
  mesh: Any,
  table: meshes.Table,
) -> TrainState:
  """The state before the first step, as shapes with shardings.

  `start` keeps only its '@role' entries: what a path holds, or a merge gives,
  has the shapes of the recipe's own initialiser. Raises UserError, naming leaf
  and axis, where the mesh does not divide a dimension.
  """
  copies = {
    role: origin
    for role, origin in start.items()
    if isinstance(origin, str) and origin.startswith('@')
  }
  return init_state(
    recipe, tx, 0, start=copies, mesh=mesh, table=table, abstract=True
  )


def placed(shapes: Any, shardings: Any) -> Any:
  """Shapes that carry shardings."""
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    shapes,
    shardings,
  )


def device_bytes(pytree: Any) -> int:
  """Bytes of placed shapes on one device, without the padding of tiles."""
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * _itemsize(x)
    for x in jax.tree.leaves(pytree)
  )


def _itemsize(x) -> int:
  if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
    return 8
  return x.dtype.itemsize


def programs(
  recipe: Recipe,
  tx: optax.GradientTransformation,
  state: TrainState,
  batch: Mapping[str, Any],
  schedule: train.Schedule,
  mesh: Mesh | AbstractMesh,
  config: Config,
  *,
  which: str = 'all',
) -> list[Program]:
  """The programs of one step of the run, in the order in which they run.

  Args:
    state: of `state`.
    batch: of `batch.source_batch`.
    config: of the decoder.
    which: 'train', 'rollout', or 'all', which adds the stages between them.

  Raises:
    UserError: the recipe has no rollout; a stage cannot be traced or run.
  """
  key = placed(
    jax.eval_shape(lambda: jax.random.key(0)), NamedSharding(mesh, Spec())
  )
  bundle = {**state.params, **state.frozen}
  found, fields = [], dict(batch)
  for stage in recipe.stages:
    args = (bundle, _on_rows(fields, mesh), key)
    with using(mesh):
      after, calls = _traced(stage, args, mesh)
    new = sorted(set(after) - set(fields))
    rollout = 'response' in new
    if which == 'all' or (which == 'rollout' and rollout):
      name = 'rollout' if rollout else f'stage {" ".join(new) or "other"}'
      found += [_stage(name, c, after, state, mesh, config) for c in calls]
    fields = after
  if which == 'rollout' and not found:
    raise UserError('recipe: it has no rollout, so plan --step train')
  if which != 'rollout':
    found.append(_step(recipe, tx, state, fields, schedule, mesh))
  return found


def using(mesh: Mesh | AbstractMesh):
  """The mesh as the one in use, for tracing: its devices can compute nothing.

  `jax.set_mesh` would send to them what a kernel evaluates while traced.
  """
  return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


class _Call(NamedTuple):
  """A jitted function that a stage calls: its jaxpr, arguments, their kinds."""

  jaxpr: Any
  args: tuple[Any, ...]
  kinds: tuple[str, ...]
  count: int


def _traced(stage, args, mesh) -> tuple[dict[str, Any], list[_Call]]:
  """(fields after a stage, the functions in it that multiply matrices).

  A stage that is plain Python calls several; equal calls are counted. What
  only the host can do is run on a row of zeros, for the shapes.
  """
  bare = jax.tree.map(_bare, args)
  try:
    closed, after = jax.make_jaxpr(stage, return_shape=True)(*bare)
  except (jax.errors.JAXTypeError, AttributeError, KeyError):
    return _hosted(stage, args[1]), []
  roles = [
    f'role {role}' for role in sorted(args[0]) for _ in _leaves(args[0][role])
  ]
  kinds = [*roles, *['batch' for _ in _leaves(args[1:])]]
  known = dict(zip(map(id, closed.jaxpr.invars), zip(_leaves(args), kinds)))
  found: dict[str, _Call] = {}
  for eqn in closed.jaxpr.eqns:
    if eqn.primitive.name not in ('jit', 'pjit') or not _multiplies(eqn):
      continue
    inner = eqn.params['jaxpr']
    read = {id(v) for e in inner.eqns for v in e.invars}
    read |= {id(v) for v in inner.jaxpr.outvars}
    values, what = [], []
    for outer, v in zip(eqn.invars, inner.jaxpr.invars):
      value, kind = known.get(id(outer), (None, 'batch'))
      if value is None:  # what another call made
        value = _on_rows({'': _bare(v.aval)}, mesh)['']
      values.append(value)
      # jit drops what is not read, so it takes no memory as an argument.
      what.append(kind if id(v) in read else '')
    key = f'{eqn.params["name"]} {[str(v.aval) for v in inner.jaxpr.invars]}'
    count = found[key].count + 1 if key in found else 1
    found[key] = _Call(inner, tuple(values), tuple(what), count)
  return dict(after), list(found.values())


def _leaves(pytree) -> list[Any]:
  return jax.tree.leaves(pytree)


def _multiplies(eqn) -> bool:
  """Whether a matrix product is anywhere inside."""
  if eqn.primitive.name == 'dot_general':
    return True
  return any(
    _multiplies(inner)
    for value in eqn.params.values()
    for part in (value if isinstance(value, tuple | list) else (value,))
    for inner in getattr(getattr(part, 'jaxpr', part), 'eqns', ())
  )


def _hosted(stage, fields) -> dict[str, Any]:
  """Shapes after a stage of the host."""
  row = {k: jnp.zeros((1, *x.shape[1:]), x.dtype) for k, x in fields.items()}
  try:
    after = stage({}, row, jax.random.key(0))
  except Exception as error:
    raise UserError(
      'a stage of the recipe can be neither traced nor run on a row of zeros, '
      f'so that what it adds is not known: {type(error).__name__}: {error}'
    ) from error
  rows = fields['id'].shape[0]
  return {
    k: jax.ShapeDtypeStruct((rows, *jnp.shape(x)[1:]), jnp.asarray(x).dtype)
    for k, x in after.items()
  }


def _on_rows(fields, mesh) -> Batch:
  place = meshes.rows(mesh)
  return placed(dict(fields), {name: place for name in fields})


def _stage(name, call: _Call, after, state, mesh, config) -> Program:
  rows, count, length = after['response'].shape
  rows = rows * count // call.count
  width = after['prompt'].shape[1]
  cache = 0
  if name == 'rollout':
    shapes = jax.eval_shape(
      lambda: decoder.empty_cache(config, rows, width + length)
    )
    # Rows of a cache live where the rows of a batch do.
    cache = sum(x.size * _itemsize(x) for x in _leaves(shapes)) // _ways(mesh)
  kinds = ('parameters', 'frozen', 'optimizer', 'batch')
  arguments: dict[str, int] = {kind: 0 for kind in kinds}
  for x, kind in zip(call.args, call.kinds):
    if kind.startswith('role '):
      trained = kind.removeprefix('role ') in state.params
      kind = 'parameters' if trained else 'frozen'
    if kind:
      arguments[kind] += device_bytes(x)
  resident = {
    'parameters': device_bytes(state.params) - arguments['parameters'],
    'frozen': device_bytes(state.frozen) - arguments['frozen'],
    'optimizer': device_bytes([state.opt_state, state.step, state.skipped]),
  }
  return Program(
    name=name,
    fn=jax.jit(jax.extend.core.jaxpr_as_fun(call.jaxpr)),
    args=call.args,
    arguments=arguments,
    resident={k: x for k, x in resident.items() if x},
    cache=cache,
    rows=rows,
    length=width + length,
    new=length if name == 'rollout' else 0,
    count=call.count,
  )


def _bare(x):
  """Shape and dtype without a place."""
  return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _step(recipe, tx, state, fields, schedule, mesh) -> Program:
  batch = _on_rows(fields, mesh)
  if 'response' in fields:
    rows, count, length = fields['response'].shape
    rows, length = rows * count, length + fields['prompt'].shape[1]
  else:
    rows, length = fields['tokens'].shape
  return Program(
    name='train',
    fn=train.compiled(recipe, tx, schedule, state),
    args=(state, batch),
    arguments=_step_bytes(state, batch),
    resident={},
    cache=0,
    rows=rows,
    length=length,
  )


def _step_bytes(state: TrainState, batch: Batch) -> dict[str, int]:
  return {
    'parameters': device_bytes(state.params),
    'frozen': device_bytes(state.frozen),
    # With the two counters of the state.
    'optimizer': device_bytes([state.opt_state, state.step, state.skipped]),
    'batch': device_bytes(batch),
  }


def elsewhere(step: Program, mesh: Any, table: meshes.Table) -> Program:
  """The arguments of a training step on another mesh, to be counted only.

  Traces nothing. Raises UserError where the mesh does not divide a leaf.
  """
  state, batch = step.args
  state = placed(state, meshes.shardings(state, table, mesh))
  batch = _on_rows(batch, mesh)
  arguments = _step_bytes(state, batch)
  return step._replace(args=(state, batch), arguments=arguments)


def _ways(mesh) -> int:
  """Devices over which rows are spread."""
  spec = meshes.rows(mesh).shard_shape((mesh.size,))
  return mesh.size // spec[0]
