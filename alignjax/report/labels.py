"""Where labels go so that none covers another: boxes and points, no drawing.

`place` tries positions around every point, nearest first, and improves the
whole in a few rounds. It is a small deterministic search, not an optimiser: a
label that finds no free place keeps its least bad one.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

RADII = (5.0, 11.0, 19.0, 30.0, 44.0, 62.0, 84.0, 110.0)
# Up, right and their neighbours first: where readers look for a label.
ANGLES = tuple(
  math.radians(a) for a in (90, 0, 45, 135, 180, -90, -45, -135, 22, 67)
) + tuple(math.radians(a) for a in (112, 157, -22, -67, -112, -157))
LEADER = 15.0  # a label further away than this gets a line to its point


class Place(NamedTuple):
  """Centre of a label, and whether it needs a line back to its point."""

  x: float
  y: float
  leader: bool


def place(
  points: Sequence[tuple[float, float]],
  sizes: Sequence[tuple[float, float]],
  *,
  boxes: Sequence[tuple[float, float, float, float]] = (),
  segments: Sequence[tuple[float, float, float, float]] = (),
  frame: tuple[float, float, float, float],
) -> list[Place]:
  """Place one label per point; all lengths in one unit, such as pixels.

  Args:
    points: what is labelled.
    sizes: (width, height) of each label.
    boxes: (x0, y0, x1, y1) of things that labels should not cover.
    segments: (x0, y0, x1, y1) of lines that labels should not cross.
    frame: (x0, y0, x1, y1) that labels must not leave.
  """
  options = [_options(p, s, frame) for p, s in zip(points, sizes)]
  fixed = [_fixed_cost(o, p, boxes, segments) for o, p in zip(options, points)]
  crowd = [sum(math.dist(p, q) < 60 for q in points) for p in points]
  order = sorted(range(len(points)), key=lambda i: (-crowd[i], i))
  chosen: dict[int, int] = {}
  for _ in range(8):
    before = dict(chosen)
    for i in order:
      cost = fixed[i].copy()
      for j, pick in chosen.items():
        if j != i:
          cost += _pair_cost(options[i], points[i], options[j][pick], points[j])
      chosen[i] = int(np.argmin(cost))
    if chosen == before:
      break
  return [_place(options[i][chosen[i]], points[i]) for i in range(len(points))]


def overlap(a, b, gap: float = 0.0):
  """Overlapping area of boxes (x0, y0, x1, y1), each grown by half of gap."""
  a, b = np.asarray(a, float), np.asarray(b, float)
  low = np.maximum(a[..., :2], b[..., :2])
  high = np.minimum(a[..., 2:], b[..., 2:])
  return np.prod(np.maximum(high - low + gap, 0), axis=-1)


def crosses(boxes, segments) -> np.ndarray:
  """Whether segments [..., 4] enter boxes [..., 4], by clipping them."""
  boxes, segments = np.asarray(boxes, float), np.asarray(segments, float)
  start = segments[..., :2]
  step = segments[..., 2:] - start
  # A line along an axis is nudged: dividing by zero would lose its side.
  step = np.where(np.abs(step) < 1e-9, 1e-9, step)
  near, far = (boxes[..., :2] - start) / step, (boxes[..., 2:] - start) / step
  enter = np.minimum(near, far).max(-1)
  leave = np.maximum(near, far).min(-1)
  return np.maximum(enter, 0) < np.minimum(leave, 1)


def _options(point, size, frame) -> np.ndarray:
  """Boxes [K, 4] around a point, moved into the frame."""
  out = []
  half = np.asarray(size, float) / 2
  for radius in RADII:
    for angle in ANGLES:
      way = np.array([math.cos(angle), math.sin(angle)])
      # Far enough for the box's near edge to be `radius` from the point.
      reach = min(
        half[k] / abs(way[k]) if abs(way[k]) > 1e-6 else math.inf
        for k in (0, 1)
      )
      centre = np.asarray(point) + way * (radius + reach)
      centre = np.clip(
        centre, np.add(frame[:2], half), np.subtract(frame[2:], half)
      )
      out.append(np.concatenate([centre - half, centre + half]))
  return np.asarray(out)


def _fixed_cost(options, point, boxes, segments) -> np.ndarray:
  radius = np.repeat(RADII, len(ANGLES))
  taste = np.tile(np.linspace(0, 1.5, len(ANGLES)), len(RADII))
  cost = 0.12 * radius + taste
  # Neither the label nor the way back to its point runs over another point.
  ways = np.concatenate(
    [_middle(options), np.broadcast_to(point, options[:, :2].shape)], axis=-1
  )
  for box in boxes:
    cost = cost + 25.0 * (overlap(options, box, gap=2.0) > 0)
    if not (box[0] <= point[0] <= box[2] and box[1] <= point[1] <= box[3]):
      cost = cost + 25.0 * crosses(box, ways)
  for segment in segments:
    cost = cost + 7.0 * crosses(options, segment)
  own = np.array([*point, *point]) + np.array([-3, -3, 3, 3])
  return cost + 60.0 * (overlap(options, own) > 0)


def _pair_cost(options, point, other, other_point) -> np.ndarray:
  cost = 400.0 * (overlap(options, other, gap=3.0) > 0)
  here, there = _middle(options), _middle(other)
  cost = cost + 40.0 * crosses(options, (*there, *other_point))
  # My line must not run through the other's label.
  mine = np.concatenate([here, np.broadcast_to(point, here.shape)], axis=-1)
  return cost + 40.0 * crosses(other, mine)


def _middle(box):
  return (box[..., :2] + box[..., 2:]) / 2


def _place(box, point) -> Place:
  x, y = _middle(box)
  gap = np.maximum(np.maximum(box[:2] - point, point - box[2:]), 0)
  return Place(float(x), float(y), bool(np.hypot(*gap) > LEADER))
