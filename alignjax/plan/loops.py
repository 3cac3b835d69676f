"""How often each computation of a module runs, and what stays the same there.

Follows scalars through tuples, copies and loops to find trip counts
(limit - init) / step, gives every computation of the control flow its weight,
and tells which values a loop does not change. Knows no costs but those that
choose the dearer branch of a conditional. Data-dependent loops get the bound
that their condition has, or 1 and a place in `unknown`.
"""

import dataclasses
import functools
import math

from alignjax.plan.hlo import Computation, Instruction, Module

# What hands a value on unchanged, in operand 0.
_SAME = frozenset(
  'bitcast copy copy-start copy-done optimization-barrier reshape convert'
  ' bitcast-convert opt-barrier'.split()
)
_IMPURE = frozenset(
  'rng rng-bit-generator rng-get-and-update-state infeed recv recv-done'
  ' parameter custom-call while conditional call'.split()
)
_MIRROR = {'LT': 'GT', 'GT': 'LT', 'LE': 'GE', 'GE': 'LE', 'NE': 'NE'}

Path = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Visit:
  """A computation of the control flow.

  Attributes:
    name: the computation.
    weight: how often it runs in one call of the program.
    loops: the while bodies around it, outermost first, itself included.
  """

  name: str
  weight: float
  loops: tuple[str, ...]


@dataclasses.dataclass(eq=False)
class Flow:
  """Control flow of a module.

  Attributes:
    module: whose.
    callers: computation -> who calls it, and where that stands.
    unknown: while instructions whose trip count was not found.
  """

  module: Module
  callers: dict[str, tuple[Computation, Instruction]]
  unknown: set[str] = dataclasses.field(default_factory=set)
  _trips: dict[str, float] = dataclasses.field(default_factory=dict)
  _fixed: dict[tuple[str, int], bool] = dataclasses.field(default_factory=dict)

  @functools.cached_property
  def visits(self) -> list[Visit]:
    """Everything that runs on its own: not what is inside a fusion."""
    found: list[Visit] = []
    self._visit(self.module.entry, 1.0, (), found)
    return found

  def _visit(self, name, weight, loops, found):
    found.append(Visit(name, weight, loops))
    for instruction in self.module.computations[name].instructions:
      called = instruction.called
      if instruction.opcode == 'while':
        trips = weight * self.trips(name, instruction)
        for key in ('condition', 'body'):
          for inner in called.get(key, ()):
            self._visit(inner, trips, (*loops, inner), found)
      elif instruction.opcode == 'conditional':
        branches = _branches(instruction)
        if branches:
          self._visit(max(branches, key=self.price), weight, loops, found)
      elif instruction.opcode in ('call', 'async-start'):
        for key in ('to_apply', 'calls', 'called_computations'):
          for inner in called.get(key, ()):
            self._visit(inner, weight, loops, found)

  @functools.cache  # noqa: B019 - lives as long as the module does
  def price(self, name: str) -> float:
    """Estimated cycles of one run of a computation, loops and all."""
    total = 0.0
    for instruction in self.module.computations[name].instructions:
      total += instruction.estimated_cycles
      inner = [n for key in instruction.called.values() for n in key]
      if instruction.opcode == 'while':
        trips = self.trips(name, instruction)
        total += trips * sum(map(self.price, inner))
      elif instruction.opcode == 'conditional':
        total += max(map(self.price, inner), default=0.0)
      elif instruction.opcode in ('call', 'async-start'):
        total += sum(map(self.price, inner))
    return total

  def trips(self, name: str, loop: Instruction) -> float:
    """Trip count of a while instruction that stands in computation `name`."""
    key = f'{name}/{loop.name}'
    if key not in self._trips:
      count = self._count(loop)
      if count is None:
        self.unknown.add(loop.name)
      self._trips[key] = 1.0 if count is None else count
    return self._trips[key]

  def _count(self, loop: Instruction) -> float | None:
    condition = self.module.computations[loop.called['condition'][0]]
    body = self.module.computations[loop.called['body'][0]]
    bounds = []
    for compare, where in self._compares(condition, condition.root):
      bound = self._bound(loop, body, where, compare)
      if bound is not None:
        bounds.append(bound)
    return min(bounds, default=None)

  def _compares(self, where: Computation, i: Instruction | None, deep: int = 0):
    """Comparisons that must all hold for the loop to go on."""
    if i is None or deep > 8:
      return
    if i.opcode == 'compare':
      yield i, where
    elif i.opcode in ('and', *_SAME):
      for n in range(len(i.operands)):
        yield from self._compares(where, where.operand(i, n), deep + 1)
    elif i.opcode == 'fusion' and i.called.get('calls'):
      inner = self.module.computations[i.called['calls'][0]]
      yield from self._compares(inner, inner.root, deep + 1)

  def _bound(self, loop, body, where, compare) -> float | None:
    direction = compare.attribute('direction') or ''
    found = [self._linear(where, compare.operands[n]) for n in (0, 1)]
    sides = [side for side in found if side is not None]
    if direction not in _MIRROR or len(sides) < 2:
      return None
    condition = loop.called['condition'][0]
    carried = [
      side[0] is not None and side[0][0] == condition for side in sides
    ]
    if carried[1] and not carried[0]:
      sides.reverse()
      direction = _MIRROR[direction]
    (base, ahead), (other, limit) = sides
    if base is None or base[0] != condition or other is not None:
      return None
    (counter,) = base[1][:1] or (None,)
    end = self._linear(body, body.root.name, base[1])
    caller, _ = self.callers[body.name]
    start = self._linear(caller, loop.operands[0], base[1])
    if counter is None or end is None or start is None:
      return None
    if end[0] != (body.name, base[1]) or start[0] is not None:
      return None
    return _steps(start[1] + ahead, limit, end[1], direction)

  def _linear(self, where: Computation, name: str, path: Path = ()):
    """A scalar as (what it starts from, or None, and a number to add).

    What it starts from is an element of a loop's state: (computation, path).
    """
    add = 0.0
    while True:
      where, instruction, path = self.source(where, name, path)
      opcode = instruction.opcode
      if opcode == 'constant' and not path:
        value = _scalar(instruction.literal)
        return None if value is None else (None, value + add)
      if opcode == 'parameter':
        return (where.name, path), add
      if opcode not in ('add', 'subtract'):
        return None
      parts = [self._linear(where, n) for n in instruction.operands[:2]]
      if len(parts) < 2 or None in parts:
        return None
      (left, a), (right, b) = parts
      sign = 1 if opcode == 'add' else -1
      if right is not None and (left is not None or sign < 0):
        return None
      return left or right, add + a + sign * b

  def source(
    self, where: Computation, name: str, path: Path = ()
  ) -> tuple[Computation, Instruction, Path]:
    """Where a value was made: through tuples, copies, fusions and loops.

    Goes out of a loop for what the loop hands on unchanged; stops at what the
    loop changes, at the parameter of the body.
    """
    while True:
      i = where.by_name[name]
      if i.opcode == 'get-tuple-element':
        name, path = i.operands[0], (i.index, *path)
      elif i.opcode == 'tuple' and path:
        name, path = i.operands[path[0]], path[1:]
      elif i.opcode in _SAME and i.operands:
        name = i.operands[0]
      elif i.opcode == 'fusion' and i.called.get('calls'):
        inner = self.module.computations[i.called['calls'][0]]
        found = self.source(inner, inner.root.name, path)
        if found[0] is inner and found[1].opcode != 'constant':
          if found[1].opcode not in ('add', 'subtract'):
            return where, i, path
        return found
      elif i.opcode == 'while' and path:
        if not self.fixed(i.called['body'][0], path[0]):
          return where, i, path
        name = i.operands[0]
      elif i.opcode == 'parameter' and where.name in self.callers:
        caller, outer = self.callers[where.name]
        step = self._out(where, i, outer, path)
        if step is None:
          return where, i, path
        where, (name, path) = caller, step
      else:
        return where, i, path

  def _out(self, where, parameter, outer, path):
    """Operand of the caller, and the path in it, that a parameter is."""
    if outer.opcode == 'while':
      body = outer.called['body'][0]
      if path and self.fixed(body, path[0]):
        return outer.operands[0], path
      return None
    n = parameter.index
    if outer.opcode == 'conditional':
      n = 1 + _branches(outer).index(where.name)
    elif outer.opcode not in ('call', 'fusion', 'async-start'):
      return None
    return (outer.operands[n], path) if n < len(outer.operands) else None

  def fixed(self, body: str, index: int) -> bool:
    """Whether a loop hands element `index` of its state on unchanged."""
    key = (body, index)
    if key not in self._fixed:
      self._fixed[key] = False  # while we look: no endless recursion
      inside = self.module.computations[body]
      where, found, path = self.source(inside, inside.root.name, (index,))
      self._fixed[key] = (
        where is inside and found.opcode == 'parameter' and path == (index,)
      )
    return self._fixed[key]

  @functools.cache  # noqa: B019
  def steady(self, body: str) -> frozenset[str]:
    """Values of a while body that are the same in every iteration."""
    found: set[str] = set()
    inside = self.module.computations[body]
    for i in inside.instructions:  # operands come before their users
      origin = inside.operand(i)
      if i.opcode == 'get-tuple-element' and origin is not None:
        if origin.opcode == 'parameter':
          same = self.fixed(body, i.index)
        else:
          same = origin.name in found
      else:
        same = i.opcode not in _IMPURE and found.issuperset(i.operands)
      if same:
        found.add(i.name)
    return frozenset(found)


def flow(module: Module) -> Flow:
  """The control flow of a module."""
  callers = {}
  for computation in module.computations.values():
    for instruction in computation.instructions:
      for names in instruction.called.values():
        for name in names:
          callers.setdefault(name, (computation, instruction))
  return Flow(module, callers)


def _branches(instruction: Instruction) -> list[str]:
  called = instruction.called
  return [
    *called.get('branch_computations', ()),
    *called.get('true_computation', ()),
    *called.get('false_computation', ()),
  ]


def _scalar(text: str) -> float | None:
  try:
    return float(text)
  except ValueError:
    return None


def _steps(start: float, limit: float, step: float, direction: str):
  """Iterations of `for (i = start; i <direction> limit; i += step)`."""
  distance = limit - start
  if direction in ('LE', 'GE'):
    distance += math.copysign(1, step)
  if step == 0 or direction in ('LT', 'LE') and step < 0:
    return None
  if direction in ('GT', 'GE') and step > 0:
    return None
  return float(max(0, math.ceil(distance / step)))
