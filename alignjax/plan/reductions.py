"""What an all-reduce is really for, operand by operand.

The TPU compiler writes a gather as a sum of zero-padded slices where it has no
better way, and leaves a gradient that should be scattered whole, to be sliced
by its readers; its combiner may put both into one instruction. Tells these
apart by producers and readers. Judges nothing: that is for `lints`.
"""

from typing import NamedTuple

from alignjax.plan import wire
from alignjax.plan.hlo import Computation, Instruction, Module
from alignjax.plan.shapes import elements, total_bytes

_SAME = ('copy', 'copy-start', 'copy-done', 'bitcast', 'get-tuple-element')


class Part(NamedTuple):
  """One operand of an all-reduce.

  Attributes:
    purpose: 'gather' of slices, 'scatter' of what readers slice, or 'sum'.
    wire_bytes: per chip and run.
    cause: pass and place.
  """

  purpose: str
  wire_bytes: float
  cause: str


def parts(module: Module, site: wire.Site) -> list[Part]:
  """The operands of an all-reduce; none for other collectives."""
  found = []
  if site.op != 'all-reduce':
    return found
  for n, name in enumerate(site.instruction.operands):
    operand = site.where.by_name.get(name)
    if operand is None:
      continue
    if _adds_zeros(module, site, operand):
      purpose = 'gather'
    elif _is_sliced(module, site, n):
      purpose = 'scatter'
    else:
      purpose = 'sum'
    sent = wire.wire_bytes(site.op, total_bytes(operand.type), site.size)
    where, named = site.where, operand
    if len(site.instruction.operands) == 1 and site.outer.op_name:
      where, named = module.computations[site.visit.name], site.outer
    found.append(Part(purpose, sent, wire.cause(module, where, named)))
  return found


def _adds_zeros(module: Module, site: wire.Site, operand: Instruction) -> bool:
  """Whether an operand is zeros but for this device's slice."""
  item: Instruction | None = operand
  while item is not None and item.opcode in _SAME[:4]:
    item = site.where.operand(item)
  if item is None:
    return False
  where, inside = site.where, [item]
  if item.opcode == 'fusion':
    where = module.computations[item.called['calls'][0]]
    inside = where.instructions
  for update in inside:
    part = where.operand(update, 1)
    if update.opcode == 'dynamic-update-slice' and part is not None:
      if elements(part.type) * site.size == elements(update.type):
        return True
  return False


def _is_sliced(module: Module, site: wire.Site, n: int) -> bool:
  """Whether every reader of result n takes a slice of it."""
  where = module.computations[site.visit.name]
  queue, sliced = [site.outer], False
  for item in queue:
    for user in where.users.get(item.name, ()):
      if user.opcode == 'get-tuple-element' and item is site.outer:
        if user.index == n:
          queue.append(user)
      elif user.opcode in _SAME:
        queue.append(user)
      elif _takes_slice(module, user, item.name):
        sliced = True
      else:
        return False
  return sliced


def _takes_slice(module: Module, user: Instruction, name: str) -> bool:
  if user.opcode == 'dynamic-slice':
    return user.operands[0] == name
  if user.opcode != 'fusion':
    return False
  inner = module.computations[user.called['calls'][0]]
  queue = [
    inner.parameters[n] for n, x in enumerate(user.operands) if x == name
  ]
  return any(_sliced_inside(inner, item) for item in queue)


def _sliced_inside(inner: Computation, parameter: Instruction) -> bool:
  queue = [parameter]
  for item in queue:
    for reader in inner.users.get(item.name, ()):
      if reader.opcode == 'dynamic-slice' and reader.operands[0] == item.name:
        return True
      if reader.opcode in ('bitcast', 'reshape', 'convert', 'copy'):
        queue.append(reader)
  return False
