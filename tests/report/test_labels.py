import numpy as np
import pytest

from alignjax.report import labels

FRAME = (0.0, 0.0, 600.0, 400.0)


def boxes(places, sizes):
  return [
    (p.x - w / 2, p.y - h / 2, p.x + w / 2, p.y + h / 2)
    for p, (w, h) in zip(places, sizes)
  ]


@pytest.mark.parametrize('seed', range(4))
def test_crowded_labels_do_not_overlap_and_stay_inside(seed):
  rng = np.random.default_rng(seed)
  points = [tuple(p) for p in rng.normal((300, 200), (40, 25), (14, 2))]
  sizes = [(70.0, 14.0)] * len(points)
  got = boxes(labels.place(points, sizes, frame=FRAME), sizes)
  for i, a in enumerate(got):
    assert a[0] >= 0 and a[1] >= 0 and a[2] <= 600 and a[3] <= 400
    for b in got[:i]:
      assert labels.overlap(a, b) == 0


def test_a_lonely_label_is_close_and_has_no_leader():
  (spot,) = labels.place([(300, 200)], [(60, 14)], frame=FRAME)
  assert not spot.leader
  assert abs(spot.x - 300) < 45 and abs(spot.y - 200) < 20


def test_labels_avoid_boxes_and_lines():
  above = (250.0, 203.0, 350.0, 260.0)
  line = (0.0, 200.0, 600.0, 200.0)
  (spot,) = labels.place(
    [(300, 200)], [(60, 14)], boxes=[above], segments=[line], frame=FRAME
  )
  (box,) = boxes([spot], [(60, 14)])
  assert labels.overlap(box, above) == 0
  assert not labels.crosses(np.array([box]), line)[0]


def test_crosses():
  box = np.array([[0.0, 0.0, 1.0, 1.0]])
  assert labels.crosses(box, (-1, 0.5, 2, 0.5))[0]
  assert labels.crosses(box, (0.5, -1, 0.5, 2))[0]
  assert labels.crosses(box, (0.2, 0.2, 0.4, 0.4))[0]
  assert not labels.crosses(box, (-1, 1.5, 2, 1.5))[0]
  assert not labels.crosses(box, (2, 0, 3, 1))[0]


def test_the_way_to_a_far_label_runs_over_no_other_point():
  # Lines leave room far to the right only, and there stands another point.
  point, other = (300.0, 200.0), (320.0, 195.0, 330.0, 205.0)
  lines = [(0.0, y, 345.0, y) for y in range(0, 400, 5)]
  (spot,) = labels.place(
    [point], [(60, 14)], boxes=[other], segments=lines, frame=FRAME
  )
  assert spot.leader and spot.x > 345
  way = (spot.x, spot.y, *point)
  assert not labels.crosses(np.array([other]), way)[0]
