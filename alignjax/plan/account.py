"""Facts of a compiled step, added up over its loops.

Matmul FLOPs, the compiler's estimated cycles by kind, wire bytes per mesh axis
and cause, kernels that the compiler cannot see into, and the peak of live
buffers. Everything is read from the text of the module and weighted by trip
counts; step times, peaks of chips and verdicts are made elsewhere.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Mapping

from alignjax.plan import live, loops, origin, wire
from alignjax.plan.hlo import Computation, Instruction, Module
from alignjax.plan.shapes import Shape, leaves

KINDS = ('matmul', 'fusion', 'copy', 'other')
# Opcodes of a fusion that only moves data into another layout.
_LAYOUT = frozenset(
  'parameter constant copy transpose bitcast reshape tuple get-tuple-element'
  ' fusion'.split()
)


@dataclasses.dataclass(frozen=True)
class Collective:
  """Runs of one kind, axis and cause, together.

  Attributes:
    op: all-gather, all-reduce, reduce-scatter, all-to-all, collective-permute
      or send-recv.
    axis: mesh axes joined by '+'.
    size: devices of a group.
    count: runs in a step.
    wire_bytes: per chip and step.
    cause: pass and place, from the op_name.
    in_loop: whether it stands in a loop.
    asynchronous: whether it may overlap with other work.
    dcn: whether it goes between slices.
  """

  op: str
  axis: str
  size: int
  count: float
  wire_bytes: float
  cause: str
  in_loop: bool
  asynchronous: bool
  dcn: bool


@dataclasses.dataclass(frozen=True)
class Kernel:
  """A Pallas kernel: opaque to the compiler's FLOPs and cycles.

  Attributes:
    name: of the kernel.
    count: runs in a step.
    cause: pass and place.
    shapes: of its operands, as HLO writes them.
  """

  name: str
  count: float
  cause: str
  shapes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Account:
  """One step of one chip.

  Attributes:
    flops: of matmuls and convolutions, without kernels.
    cycles: by kind: matmul, fusion, copy, other.
    seconds: all cycles at the clock; no wire, no kernels.
    collectives: dearest first.
    custom_calls: Pallas kernels.
    peak_live_bytes: largest sum of live HBM buffers, arguments included.
    peak: what makes it up; see `live.Peak`.
    copies: dearest copies: (cycles, shape and change of layout, cause).
    unknown_loops: loops counted once because their trip count was not found.
    mesh_axes: size by name, as given.
  """

  flops: float
  cycles: dict[str, float]
  seconds: float
  collectives: tuple[Collective, ...]
  custom_calls: tuple[Kernel, ...]
  peak_live_bytes: int
  peak: live.Peak
  copies: tuple[tuple[float, str, str], ...]
  unknown_loops: tuple[str, ...]
  mesh_axes: dict[str, int]

  @property
  def wire_bytes(self) -> float:
    """Per chip and step over the links inside a slice."""
    return sum(c.wire_bytes for c in self.collectives if not c.dcn)


def account(
  module: Module, *, mesh_axes: Mapping[str, int], clock_hz: float
) -> Account:
  """Adds up a module.

  Args:
    module: parsed, scheduled.
    mesh_axes: size by name, outermost first; slices are outermost.
    clock_hz: turns cycles into seconds.
  """
  flow = loops.flow(module)
  flops = 0.0
  cycles: dict[str, float] = dict.fromkeys(KINDS, 0.0)
  copies: dict[tuple, float] = collections.defaultdict(float)
  kernels: dict[tuple, float] = collections.defaultdict(float)
  for visit in flow.visits:
    computation = module.computations[visit.name]
    for i in computation.instructions:
      flops += visit.weight * matmul_flops(module, computation, i)
      spent = visit.weight * i.estimated_cycles
      if spent:
        kind = kind_of(module, i)
        cycles[kind] += spent
        if kind == 'copy':
          shape = i.type_text.partition('{')[0] + _change(computation, i)
          copies[shape, wire.cause(module, computation, i)] += spent
      if i.opcode == 'custom-call' and i.target == 'tpu_custom_call':
        shapes = tuple(str(s) for s in _operand_shapes(computation, i))
        name = re.sub(r'[.\d]+$', '', i.name)
        kernels[name, wire.cause(module, computation, i), shapes] += (
          visit.weight
        )
  peak = live.peak(module)
  return Account(
    flops=flops,
    cycles=cycles,
    seconds=sum(cycles.values()) / clock_hz,
    collectives=_collectives(flow, mesh_axes),
    custom_calls=tuple(
      Kernel(name, count, why, shapes)
      for (name, why, shapes), count in kernels.items()
    ),
    peak_live_bytes=peak.bytes,
    peak=peak,
    copies=tuple((n, *key) for key, n in _dearest(copies)[:10]),
    unknown_loops=tuple(sorted(flow.unknown)),
    mesh_axes=dict(mesh_axes),
  )


def _change(computation: Computation, i: Instruction) -> str:
  """' {from} to {to}', minor dims first, or ' same layout'; '' unless known."""
  origin = computation.operand(i)
  if origin is None or i.opcode != 'copy':
    return ''
  kinds = [x.type for x in (origin, i)]
  old, new = [
    kind.layout.partition(':')[0] if isinstance(kind, Shape) else ''
    for kind in kinds
  ]
  return ' same layout' if old == new else f' {{{old}}} to {{{new}}}'


def _operand_shapes(computation: Computation, i: Instruction) -> list[str]:
  found = (computation.by_name.get(name) for name in i.operands)
  return [
    f'{s.dtype}[{",".join(map(str, s.dims))}]'
    for x in found
    if x is not None
    for s in leaves(x.type)
  ]


def _collectives(flow, mesh_axes) -> tuple[Collective, ...]:
  counts: dict[tuple, float] = collections.defaultdict(float)
  sent: dict[tuple, float] = collections.defaultdict(float)
  for site in wire.sites(flow, mesh_axes):
    named = site.outer if site.outer.op_name else site.instruction
    within = flow.module.computations[site.visit.name]
    where = within if named is site.outer else site.where
    why = wire.cause(flow.module, where, named)
    if site.op == 'all-gather' and site.instruction.operands:
      found = origin.weight(flow, site.where, site.instruction.operands[0])
      phase = why.partition(':')[0] if ':' in why else 'step'
      why = f'{phase}: {found.short}' if found else why
    key = (site.op, site.axis, site.size, why, bool(site.visit.loops))
    key = (*key, site.asynchronous, site.dcn)
    counts[key] += site.weight
    sent[key] += site.weight * site.wire_bytes
  return tuple(
    Collective(op, axis, size, counts[key], total, why, loop, free, dcn)
    for key, total in _dearest(sent)
    for op, axis, size, why, loop, free, dcn in [key]
  )


def _dearest(of: Mapping[tuple, float]) -> list[tuple[tuple, float]]:
  return sorted(of.items(), key=lambda item: -item[1])


def kind_of(module: Module, i: Instruction) -> str:
  """matmul, copy (layout only), fusion or other."""
  if i.opcode in ('convolution', 'dot'):
    return 'matmul'
  if i.opcode in ('copy', 'transpose', 'copy-start', 'copy-done'):
    return 'copy'
  if i.opcode != 'fusion':
    return 'other'
  codes = _opcodes(module, i.called['calls'][0])
  if codes & {'convolution', 'dot'}:
    return 'matmul'
  if codes <= _LAYOUT and codes & {'copy', 'transpose'}:
    return 'copy'
  return 'fusion'


def _opcodes(module: Module, name: str) -> frozenset[str]:
  found: set[str] = set()
  for i in module.computations[name].instructions:
    found.add(i.opcode)
    if i.opcode in ('fusion', 'call'):
      for names in i.called.values():
        for inner in names:
          found |= _opcodes(module, inner)
  return frozenset(found)


def matmul_flops(
  module: Module, computation: Computation, i: Instruction
) -> float:
  """Of one instruction, fusions opened; loops and calls are 0."""
  if i.opcode == 'fusion':
    return sum(
      matmul_flops(module, module.computations[name], inner)
      for name in i.called.get('calls', ())
      for inner in module.computations[name].instructions
    )
  if i.opcode not in ('convolution', 'dot'):
    return 0.0
  operands = [computation.operand(i, n) for n in (0, 1)]
  shapes = [x.type for x in operands if x is not None]
  if len(shapes) < 2 or not all(isinstance(s, Shape) for s in shapes):
    return 0.0
  left, right = (tuple(s.dims) for s in shapes)  # pyright: ignore
  out = next(leaves(i.type)).dims
  if i.opcode == 'dot':
    contracted = i.attribute('lhs_contracting_dims') or '{}'
    over = [int(n) for n in contracted.strip('{}').split(',') if n]
    return 2.0 * math.prod(out) * math.prod(left[n] for n in over)
  groups = int(i.attribute('batch_group_count') or 1)
  found = re.search(r'window=\{([^}]*)\}', i.head)
  labels = re.search(r'dim_labels=(\w+)_(\w+)->(\w+)', i.head)
  if not labels:
    return 0.0
  window = found[1] if found else ''
  return conv_flops(left, right, out, labels.groups(), window) / groups


def conv_flops(
  left: tuple[int, ...],
  right: tuple[int, ...],
  out: tuple[int, ...],
  labels: tuple[str, ...],
  window: str,
) -> float:
  """FLOPs of a convolution; what falls on padding or holes is not counted.

  The TPU writes a batched matmul as one: the batch is a spatial dim whose
  window touches a single element, so holes are most of it.
  """
  ins, kernel, outs = labels
  total = 2.0 * out[outs.index('b')] * out[outs.index('f')]
  total *= right[kernel.index('i')]
  for n in range(sum(c.isdigit() for c in ins)):
    part = {
      key: value.split('x')[n]
      for key, value in re.findall(r'(\w+)=([\w\-]+)', window)
    }
    low = int(part.get('pad', '0_0').split('_')[0])
    total *= _touched(
      left[ins.index(str(n))],
      right[kernel.index(str(n))],
      out[outs.index(str(n))],
      int(part.get('stride', 1)),
      low,
      int(part.get('lhs_dilate', 1)),
      int(part.get('rhs_dilate', 1)),
    )
  return total


@functools.lru_cache(maxsize=4096)
def _touched(size, kernel, out, stride, low, spread, step) -> int:
  """Pairs (output, tap) along one dim that meet an element of the input."""
  count, end = 0, (size - 1) * spread
  for tap in range(kernel):
    # Outputs o with 0 <= o * stride + at <= end, on a multiple of `spread`.
    at = tap * step - low
    first = max(0, -(at // stride)) if at < 0 else 0
    last = min(out - 1, (end - at) // stride)
    if spread == 1:
      count += max(0, last - first + 1)
    else:
      count += sum(
        (o * stride + at) % spread == 0 for o in range(first, last + 1)
      )
  return count
