"""Which weight of the program a gathered value is a piece of.

Walks back through slices, casts, gathers, fusions and loops to a parameter of
the program. What was computed on the way is no weight: the answer is None.
"""

import re
from typing import NamedTuple

from alignjax.plan.hlo import Computation, Instruction, Module
from alignjax.plan.loops import Flow
from alignjax.plan.shapes import elements

_SLICES = frozenset(
  'dynamic-slice slice convert bitcast copy reshape transpose'
  ' get-tuple-element'.split()
)


class Weight(NamedTuple):
  """A parameter of the program.

  Attributes:
    leaf: as JAX names it: state.params['policy']['embedding'].
    whole: elements of the array whose pieces are gathered: the parameter, or
      what an earlier gather made of it.
  """

  leaf: str
  whole: int

  @property
  def short(self) -> str:
    """'policy/groups/ffw/gate': keys only, without positions of a list."""
    keys = re.findall(r"\['([^']+)'\]", self.leaf)
    return '/'.join(k for k in keys if not k.isdigit()) or self.leaf


def weight(flow: Flow, where: Computation, name: str) -> Weight | None:
  """The parameter that value `name` of a computation is a piece of."""
  whole = 0
  for _ in range(64):
    where, i, path = flow.source(where, name)
    if i.opcode == 'parameter' and where.name == flow.module.entry:
      leaf = i.op_name.replace('\\', '') or i.name
      return Weight(leaf, whole or elements(i.type))
    step = _through(flow.module, i, path)
    if step is None:
      return None
    if i.opcode == 'all-gather':
      whole = whole or elements(i.type)
    name = step
  return None


def _through(
  module: Module, i: Instruction, path: tuple[int, ...]
) -> str | None:
  """The operand that an instruction slices, converts or gathers."""
  if i.opcode in ('dynamic-slice', 'slice', 'all-gather') and not path:
    return i.operands[0]
  if i.opcode != 'fusion' or len(path) > 1:
    return None
  inner = module.computations[i.called['calls'][0]]
  item: Instruction | None = inner.root
  if path and item.opcode == 'tuple':
    item = inner.operand(item, path[0])
  while item is not None and item.opcode in _SLICES:
    item = inner.operand(item)
  if item is None or item.opcode != 'parameter':
    return None
  return i.operands[item.index]
