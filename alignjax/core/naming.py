"""Leaves by name: tables of regexes, and nested dicts. Knows nothing of JAX.

A leaf's name is its path joined by '/', for example `layer_7/attn/q`. Tables
are sequences of (regex, value); the first full match wins, and what a table
leaves unmatched is an error.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from alignjax.core.errors import UserError

T = TypeVar('T')


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
  """The nested dict whose leaves have these names."""
  root: dict[str, Any] = {}
  for path, leaf in leaves.items():
    *parents, last = path.split('/')
    node = root
    for part in parents:
      node = node.setdefault(part, {})
    node[last] = leaf
  return root


def lookup(table: Sequence[tuple[str, T]], leaf: str, what: str) -> T:
  """First value whose regex matches the whole name. `what` names the table."""
  for pattern, value in table:
    if re.fullmatch(pattern, leaf):
      return value
  raise UserError(f'{what}: no rule matches the leaf {leaf!r}')
