"""Packing: documents into rows of T tokens, with segments and positions.

Documents stay whole: best fit, longest first, so that few tokens are padding
and no document starts without its beginning.
"""

import bisect
from collections.abc import Sequence

import numpy as np


def pack(
  documents: Sequence[tuple[Sequence[int], Sequence[bool]]], length: int
) -> dict[str, np.ndarray]:
  """(tokens, loss mask) of each document -> rows of `length`.

  Documents longer than a row are cut to it.

  Returns:
    tokens int32, loss_mask bool, segment int32 (1, 2, ... per row; 0 is
    padding), position int32 (restarting; -1 on padding), each [rows, T].
  """
  lengths = [min(len(tokens), length) for tokens, _ in documents]
  rows = _best_fit(lengths, length)
  shape = (len(rows), length)
  out = {
    'tokens': np.zeros(shape, np.int32),
    'loss_mask': np.zeros(shape, bool),
    'segment': np.zeros(shape, np.int32),
    'position': np.full(shape, -1, np.int32),
  }
  for r, members in enumerate(rows):
    begin = 0
    for s, index in enumerate(members, start=1):
      tokens, loss_mask = documents[index]
      end = begin + lengths[index]
      out['tokens'][r, begin:end] = tokens[: lengths[index]]
      out['loss_mask'][r, begin:end] = loss_mask[: lengths[index]]
      out['segment'][r, begin:end] = s
      out['position'][r, begin:end] = np.arange(lengths[index])
      begin = end
  return out


def _best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
  """Bins of document indices, each into the fullest bin that still fits."""
  rows: list[list[int]] = []
  free: list[tuple[int, int]] = []  # (room left, row), sorted
  for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
    at = bisect.bisect_left(free, (lengths[index], -1))
    if at == len(free):
      rows.append([])
      room, row = capacity, len(rows) - 1
    else:
      room, row = free.pop(at)
    rows[row].append(index)
    bisect.insort(free, (room - lengths[index], row))
  return rows
