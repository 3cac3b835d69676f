"""Array types as HLO writes them, with the layouts of a TPU.

Only what their text says: dtype, dims, tiles, memory space, and from these the
bytes on a wire and in memory. Not the place for what holds the arrays.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from alignjax.core.errors import UserError

_BITS = {'pred': 8, 'token': 0, 'opaque': 0, 'c64': 64, 'c128': 128}
_NUMBER = re.compile(r'(?:bf|[suf])(\d+)')
_SHAPE = re.compile(r'([a-z]\w*)\[([\d,<=?\s]*)\](?:\{([^{}]*)\})?')
_TILE = re.compile(r'\(([\d,*]+)\)')
_COMMENT = re.compile(r'/\*.*?\*/')


class Shape(NamedTuple):
  """An array: its dtype as HLO writes it, dims, and layout text."""

  dtype: str
  dims: tuple[int, ...]
  layout: str = ''

  @property
  def bits(self) -> int:
    if self.dtype in _BITS:
      return _BITS[self.dtype]
    found = _NUMBER.match(self.dtype)
    return int(found[1]) if found else 8

  @property
  def bytes(self) -> int:
    """Of the elements, without padding: what a wire carries."""
    return math.prod(self.dims) * self.bits // 8

  @property
  def space(self) -> int:
    """Memory space: 0 = HBM, 1 = VMEM, 5 = host; others are tiny."""
    found = re.search(r'S\((\d+)\)', self.layout)
    return int(found[1]) if found else 0

  @property
  def buffer_bytes(self) -> int:
    """As laid out: the minor dims padded to the first tile."""
    order, _, tiles = self.layout.partition(':')
    dims = [self.dims[int(i)] for i in order.split(',') if i.strip()]
    dims = dims or list(reversed(self.dims))
    tile = _TILE.match(tiles[1:]) if tiles.startswith('T') else None
    if tile and '*' not in tile[1]:
      sizes = [int(n) for n in reversed(tile[1].split(','))]
      dims += [1] * (len(sizes) - len(dims))
      for i, size in enumerate(sizes):
        dims[i] = -(-dims[i] // size) * size
    return math.prod(dims) * self.bits // 8


Type = Shape | tuple['Type', ...]


def leaves(kind: Type) -> Iterator[Shape]:
  """Arrays of a type, in order."""
  if isinstance(kind, Shape):
    yield kind
  else:
    for part in kind:
      yield from leaves(part)


def total_bytes(kind: Type) -> int:
  return sum(shape.bytes for shape in leaves(kind))


def elements(kind: Type) -> int:
  return sum(math.prod(shape.dims) for shape in leaves(kind))


def parse_type(text: str) -> Type:
  """'f32[2,3]{1,0:T(8,128)}' or a tuple of such, nested."""
  kind, _ = _type(_COMMENT.sub('', text), 0)
  return kind


def _type(text: str, at: int) -> tuple[Type, int]:
  while text[at] in ' ,':
    at += 1
  if text[at] != '(':
    found = _SHAPE.match(text, at)
    if not found:
      raise UserError(f'HLO type {text[at : at + 40]!r} is not understood')
    dims = tuple(int(n.strip(' <=?') or 0) for n in found[2].split(',') if n)
    return Shape(found[1], dims, found[3] or ''), found.end()
  parts, at = [], at + 1
  while True:
    while text[at] in ' ,':
      at += 1
    if text[at] == ')':
      return tuple(parts), at + 1
    part, at = _type(text, at)
    parts.append(part)
