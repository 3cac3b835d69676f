"""What a compiled step does that a careful reader of its HLO would object to.

Each warning is one sentence: what, where, how much, and what to try. All are
mechanical and read the text, not the model, so they say what the compiler
made, whoever is to blame. Nothing here changes or forbids anything.
"""

import collections
import math
import re
from collections.abc import Iterator

from alignjax.plan import loops, origin, reductions, wire
from alignjax.plan.account import Account, kind_of
from alignjax.plan.hlo import Instruction, Module
from alignjax.plan.shapes import Shape, elements, leaves

# What is not worth a sentence.
_SMALL_BYTES = 2**20
_COPY_SHARE = 0.05
_GATHERS = 2.05  # forward and backward, and some rounding
_KERNEL = re.compile(r'splash|flash|mha|attention', re.IGNORECASE)
_ATTENTION = re.compile(r'attn|attention', re.IGNORECASE)


def lints(
  module: Module, account: Account, *, length: int | None = None
) -> list[str]:
  """Warnings about a module, one sentence each.

  Args:
    module: parsed, scheduled.
    account: of the same module.
    length: positions of a sequence, to know logits of dense attention by;
      without it any large square of a batched matmul is taken for such.
  """
  flow = loops.flow(module)
  sites = [
    s
    for s in wire.sites(flow, account.mesh_axes)
    if s.wire_bytes * s.weight >= _SMALL_BYTES and not s.dcn
  ]
  return [
    *_invariant(flow, sites),
    *_reductions(module, sites),
    *_repeated_gathers(flow, sites),
    *_copies(account),
    *_dense_attention(module, flow, account, length),
    *_unknown_loops(flow, account),
  ]


def _gib(n: float) -> str:
  return f'{n / 2**30:.2f} GiB' if n >= 2**27 else f'{n / 2**20:.0f} MiB'


def _about(module: Module, site: wire.Site) -> str:
  """Where a collective is, for a reader."""
  where = module.computations[site.visit.name]
  return wire.cause(module, where, site.outer)


def _grouped(found: Iterator[tuple[str, wire.Site]]):
  """(what, (runs, bytes)) of sites that would get the same sentence."""
  sums: dict[str, tuple[float, float]] = {}
  for key, site in found:
    runs, sent = sums.get(key, (0.0, 0.0))
    sent += site.weight * site.wire_bytes
    sums[key] = runs + site.weight, sent
  return sorted(sums.items(), key=lambda item: -item[1][1])


def _invariant(flow: loops.Flow, sites) -> Iterator[str]:
  """A collective of what its loop does not change."""

  def found():
    for site in sites:
      inside = site.visit.loops and site.visit.loops[-1] == site.visit.name
      if not inside or site.weight <= 1 or not site.outer.operands:
        continue
      if flow.steady(site.visit.name).issuperset(site.outer.operands):
        about = _about(flow.module, site)
        yield f'{site.op} over {site.axis} ({about})', site

  for what, (runs, sent) in _grouped(found()):
    yield (
      f'{what} moves the same bytes in every iteration of a loop, {runs:.0f}'
      f' times and {_gib(sent)} per step: do it once before the loop, and'
      ' accumulate its gradient locally'
    )


def _reductions(module: Module, sites) -> Iterator[str]:
  """All-reduces that should be something cheaper."""
  sums: dict[tuple[str, str, str], tuple[float, float]] = {}
  for site in sites:
    for part in reductions.parts(module, site):
      key = part.purpose, site.axis, part.cause
      runs, sent = sums.get(key, (0.0, 0.0))
      sent += site.weight * part.wire_bytes
      sums[key] = runs + site.weight, sent
  for (purpose, axis, about), (runs, sent) in sorted(
    sums.items(), key=lambda item: -item[1][1]
  ):
    if sent < _SMALL_BYTES:
      continue
    many = f'over {axis} ({about}), {runs:.0f} times and {_gib(sent)} per step'
    if purpose == 'scatter':
      what = 'gradient all-reduce' if 'backward' in about else 'all-reduce'
      yield (
        f'{what} {many}, of which each device keeps a slice: a reduce-scatter'
        ' would send half; shard rows and weights on a mesh of two axes, such'
        ' as data 4 x fsdp 16'
      )
    elif purpose == 'gather':
      yield (
        f'all-gather {many}, became an all-reduce of zero-padded buffers,'
        ' twice the wire: the topology has no wrap-around along it or shards'
        ' are ragged; gather a leading dimension, or along a narrower axis'
      )


def _repeated_gathers(flow: loops.Flow, sites) -> Iterator[str]:
  """Weights whose every element is gathered more than twice a step."""
  times: dict[tuple[str, str], float] = collections.defaultdict(float)
  sent: dict[tuple[str, str], float] = collections.defaultdict(float)
  for site in sites:
    if site.op != 'all-gather':
      continue
    for name in site.instruction.operands:
      found = origin.weight(flow, site.where, name)
      operand = site.where.by_name.get(name)
      if found is None or operand is None:
        continue
      key = found.leaf, site.axis
      pieces = elements(operand.type) / max(1, found.whole)
      times[key] += site.weight * pieces
      sent[key] += site.weight * site.wire_bytes
  alike = collections.defaultdict(list)
  for (leaf, axis), count in times.items():
    if count > _GATHERS:
      alike[axis, round(count, 1)].append(leaf)
  for (axis, count), names in alike.items():
    total = sum(sent[name, axis] for name in names)
    more = f' and {len(names) - 1} more' if len(names) > 1 else ''
    yield (
      f'{names[0]}{more} gathered over {axis} {count} times per step,'
      f' {_gib(total)}: forward and backward need 2; gather outside the inner'
      ' loop, or rematerialise smaller groups of layers'
    )


def _copies(account: Account) -> Iterator[str]:
  total = sum(account.cycles.values())
  share = account.cycles['copy'] / total if total else 0.0
  if share > _COPY_SHARE:
    top = '; '.join(
      f'{shape}, {why}, {cycles / total:.1%}'
      for cycles, shape, why in account.copies[:3]
    )
    yield (
      f'copies take {share:.1%} of the estimated cycles ({top}): let producer'
      ' and reader agree on an order of dimensions; one within a layout is of'
      ' a buffer that a loop both reads and overwrites'
    )


def _dense_attention(module, flow, account, length) -> Iterator[str]:
  """Logits of all pairs in HBM, or loops where a kernel should run."""
  largest: tuple[int, str, str] | None = None
  for visit in flow.visits:
    computation = module.computations[visit.name]
    for i in computation.instructions:
      if i.opcode not in ('fusion', 'convolution', 'dot'):
        continue
      for shape in leaves(i.type):
        if _is_square(shape, length) and (length or _is_product(module, i)):
          about = wire.cause(module, computation, i)
          dims = ','.join(map(str, shape.dims))
          size = shape.buffer_bytes
          largest = max(
            largest or (0, '', ''), (size, f'{shape.dtype}[{dims}]', about)
          )
  if largest is not None:
    size, shape, about = largest
    yield (
      f'attention is dense: a buffer {shape} of logits, {_gib(size)}'
      f' ({about}): memory grows with the square of the length; use the'
      ' kernel, or the chunked path'
    )
  if any(_KERNEL.search(k.name) for k in account.custom_calls):
    return
  found = collections.Counter(
    wire.cause(module, module.computations[visit.name], i)
    for visit in flow.visits
    for i in module.computations[visit.name].instructions
    if i.opcode == 'while' and _ATTENTION.search(i.op_name)
  )
  if found:
    yield (
      f'attention is {sum(found.values())} while loops, not a kernel'
      f' ({next(iter(found))}): choose the kernel for this platform, or see'
      ' why its shapes are refused'
    )


def _is_product(module: Module, i: Instruction) -> bool:
  """A matmul, but none that writes into a stack of layers."""
  if kind_of(module, i) != 'matmul':
    return False
  inside = [i]
  if i.opcode == 'fusion':
    inside = module.computations[i.called['calls'][0]].instructions
  return all(x.opcode != 'dynamic-update-slice' for x in inside)


def _is_square(shape: Shape, length: int | None) -> bool:
  """[..., T, T] in HBM for several heads or rows."""
  if shape.space != 0 or shape.bits < 16 or math.prod(shape.dims[:-2]) < 2:
    return False
  rows, columns = shape.dims[-2:]
  return (
    rows == columns and rows >= 1024
    if length is None
    else (rows == columns == length)
  )


def _unknown_loops(flow: loops.Flow, account: Account) -> Iterator[str]:
  if account.unknown_loops:
    names = collections.Counter(
      wire.cause(flow.module, flow.module.computations[visit.name], i)
      for visit in flow.visits
      for i in flow.module.computations[visit.name].instructions
      if i.opcode == 'while' and i.name in account.unknown_loops
    )
    yield (
      f'{len(account.unknown_loops)} loops have a trip count that depends on'
      f' data ({", ".join(dict.fromkeys(names))}) and are counted once: their'
      ' FLOPs, cycles and bytes are too low'
    )
