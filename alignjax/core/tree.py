"""Trees of arrays by leaf name (see `naming`), and a little arithmetic."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp


def name(path) -> str:
  """'a/b/c' of a jax key path."""
  return jax.tree_util.keystr(path, simple=True, separator='/')


def named(tree: Any) -> dict[str, Any]:
  """Leaves by name, in tree order."""
  return {
    name(path): leaf
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
  }


def map_named(fn: Callable[..., Any], tree: Any, *rest: Any) -> Any:
  """tree.map with the leaf's name as first argument."""
  return jax.tree_util.tree_map_with_path(
    lambda path, *leaves: fn(name(path), *leaves), tree, *rest
  )


def lerp(old: Any, new: Any, rate: Any) -> Any:
  """(1 - rate) * old + rate * new in float32, in the dtype of `old`.

  Exact at both ends: rate 0 gives `old` and 1 gives `new` bit for bit.
  """

  def leaf(a, b):
    a32, b32 = a.astype(jnp.float32), b.astype(jnp.float32)
    return ((1 - rate) * a32 + rate * b32).astype(a.dtype)

  return jax.tree.map(leaf, old, new)


def norm(tree: Any) -> jax.Array:
  """Global L2 norm, in float32."""
  squares = [
    jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)
  ]
  return jnp.sqrt(sum(squares, jnp.float32(0)))


def cast(tree: Any, dtype: Any) -> Any:
  """Floating leaves in `dtype`; others as they are."""
  return jax.tree.map(
    lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x,
    tree,
  )


def size(tree: Any) -> int:
  """Number of elements."""
  return sum(x.size for x in jax.tree.leaves(tree))


# Two layouts of one decoder. Canonical, which everything outside training
# speaks: `layer_7/attn/q`, one leaf per linear map per layer. Stacked, which
# scans: `groups/1/attn/q` holds layers 1, 1 + p, 1 + 2p, ... of a pattern of
# p layers along its first axis; a remainder keeps its canonical names.


def stack(tree: Mapping[str, Any], pattern: int) -> dict[str, Any]:
  """Canonical -> stacked. Fewer layers than `pattern` stay unstacked."""
  layers = sum(key.startswith('layer_') for key in tree)
  repeats = layers // pattern
  out = {k: v for k, v in tree.items() if not k.startswith('layer_')}
  if repeats:
    out['groups'] = {
      str(p): jax.tree.map(
        lambda *leaves: jnp.stack(leaves),
        *[tree[f'layer_{g * pattern + p}'] for g in range(repeats)],
      )
      for p in range(pattern)
    }
  for i in range(repeats * pattern, layers):
    out[f'layer_{i}'] = tree[f'layer_{i}']
  return out


def unstack(tree: Mapping[str, Any]) -> dict[str, Any]:
  """Stacked -> canonical; a tree without groups comes back as it is."""
  out = {k: v for k, v in tree.items() if k != 'groups'}
  groups = tree.get('groups', {})
  for p, group in groups.items():
    for g in range(jax.tree.leaves(group)[0].shape[0]):
      layer = g * len(groups) + int(p)
      out[f'layer_{layer}'] = jax.tree.map(lambda x, g=g: x[g], group)
  return out


def canonical_names(tree: Any) -> dict[str, tuple[str, ...]]:
  """For each leaf of a bundle or model, the canonical leaves it holds."""
  leaves = named(tree)
  pattern: dict[str, int] = {}
  for leaf in leaves:
    if match := re.match(r'(.*/|)groups/(\d+)/', leaf):
      prefix = match[1]
      pattern[prefix] = max(pattern.get(prefix, 0), int(match[2]) + 1)
  out = {}
  for leaf, array in leaves.items():
    match = re.fullmatch(r'(.*/|)groups/(\d+)/(.*)', leaf)
    if match is None:
      out[leaf] = (leaf,)
      continue
    prefix, p, rest = match[1], int(match[2]), match[3]
    out[leaf] = tuple(
      f'{prefix}layer_{g * pattern[prefix] + p}/{rest}'
      for g in range(array.shape[0])
    )
  return out
