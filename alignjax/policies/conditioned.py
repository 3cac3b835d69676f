"""A policy whose weights are mixed from copies: parameter-space conditioning.

Some leaves of a model are kept several times and the others are shared; the
weights of a call are sum_i condition_i copy_i, in float32, mixed once in
`view` (CLP, arXiv 2407.15762). Sampler and scorers know nothing of it. One call
has one condition, that of its first row: whoever has several maps over groups
of rows (`stages.groups`). Whether weights make sense is asked elsewhere.

Parameters of such a role are {'shared': leaves, 'copies': {'0': leaves, ...}},
whose names end as those of a plain model do, so that every table still matches.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from alignjax.core import naming, tree
from alignjax.core.errors import UserError
from alignjax.core.types import (
  Batch,
  Bundle,
  Params,
  Policy,
)

# Words for leaves; anything else is a regex over canonical names. The last
# layer is linear, so mixing it mixes the logits (before a soft cap).
COPIED = {'full': '.*', 'attention': r'.*/attn/.*', 'logits': 'unembedding'}
REFERENCE = 'reference'  # what the copy of the fixed model is called


def split(params: Params, count: int, copied: str) -> Params:
  """A plain model -> `count` equal copies of the leaves that `copied` names.

  Where the unembedding is copied and the embedding is not, a tied table is
  untied: each copy gets its own output table and all share the input table.

  Raises:
    UserError: no leaf has such a name, or only some layers of a stack do.
  """
  pattern = COPIED.get(copied, copied)
  leaves, canonical = tree.named(params), tree.canonical_names(params)
  chosen, shared = {}, {}
  for name, x in leaves.items():
    hits = [bool(re.fullmatch(pattern, leaf)) for leaf in canonical[name]]
    if any(hits) and not all(hits):
      raise UserError(
        f'copied leaves {copied!r}: the layers of {name} are one stack, so '
        'expected all or none of them'
      )
    (chosen if any(hits) else shared)[name] = x
  tied = 'embedding' in shared and 'unembedding' not in leaves
  if tied and re.fullmatch(pattern, 'unembedding'):
    chosen['unembedding'] = leaves['embedding']
  if not chosen:
    some = sorted({leaf for of in canonical.values() for leaf in of})[:6]
    raise UserError(
      f'copied leaves {copied!r}: no leaf has such a name, expected one of '
      f'{list(COPIED)} or a regex that matches some of {some} ...'
    )
  out = {'copies': {str(i): naming.nested(chosen) for i in range(count)}}
  return out | ({'shared': naming.nested(shared)} if shared else {})


def endpoints(params: Params, reference: Params | None = None) -> list[Params]:
  """The copies in order, and what a plain `reference` has in their place."""
  copies = params['copies']
  ends = [copies[str(i)] for i in range(len(copies))]
  if reference is None:
    return ends
  fixed = tree.named(reference)
  fixed.setdefault('unembedding', fixed.get('embedding'))
  names = tree.named(ends[0])
  return [*ends, naming.nested({name: fixed[name] for name in names})]


def mix(params: Params, condition, reference: Params | None = None) -> Params:
  """The plain model at `condition` [K], one weight for each endpoint.

  Raises ValueError if there are not K endpoints.
  """
  ends = endpoints(params, reference)
  if len(ends) != len(condition):
    raise ValueError(f'{len(condition)} weights for {len(ends)} endpoints')

  def leaf(*xs):
    total = sum(w * x.astype(jnp.float32) for w, x in zip(condition, xs))
    return jnp.asarray(total).astype(xs[0].dtype)

  mixed = tree.named(jax.tree.map(leaf, *ends))
  return naming.nested(tree.named(params.get('shared', {})) | mixed)


def conditioned(
  base: Callable[[str], Policy], role: str, *, reference: bool = False
) -> Policy:
  """`base(role)` with weights mixed by the batch's `condition` [B, K].

  All rows of a call must have one condition. With `reference`, the fixed role
  of that name is the last endpoint; it gets no gradient.
  """
  plain = base(role)

  def view(bundle: Bundle, batch: Batch):
    fixed = bundle[REFERENCE] if reference else None
    mixed = mix(bundle[role], batch['condition'][0], fixed)
    return plain.view({role: mixed}, batch)

  return plain._replace(view=view)


def roles(
  params: Params, canonical: Callable[[Params], Params], reference=None
) -> dict[str, Mapping[str, Any]]:
  """Role of a model directory -> canonical leaves: shared ones, then copies."""
  ends = endpoints(params, reference)
  out = {f'copy_{i}': canonical(end) for i, end in enumerate(ends)}
  shared = params.get('shared')
  return ({'shared': canonical(shared)} if shared else {}) | out
