import io

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Annotation
from PIL import Image

from alignjax.core.types import UserError
from alignjax.report import front, ink
from alignjax.report.labels import overlap
from tests.report import synthetic


def labels(evaluation, dpi=72):
  """text -> extent in pixels, as drawn."""
  with ink.style('test'):
    figure = front.draw(evaluation)
    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return {
      a.get_text(): a.get_window_extent(canvas.get_renderer()).extents
      for a in figure.axes[0].texts
      if isinstance(a, Annotation) and a.get_text()
    }


@pytest.mark.parametrize('dpi', [72, 90])
def test_no_label_overlaps_another(dpi):
  got = labels(synthetic.evaluation(), dpi)
  assert {'align_1', 'align_2_anchor', 'lerp', '0.4', 'N=8'} <= set(got)
  names = sorted(got)
  for i, a in enumerate(names):
    for b in names[:i]:
      assert overlap(got[a], got[b]) == 0, (a, b)


def test_models_that_coincide_share_a_label():
  got = labels(synthetic.evaluation())
  assert 'slerp · rate 1' in got and 'init · rate 0' in got
  assert 'slerp' not in got and '1' not in got


def test_the_sweep_ends_at_init_and_slerp():
  evaluation = synthetic.evaluation()
  inner = ('liti_0', 'liti_1')
  evaluation['models'] = [
    m for m in evaluation['models'] if m['name'] not in inner
  ]
  path = front.sweep(evaluation)
  assert [p.rate for p in path] == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
  assert (path[0].name, path[-1].name) == ('init', 'slerp')
  evaluation['models'] = evaluation['models'][:3]
  assert front.sweep(evaluation) == []


def rounds():
  """Two LITI paths from one init, each towards its own SLERP."""
  models = [synthetic.model('init', 'init', 0.45, 0.0)]
  for i in (1, 2):
    mine = [
      synthetic.model(f'{i}, {r:g}', 'liti', 0.45 + 0.1 * i * r, 4 * r, r)
      for r in (0.3, 0.6)
    ]
    mine.append(synthetic.model(f'round {i}', 'slerp', 0.45 + 0.1 * i, 4.0 + i))
    models += [m | {'series': f'round {i}'} for m in mine]
  return {'models': models, 'reference': 'init'}


def test_every_round_has_a_path_of_its_own():
  paths = front.sweeps(rounds())
  assert list(paths) == ['round 1', 'round 2']
  for name, path in paths.items():
    assert [p.rate for p in path] == [0.0, 0.3, 0.6, 1.0]
    assert (path[0].name, path[-1].name) == ('init', name)
  assert front.sweep(rounds()) == paths['round 2']
  drawn = front.front_svg(rounds())
  assert drawn.count('>LITI, round 1<') == 1
  assert drawn.count('>LITI, round 2<') == 1
  assert ink.paler(ink.look('liti').fill, 1) in drawn
  # Rates are written once, along the last path; the merges have names.
  got = labels(rounds())
  assert {'0.3', '0.6', 'round 1', 'round 2', 'init'} == set(got)


def test_a_front_of_one_model_can_be_drawn():
  evaluation = {'models': synthetic.evaluation()['models'][:1]}
  assert 'init' in front.front_svg(evaluation)


def test_svg_is_stable_text_without_anything_remote():
  one = front.front_svg(synthetic.evaluation())
  assert one == front.front_svg(synthetic.evaluation())
  assert 'http' not in one and '<metadata' not in one and '<?xml' not in one
  assert '>align_1<' in one  # text, not paths
  other = front.front_svg(synthetic.evaluation(), 'another chart')
  ids = [set(part.split('id="')[1:]) for part in (one, other)]
  shared = {i.split('"')[0] for i in ids[0]} & {i.split('"')[0] for i in ids[1]}
  assert not shared


def test_png_is_small_and_keeps_the_colours(tmp_path):
  path = tmp_path / 'deep' / 'front.png'
  front.front_png(synthetic.evaluation(), path)
  data = path.read_bytes()
  assert data.startswith(b'\x89PNG') and len(data) < 80_000
  assert [p.name for p in path.parent.iterdir()] == ['front.png']
  pixels = np.asarray(Image.open(io.BytesIO(data)).convert('RGB'), int)
  for look in ink.LOOKS.values():
    want = [int(look.fill[i : i + 2], 16) for i in (1, 3, 5)]
    assert np.abs(pixels - want).max(-1).min() <= 3, look
  front.front_png(synthetic.evaluation(), path)
  assert path.read_bytes() == data


def test_png_that_cannot_be_written(tmp_path):
  (tmp_path / 'front.png').mkdir()
  with pytest.raises(UserError, match='front.png: cannot be written'):
    front.front_png(synthetic.evaluation(), tmp_path / 'front.png')
  assert [p.name for p in tmp_path.iterdir()] == ['front.png']
