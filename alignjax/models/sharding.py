"""Where the weights of every family live: a table of leaves, and its uses.

The table speaks of canonical leaves. 'fsdp' is where a weight is stored and
from where it is gathered for use, one group of layers at a time; 'tensor'
splits heads, hidden units and channels, which stay split. Masters of trained
roles are spread over 'data' as well (`system.mesh.shardings`).
"""

from typing import Any

from alignjax.core import naming, placement, tree

# The vocabulary is split, not the width: logits are computed where their rows
# of the table are, and a table of 256k rows is never gathered.
TABLE = (
  (r'(.*/)?(un)?embedding', (placement.VOCABULARY, None)),
  (r'.*/attn/[qkv]', ('fsdp', 'tensor', None)),
  (r'.*/attn/o', ('tensor', None, 'fsdp')),
  (r'.*/ffw/(gate|up)', ('fsdp', 'tensor')),
  (r'.*/ffw/down', ('tensor', 'fsdp')),
  (r'.*/recurrent/[xy]', ('fsdp', 'tensor')),
  (r'.*/recurrent/out', ('tensor', 'fsdp')),
  (r'.*/recurrent/conv', (None, 'tensor')),
  (r'.*/recurrent/(input|a)_gate', ('tensor', 'fsdp', None)),
  (r'.*/recurrent/(input|a)_gate_bias', ('tensor', None)),
  (r'.*/recurrent/((x|y|conv)_bias|a_param)', ('tensor',)),
  (r'.*/ffw/(gate|up)_bias', ('tensor',)),
  (r'.*/(recurrent/out|attn/o|ffw/down)_bias', (None,)),
  (r'(.*/)?\w+_norm', (None,)),
  (r'(.*/)?(scalar|embedding)_head', (None, None)),
)


def spec(name: str, x: Any) -> placement.Spec:
  """Axes of a leaf, canonical or stacked (one more axis in front)."""
  found = naming.lookup(TABLE, name, 'sharding table')
  return (None,) * (x.ndim - len(found)) + found


def stored(params: Any) -> Any:
  """Parameters where the table says, their cotangents too."""
  return tree.map_named(
    lambda name, x: placement.constrain(x, *spec(name, x)), params
  )


def decoding(name: str, x: Any, inputs: int, turned: bool) -> Any:
  """A leaf as a decode loop reads it: gathered before the loop, once.

  The vocabulary stays split. A `turned` leaf has its `inputs` leading
  dimensions behind the others.
  """
  if name in ('embedding', 'unembedding'):
    return placement.constrain(x, *spec(name, x))
  at = placement.without(spec(name, x), 'fsdp')
  return placement.constrain(x, *(at[inputs:] + at[:inputs] if turned else at))


def gathered(params: Any) -> Any:
  """The weights of a layer, whole but for 'tensor'; gradients go back split."""

  def leaf(name, x):
    at = spec(f'layer/{name}', x)
    return placement.moved(x, placement.without(at, 'fsdp'), at)

  return tree.map_named(leaf, params)
