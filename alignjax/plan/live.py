"""Peak of live HBM buffers, by walking the schedule.

A simulation, not the compiler's own assignment: every array in HBM lives from
the instruction that makes it to its last use, tuples and bitcasts are names
for what they hold, loops work in place on their state, and updates that the
compiler marks as aliased take no new room. Fragmentation is not modelled, nor
what a kernel may ask for beside its operands.
"""

import dataclasses
from typing import Any

from alignjax.plan.hlo import Computation, Instruction, Module
from alignjax.plan.shapes import Shape, Type, leaves
from alignjax.plan.wire import cause


@dataclasses.dataclass(frozen=True)
class Held:
  """A buffer that is live at the peak.

  Attributes:
    bytes: with padding.
    shape: as HLO writes it.
    cause: pass and place that made it.
  """

  bytes: int
  shape: str
  cause: str


@dataclasses.dataclass(frozen=True)
class Peak:
  """The moment of most live HBM.

  Attributes:
    bytes: all of it.
    arguments: entry parameters, which live throughout.
    outputs: results that are not written over a parameter.
    temporaries: the rest.
    largest: biggest temporaries of the moment.
    where: computation and instruction of the moment.
  """

  bytes: int
  arguments: int
  outputs: int
  temporaries: int
  largest: tuple[Held, ...]
  where: str


@dataclasses.dataclass(eq=False)
class _Buffer:
  size: int
  made: int
  shape: Shape
  instruction: Instruction
  last: int = 0


# A buffer, None for what is not ours to count, or a tuple of such.
_Value = Any
_NAMES = frozenset(
  'bitcast optimization-barrier opt-barrier tuple get-tuple-element'.split()
)
_FREE = frozenset('constant iota partition-id replica-id after-all'.split())


def peak(module: Module) -> Peak:
  """Simulates a module from its entry."""
  entry = module.computations[module.entry]
  arguments = sum(
    shape.buffer_bytes
    for parameter in entry.parameters.values()
    for shape in leaves(parameter.type)
    if shape.space == 0
  )
  outputs = sum(
    shape.buffer_bytes
    for n, shape in enumerate(leaves(entry.root.type))
    if n not in module.donated and shape.space == 0
  )
  memo: dict[str, tuple[int, list[Held], str]] = {}
  temporaries, held, where = _walk(module, entry, memo)
  return Peak(
    bytes=arguments + outputs + temporaries,
    arguments=arguments,
    outputs=outputs,
    temporaries=temporaries,
    largest=tuple(sorted(held, key=lambda h: -h.bytes)[:12]),
    where=where,
  )


def _walk(module: Module, computation: Computation, memo):
  """Most bytes that a computation makes itself, what they are, and when.

  Parameters and results belong to the caller: the body of a loop writes its
  results over the state.
  """
  if computation.name in memo:
    return memo[computation.name]
  values: dict[str, _Value] = {}
  buffers: list[_Buffer] = []
  inner: dict[int, tuple[int, list[Held], str]] = {}
  for at, i in enumerate(computation.instructions):
    if i.opcode not in _NAMES:  # a name is no use
      for name in i.operands:
        for buffer in _flat(values.get(name)):
          buffer.last = at
    if i.opcode in ('while', 'conditional', 'call', 'async-start'):
      names = [name for part in i.called.values() for name in part]
      found = [_walk(module, module.computations[n], memo) for n in names]
      inner[at] = max(found, key=lambda f: f[0], default=(0, [], ''))
    values[i.name] = _value(i, at, values, buffers)
  idle = _idle(computation, values)
  for buffer in _flat(values.get(computation.root.name)):
    buffer.size = 0  # counted where the result is kept
  buffers += idle
  memo[computation.name] = _peak(module, computation, buffers, inner)
  return memo[computation.name]


def _idle(computation: Computation, values) -> list[_Buffer]:
  """Times, as negative buffers, in which the state of a loop holds nothing.

  Between the last use of an element and the new one, its room is free.
  """
  state = [values.get(p.name) for p in computation.parameters.values()]
  new = values.get(computation.root.name)
  if len(state) != 1 or not isinstance(state[0], tuple):
    return []
  if not isinstance(new, tuple) or len(new) != len(state[0]):
    return []
  found = []
  for old, made in zip(state[0], new):
    if isinstance(old, _Buffer) and isinstance(made, _Buffer):
      if made.size and made is not old and old.last + 1 < made.made:
        found.append(
          _Buffer(
            -made.size,
            old.last + 1,
            made.shape,
            made.instruction,
            made.made - 1,
          )
        )
  return found


def _peak(module: Module, computation: Computation, buffers, inner):
  count = len(computation.instructions)
  change = [0] * (count + 1)
  for buffer in buffers:
    change[buffer.made] += buffer.size
    change[max(buffer.last, buffer.made) + 1] -= buffer.size
  best, moment, live = 0, 0, 0
  for at in range(count):
    live += change[at]
    total = live + (inner[at][0] if at in inner else 0)
    if total > best:
      best, moment = total, at
  held = [
    Held(
      b.size,
      f'{b.shape.dtype}[{",".join(map(str, b.shape.dims))}]',
      cause(module, computation, b.instruction),
    )
    for b in buffers
    if b.size > 0 and b.made <= moment <= max(b.last, b.made)
  ]
  _, deeper, where = inner.get(moment, (0, [], ''))
  here = f'{computation.name}/{computation.instructions[moment].name}'
  return best, held + deeper, where or here


def _value(i: Instruction, at: int, values, buffers) -> _Value:
  """What an instruction's name stands for."""
  first = values.get(i.operands[0]) if i.operands else None
  if i.opcode == 'tuple':
    return tuple(values.get(name) for name in i.operands)
  if i.opcode == 'get-tuple-element':
    return first[i.index] if isinstance(first, tuple) else None
  if i.opcode in _NAMES or i.opcode == 'while' or i.opcode.endswith('-update'):
    return first
  if i.opcode in _FREE:
    return None
  if i.opcode == 'parameter':
    return _outside(i, i.type)
  if i.opcode.endswith('-done'):
    return _finished(i, first)
  fresh = _fresh(i, i.type, at, buffers, values)
  if isinstance(fresh, tuple) and i.opcode.endswith(('-start', 'send')):
    if i.opcode == 'copy-start':
      return (fresh[0], _yield_to(fresh[1], first), *fresh[2:])
    if len(fresh) > 1 and i.opcode != 'all-reduce-start':
      return (_yield_to(fresh[0], first), *fresh[1:])
  return fresh


def _finished(i: Instruction, started: _Value) -> _Value:
  """Result of an asynchronous operation, from the value of its start."""
  if not isinstance(started, tuple):
    return started
  if i.opcode == 'copy-done':
    return started[0]
  if i.opcode == 'recv-done':
    return (started[0], None)
  if i.opcode == 'send-done' or len(started) < 2:
    return None
  if i.opcode == 'all-reduce-done':
    return started
  return started[1]


def _yield_to(buffers: _Value, real: _Value) -> _Value:
  """Drops buffers that are only names for an operand."""
  for buffer in _flat(buffers):
    buffer.size = 0
  return real


def _outside(i: Instruction, kind: Type) -> _Value:
  """What belongs to the caller: of no size here, but it has a last use."""
  if isinstance(kind, Shape):
    return _Buffer(0, 0, kind, i)
  return tuple(_outside(i, part) for part in kind)


def _fresh(i: Instruction, kind: Type, at: int, buffers, values) -> _Value:
  """New buffers of a type, but for what is written over an operand."""
  over = i.aliases
  count = 0

  def make(part: Type) -> _Value:
    nonlocal count
    if not isinstance(part, Shape):
      return tuple(make(p) for p in part)
    n, count = count, count + 1
    if n in over:
      real = values.get(i.operands[over[n]])
      if not isinstance(real, tuple):
        return real
    if part.space != 0:
      return None
    buffers.append(_Buffer(part.buffer_bytes, at, part, i, at))
    return buffers[-1]

  return make(kind)


def _flat(value: _Value):
  if isinstance(value, tuple):
    for part in value:
      yield from _flat(part)
  elif value is not None:
    yield value
