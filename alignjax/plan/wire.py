"""Collectives of a module: how often, along which mesh axes, what bytes.

Bytes are what one chip puts on its links for a group of n: all-gather
b(n-1)/n of its result, all-reduce 2b(n-1)/n, reduce-scatter and all-to-all
b(n-1)/n of their operand, a permutation b. The TPU compiler writes a
reduce-scatter as a fusion `%all-reduce-scatter` around an all-reduce, and an
overlapped collective as several fusions with one channel. No times here: those
depend on the links.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from alignjax.plan import loops
from alignjax.plan.hlo import Computation, Instruction, Module
from alignjax.plan.shapes import total_bytes

_KINDS = {
  'all-gather': 'all-gather',
  'all-reduce': 'all-reduce',
  'reduce-scatter': 'reduce-scatter',
  'all-to-all': 'all-to-all',
  'ragged-all-to-all': 'all-to-all',
  'collective-permute': 'collective-permute',
  'collective-broadcast': 'collective-permute',
  'send': 'send-recv',
}
# Words of an op_name that say where JAX is, not where the model is.
_NOISE = re.compile(
  r'jit\([^()]*\)|jvp\(\)|transpose\(jvp\(\)\)|while|body|cond|checkpoint'
  r'|rematted_computation|eval_jaxpr|closed_call|core_call|remat\d*|shard_map'
  r'|custom_[jv][jv]p(_call)?|pjit|scan|branch_\d+_fun'
)
_WRAPPED = re.compile(r'(?:jit|jvp|transpose|vmap|remat\d*)\((.*)\)')


class Site(NamedTuple):
  """One collective in the text, however many fusions it is spread over.

  Attributes:
    op: all-gather, all-reduce, reduce-scatter, all-to-all, collective-permute
      or send-recv.
    axis: mesh axes joined by '+'; '' if the mesh does not explain the groups.
    size: devices of a group.
    weight: how often it runs in a step.
    wire_bytes: per chip and run.
    instruction: the collective.
    where: the computation that the collective stands in.
    outer: the instruction of the control flow: itself or its fusion.
    visit: the run of the computation around `outer`.
    asynchronous: whether other work may run beside it.
    dcn: whether it goes over the network between slices.
  """

  op: str
  axis: str
  size: int
  weight: float
  wire_bytes: float
  instruction: Instruction
  where: Computation
  outer: Instruction
  visit: loops.Visit
  asynchronous: bool
  dcn: bool


def sites(flow: loops.Flow, mesh_axes: Mapping[str, int]) -> Iterator[Site]:
  """Every collective once per computation of the control flow."""
  module, found = flow.module, collectives(flow.module)
  for visit in flow.visits:
    seen = set()
    computation = module.computations[visit.name]
    for outer in computation.instructions:
      for where, i in _inside(module, computation, outer, found):
        op = _op(where, i)
        key = (op, i.channel_id)
        if i.channel_id is not None and key in seen:
          continue
        seen.add(key)
        yield _site(module, mesh_axes, visit, outer, where, i, op)


def collectives(module: Module) -> dict[str, list[Instruction]]:
  """Computation -> the collectives that stand in it."""
  found = {}
  for computation in module.computations.values():
    inside = [i for i in computation.instructions if _base(i) in _KINDS]
    found[computation.name] = inside
  return found


def _inside(module, computation, outer, found):
  """Collectives of an instruction, fusions opened: (computation, it)."""
  if _base(outer) in _KINDS:
    yield computation, outer
  elif outer.opcode == 'fusion':
    for name in outer.called.get('calls', ()):
      inner = module.computations[name]
      for i in found[name]:
        yield inner, i
      for i in inner.instructions:
        if i.opcode == 'fusion':
          yield from _inside(module, inner, i, found)


def _base(i: Instruction) -> str:
  return i.opcode.removesuffix('-start')


def _op(where: Computation, i: Instruction) -> str:
  if 'reduce-scatter' in where.name:  # a fusion's `%all-reduce-scatter.1`
    return 'reduce-scatter'
  return _KINDS[_base(i)]


def _site(module, mesh_axes, visit, outer, where, i, op) -> Site:
  operands = [where.operand(i, n) for n in range(len(i.operands))]
  payload = sum(
    total_bytes(x.type) for x in operands if x is not None and x.type != ()
  )
  total = math.prod(mesh_axes.values())
  dcn = op == 'send-recv'
  if dcn:
    size = max(1, total // max(1, module.partitions))
    axis = _outer_axes(mesh_axes, size)
    bytes_ = _dcn_bytes(i, payload, size)
  else:
    size, axis = group(i, mesh_axes)
    bytes_ = wire_bytes(op, payload, size)
  own = 'async' in outer.name or any('async' in n for n in where.name.split())
  return Site(
    op=op,
    axis=axis,
    size=size,
    weight=visit.weight,
    wire_bytes=bytes_,
    instruction=i,
    where=where,
    outer=outer,
    visit=visit,
    asynchronous=dcn or own or i.opcode.endswith('-start'),
    dcn=dcn,
  )


def wire_bytes(op: str, payload: float, n: int) -> float:
  """Bytes that a chip sends, from the bytes of its operand."""
  if n <= 1 and op != 'collective-permute':
    return 0.0
  factor = {
    'all-gather': n - 1,
    'all-reduce': 2 * (n - 1) / n,
    'reduce-scatter': (n - 1) / n,
    'all-to-all': (n - 1) / n,
    'collective-permute': 1,
  }
  return payload * factor[op]


def _dcn_bytes(i: Instruction, payload: float, n: int) -> float:
  """A send carries one collective between slices; its text says which."""
  found = re.search(r'_xla_megascale_transfer_type="([A-Z_]+)"', i.text)
  op = found[1].lower().replace('_', '-') if found else 'collective-permute'
  known = op in ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all')
  return wire_bytes(op if known else 'collective-permute', payload, n)


def group(i: Instruction, mesh_axes: Mapping[str, int]) -> tuple[int, str]:
  """Devices of a group and the mesh axes along which they differ.

  Ids count along the mesh, last axis fastest; a program of one slice counts
  from 0 in each, and slices are outermost.
  """
  shape = tuple(mesh_axes.values())
  total = math.prod(shape)
  groups = i.groups
  if not groups:
    return total, '+'.join(k for k, n in mesh_axes.items() if n > 1)
  ids = np.asarray(groups if _base(i) == 'collective-permute' else groups[:1])
  size = len(groups[0])
  if ids.max(initial=0) >= total:
    return size, ''
  coordinates = np.unravel_index(ids, shape)
  axes = [
    name
    for name, along in zip(mesh_axes, coordinates)
    if (along != along[:, :1]).any()
  ]
  if _base(i) == 'collective-permute':  # pairs, of a ring along the axes
    size = math.prod(mesh_axes[name] for name in axes)
  return size, '+'.join(axes)


def _outer_axes(mesh_axes: Mapping[str, int], slices: int) -> str:
  """The outermost axes that make up the slices."""
  names, left = [], slices
  for name, size in mesh_axes.items():
    if left > 1 and size > 1:
      names.append(name)
      left //= math.gcd(left, size)
  return '+'.join(names)


def cause(module: Module, computation: Computation, i: Instruction) -> str:
  """'remat: mlp/dot_general': which pass, and where in the model.

  Looks into a fusion, then at what an instruction without a name reads, then
  at who reads it.
  """
  for near in (_operands, _users):
    seen, queue = {i.name}, [i]
    for item in queue:
      if name := _op_name(module, item):
        return short(name)
      for other in near(computation, item):
        if other.name not in seen and len(queue) < 24:
          seen.add(other.name)
          queue.append(other)
  return 'unnamed'


def _operands(computation: Computation, i: Instruction) -> list[Instruction]:
  found = (computation.by_name.get(name) for name in i.operands)
  return [x for x in found if x is not None]


def _users(computation: Computation, i: Instruction) -> list[Instruction]:
  return computation.users.get(i.name, [])


def _op_name(module: Module, i: Instruction) -> str:
  if i.op_name or i.opcode != 'fusion':
    return i.op_name
  inside = module.computations[i.called['calls'][0]].instructions
  return next((x.op_name for x in reversed(inside) if x.op_name), '')


def short(op_name: str) -> str:
  """An op_name without JAX's own words, the pass in front."""
  phase = 'forward' if 'jvp(' in op_name else 'step'
  if 'rematted_computation' in op_name or '/remat' in op_name:
    phase = 'remat'
  elif 'transpose(' in op_name:
    phase = 'backward'
  words, word = [], ''
  for word in op_name.replace('\\', '').split('/'):
    while not _NOISE.fullmatch(word) and (found := _WRAPPED.fullmatch(word)):
      word = found[1]
    if word and not _NOISE.fullmatch(word):
      words.append(word)
  return f'{phase}: {"/".join(words) or word}'
