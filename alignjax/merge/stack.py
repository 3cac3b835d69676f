"""Layers of several models on top of each other: 'frankenmerging'.

Nothing is averaged: a model is opened whose layers lie in others' files, and
written like any. What is outside of the layers (embedding, final norm) is the
base's.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from alignjax.core.errors import UserError
from alignjax.interop.opened import Opened

_FORM = re.compile(r'(\d+):(\d+):(\d+)')
_FREE = ('layers', 'pattern', 'vocab_size', 'dtype', 'init', 'init_std')
_FREE += ('remat', 'unroll', 'attention', 'recurrence')


class Span(NamedTuple):
  """Layers start to stop - 1 of model number `model`; 0 is the first given."""

  model: int
  start: int
  stop: int


def spans(texts: Sequence[str]) -> list[Span]:
  """'MODEL:START:STOP' each. Raises UserError."""
  found = []
  for text in texts:
    form = _FORM.fullmatch(text)
    if form is None:
      raise UserError(
        f'--layers {text!r}: expected MODEL:START:STOP, such as 0:0:12 for the'
        ' first twelve layers of the first of --models'
      )
    found.append(Span(*map(int, form.groups())))
  if not found:
    raise UserError('stack needs --layers MODEL:START:STOP, one or more')
  return found


def stacked(
  base: Opened, models: Sequence[Opened], of: Sequence[Span]
) -> Opened:
  """A model made of those layers, bottom first, on the base's embedding.

  Raises UserError for layers that there are not and models that differ in
  anything but their number.
  """
  layers: list[tuple[Opened, int]] = []
  for span in of:
    if span.model >= len(models):
      raise UserError(
        f'--layers: no model number {span.model}; there are {len(models)},'
        ' counted from 0'
      )
    model = models[span.model]
    if not span.start < span.stop <= model.config.layers:
      raise UserError(
        f'--layers {span.model}:{span.start}:{span.stop}: {model.path} has'
        f' layers 0 to {model.config.layers - 1}'
      )
    layers += [(model, i) for i in range(span.start, span.stop)]
  for model in models:
    _check(base, model)
  sources = {name: (base, name) for name in base.leaves if not _layer_of(name)}
  for number, (model, i) in enumerate(layers):
    for name in model.leaves:
      if _layer_of(name) == f'layer_{i}':
        rest = name.partition('/')[2]
        sources[f'layer_{number}/{rest}'] = model, name

  def load(name: str) -> np.ndarray:
    model, leaf = sources[name]
    return model.load(leaf)

  def view(name: str, allocate: Any = np.empty) -> np.ndarray:
    model, leaf = sources[name]
    return model.view(leaf, allocate)

  return base._replace(
    config=dataclasses.replace(
      base.config,
      layers=len(layers),
      pattern=_pattern([model.config.kind(i) for model, i in layers], base),
    ),
    leaves={n: m.leaves[leaf] for n, (m, leaf) in sorted(sources.items())},
    load=load,
    view=view,
    origin={
      name: tuple(f'{model.path}: {x}' for x in model.origin[leaf])
      for name, (model, leaf) in sources.items()
    },
  )


def _pattern(kinds: Sequence[str], base: Opened) -> tuple[str, ...]:
  """The base's cycle if the layers still follow it, or else all kinds."""
  cycle = base.config.pattern
  if all(kind == cycle[i % len(cycle)] for i, kind in enumerate(kinds)):
    return cycle
  return tuple(kinds)


def _layer_of(name: str) -> str | None:
  return name.partition('/')[0] if name.startswith('layer_') else None


def _check(base: Opened, model: Opened) -> None:
  ours, theirs = (dataclasses.asdict(m.config) for m in (base, model))
  wrong = [
    f'{field} is {ours[field]!r} in {base.path} and {theirs[field]!r} in'
    f' {model.path}'
    for field in ours
    if field not in _FREE and ours[field] != theirs[field]
  ]
  if wrong:
    raise UserError(f'stack of different architectures: {"; ".join(wrong)}')
