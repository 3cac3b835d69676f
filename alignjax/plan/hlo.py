"""Reads the text of a scheduled, optimised HLO module into plain records.

Only syntax: computations, instructions, shapes with their TPU layouts, and the
attributes that an accounting needs. Line based and linear in the text; what it
does not know it keeps as text, because the dialect moves with each compiler.
It neither costs nor interprets anything, and it is not a verifier.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

import numpy as np

from alignjax.core.errors import UserError
from alignjax.plan.shapes import Type, parse_type

_COMMENT = re.compile(r'/\*.*?\*/')
# Name, then the type (no quotes in it), then ` opcode(`. Lines of a kernel's
# metadata, which also stand in the text, do not look like this.
_INSTRUCTION = re.compile(
  r'\s+(ROOT )?%?([\w.\-]+) = ((?:\(|[a-z]\w*\[)[^"]*?) ([a-z][a-z0-9\-]*)\('
)
_HEADER = re.compile(r'(ENTRY )?%?([\w.\-]+) (?:\(.*)?-> .*\{\s*$')
_CALLED = re.compile(
  r'(calls|to_apply|body|condition|branch_computations|called_computations'
  r'|true_computation|false_computation)=(\{[^}]*\}|%?[\w.\-]+)'
)
_NAME = re.compile(r'%?([\w.\-]+)\s*$')


@dataclasses.dataclass(eq=False)
class Instruction:
  """One line of a computation.

  Attributes:
    name: unique in its module as a rule, always in its computation.
    opcode: 'fusion', 'while', 'all-gather-start', ...
    operands: names in the same computation; empty for constants.
    literal: what stands between the parentheses.
    text: what follows them: all attributes.
    root: whether the computation returns it.
  """

  name: str
  opcode: str
  operands: tuple[str, ...]
  literal: str
  type_text: str
  text: str
  root: bool

  @functools.cached_property
  def type(self) -> Type:
    return parse_type(self.type_text)

  @functools.cached_property
  def head(self) -> str:
    """Attributes before metadata and the backend's config."""
    cut = len(self.text)
    for word in (', metadata={', ', backend_config=', ', frontend_attributes='):
      at = self.text.find(word, 0, cut)
      cut = at if at >= 0 else cut
    return self.text[:cut]

  @functools.cached_property
  def called(self) -> dict[str, tuple[str, ...]]:
    """Attribute -> names of the computations it calls."""
    return {
      key: tuple(n.strip().lstrip('%') for n in value.strip('{}').split(','))
      for key, value in _CALLED.findall(self.head)
    }

  def _first(self, pattern: str, text: str) -> str | None:
    found = re.search(pattern, text)
    return found[1] if found else None

  def attribute(self, name: str) -> str | None:
    """Value of a simple attribute (a word, a number or one pair of braces)."""
    return self._first(rf'(?:^|, ){name}=(\{{[^}}]*\}}|[^,\s]+)', self.head)

  @functools.cached_property
  def op_name(self) -> str:
    return self._first(r'op_name="([^"]*)"', self.text) or ''

  @functools.cached_property
  def estimated_cycles(self) -> int:
    """The compiler's own estimate; 0 where it makes none."""
    found = self._first(r'"estimated_cycles":"?(\d+)', self.text)
    return int(found) if found else 0

  @functools.cached_property
  def channel_id(self) -> int | None:
    found = self.attribute('channel_id')
    return int(found) if found else None

  @functools.cached_property
  def index(self) -> int:
    """Of a get-tuple-element or a parameter."""
    if self.opcode == 'parameter':
      return int(self.literal)
    return int(self.attribute('index') or 0)

  @functools.cached_property
  def target(self) -> str:
    """Of a custom call; '' for others."""
    return self._first(r'custom_call_target="([^"]*)"', self.text) or ''

  @functools.cached_property
  def aliases(self) -> dict[int, int]:
    """Output leaf -> operand (a flat count) that it is written over."""
    found, count = {}, len(self.operands)
    for group in re.findall(r'\{"indices":\[([^\]]*)\]\}', self.text):
      indices = [int(i.strip('" ')) for i in group.split(',') if i.strip('" ')]
      inputs = [i for i in indices if i < count]
      for i in indices:
        if i >= count and inputs:
          found[i - count] = inputs[0]
    return found

  @functools.cached_property
  def groups(self) -> tuple[tuple[int, ...], ...]:
    """Partition ids that talk to each other; of an empty list, ()."""
    return replica_groups(self.head)


@dataclasses.dataclass(eq=False)
class Computation:
  """Instructions in the order of the schedule."""

  name: str
  instructions: list[Instruction]

  @functools.cached_property
  def by_name(self) -> dict[str, Instruction]:
    return {i.name: i for i in self.instructions}

  @functools.cached_property
  def users(self) -> dict[str, list[Instruction]]:
    found: dict[str, list[Instruction]] = {}
    for i in self.instructions:
      for name in dict.fromkeys(i.operands):
        found.setdefault(name, []).append(i)
    return found

  @functools.cached_property
  def root(self) -> Instruction:
    for instruction in self.instructions:
      if instruction.root:
        return instruction
    return self.instructions[-1]

  @functools.cached_property
  def parameters(self) -> dict[int, Instruction]:
    found = (i for i in self.instructions if i.opcode == 'parameter')
    return {i.index: i for i in found}

  def operand(self, instruction: Instruction, n: int = 0) -> Instruction | None:
    """The n-th operand's instruction, None where there is none."""
    if n >= len(instruction.operands):
      return None
    return self.by_name.get(instruction.operands[n])


@dataclasses.dataclass(eq=False)
class Module:
  """A program of one device.

  Attributes:
    computations: by name.
    entry: name of the first.
    partitions: devices of the program (of one slice, where there are several).
    scheduled: whether instructions stand in the order of execution.
    donated: output leaf -> entry parameter it is written over.
  """

  computations: dict[str, Computation]
  entry: str
  partitions: int
  scheduled: bool
  donated: dict[int, int]


def parse(text: str) -> Module:
  """Parses a whole module. Raises UserError where there is no ENTRY."""
  computations: dict[str, Computation] = {}
  entry, current, lines = '', None, []

  def close():
    if current is not None:
      found = (_instruction(part) for part in lines)
      computations[current] = Computation(current, [i for i in found if i])

  for line in text.splitlines():
    if line[:1].isspace() and _INSTRUCTION.match(line):
      lines.append([line])
    elif line.endswith('{') and (header := _HEADER.match(line)):
      close()
      current, lines = header[2], []
      entry = current if header[1] else entry
    elif lines and line != '}':
      lines[-1].append(line)  # a kernel's metadata runs over several lines
  close()
  if entry not in computations:
    raise UserError('the text is not an HLO module: no ENTRY computation in it')
  top = text[: text.find('\n')]
  partitions = re.search(r'num_partitions=(\d+)', top)
  return Module(
    computations=computations,
    entry=entry,
    partitions=int(partitions[1]) if partitions else 1,
    scheduled='is_scheduled=true' in top,
    donated=_donated(top),
  )


def _instruction(lines: list[str]) -> Instruction | None:
  text = lines[0] if len(lines) == 1 else '\n'.join(lines)
  found = _INSTRUCTION.match(text)
  if not found:
    return None
  end = _closing(text, found.end())
  literal, opcode = text[found.end() : end], found[4]
  names: tuple[str, ...] = ()
  if opcode not in ('constant', 'parameter', 'iota'):
    names = tuple(_names(literal))
  return Instruction(
    name=found[2],
    opcode=opcode,
    operands=names,
    literal=literal,
    type_text=found[3],
    text=text[end + 1 :],
    root=bool(found[1]),
  )


def _closing(text: str, start: int) -> int:
  """Position of the parenthesis that closes the one before `start`."""
  depth, at = 1, start
  for bracket in re.compile(r'[()]').finditer(text, start):
    depth += 1 if bracket[0] == '(' else -1
    at = bracket.start()
    if not depth:
      return at
  return len(text)


def _names(text: str) -> Iterator[str]:
  """Operand names; each may have its type in front."""
  text = _COMMENT.sub('', text)
  if '%' in text:
    yield from re.findall(r'%([\w.\-]+)', text)
    return
  for part in re.sub(r'\[[^\]]*\]|\{[^}]*\}', '', text).split(','):
    if found := _NAME.search(part):
      yield found[1]


def _donated(top: str) -> dict[int, int]:
  start = top.find('input_output_alias={')
  if start < 0:
    return {}
  pairs = re.findall(r'\{(\d*)[^{}]*\}: \((\d+), \{', top[start:])
  return {int(output or 0): int(parameter) for output, parameter in pairs}


_MESH = re.compile(r'replica_groups=@?mesh\[([^\]]*)\]([^{]*)\{([^}]*)\}')
_IOTA = re.compile(
  r'replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?'
)
_LISTS = re.compile(r'(?:replica_groups|source_target_pairs)=\{(\{.*?\})\}')


def _numbers(text: str) -> list[int]:
  return [int(n) for n in text.split(',') if n.strip()]


@functools.lru_cache(maxsize=4096)
def replica_groups(text: str) -> tuple[tuple[int, ...], ...]:
  """Groups in any of the three spellings, or the pairs of a permutation."""
  if found := _LISTS.search(text):
    groups = re.findall(r'\{([\d, ]*)\}', found[1])
    return tuple(tuple(_numbers(group)) for group in groups)
  if found := _IOTA.search(text):
    ids = np.arange(math.prod(_numbers(found[2])))
    ids = ids.reshape(_numbers(found[2]))
    if found[3]:
      ids = ids.transpose(_numbers(found[3]))
    return tuple(map(tuple, ids.reshape(_numbers(found[1])).tolist()))
  if found := _MESH.search(text):
    return _mesh_groups(found[1], found[2], found[3])
  return ()


def _mesh_groups(mesh: str, order: str, axes: str):
  """Groups of mesh['a'=4,'b'=16] {'b'}; an axis may be cut, 'b':(2)8."""
  sizes = {k: int(n) for k, n in re.findall(r"'([^']+)'=(\d+)", mesh)}
  ids = np.arange(math.prod(sizes.values()))
  if found := re.search(r'\[([\d,]+)\]T\(([\d,]+)\)', order):
    ids = ids.reshape(_numbers(found[1])).transpose(_numbers(found[2]))
  wanted = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes)
  parts: list[tuple[int, bool]] = []  # size of a piece of an axis, inside?
  for name, size in sizes.items():
    cuts = [(int(p or 1), int(n or size)) for k, p, n in wanted if k == name]
    at = 1
    for before, n in sorted(cuts):
      parts += [(before // at, False), (n, True)]
      at = before * n
    parts.append((size // at, False))
  ids = ids.reshape([size for size, _ in parts])
  outer = [i for i, (_, within) in enumerate(parts) if not within]
  inner = [i for i, (_, within) in enumerate(parts) if within]
  ids = ids.transpose(outer + inner)
  width = math.prod(parts[i][0] for i in inner)
  return tuple(map(tuple, ids.reshape(-1, width).tolist()))
