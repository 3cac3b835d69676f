"""The PNG of a work directory: which chart it is, its size and its colours."""

import io

import numpy as np
import pytest
from PIL import Image

from alignjax.core.errors import UserError
from alignjax.report import ink, picture
from alignjax.report.read import Found
from tests.report import synthetic, test_perplexity, test_tradeoff

PERPLEXITY = test_perplexity.document(*test_perplexity.SEEDS)
TRADEOFF = test_tradeoff.evaluation(test_tradeoff.STEERED + test_tradeoff.SOUP)


def found(evaluation=None, perplexity=None):
  one, other = ({'.': x} if x else {} for x in (evaluation, perplexity))
  return Found([], one, {}, other, {})


def pixels(path):
  image = Image.open(io.BytesIO(path.read_bytes()))
  return np.asarray(image.convert('RGB'), int)


def has(drawn, colour):
  want = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
  return np.abs(drawn - want).max(-1).min() <= 3


def test_it_is_small_and_keeps_the_colours(tmp_path):
  path = tmp_path / 'deep' / 'front.png'
  picture(found(synthetic.evaluation()), path)
  data = path.read_bytes()
  assert data.startswith(b'\x89PNG') and len(data) < 80_000
  assert [p.name for p in path.parent.iterdir()] == ['front.png']
  drawn = pixels(path)
  assert all(has(drawn, look.fill) for look in ink.LOOKS.values())
  picture(found(synthetic.evaluation()), path)
  assert path.read_bytes() == data


def test_other_measures(tmp_path):
  what = found(synthetic.evaluation(), PERPLEXITY)
  path, other = tmp_path / 'front.png', tmp_path / 'wins.png'
  picture(what, path)
  picture(what, other, ('kl', 'win_rate'))
  assert other.read_bytes() != path.read_bytes()
  picture(what, other, ('kl', 'reward'))
  assert other.read_bytes() == path.read_bytes()
  with pytest.raises(UserError, match="'rewrd'; did you mean 'reward'"):
    picture(what, other, ('kl', 'rewrd'))
  with pytest.raises(UserError, match='kl and diversity are not of two models'):
    picture(what, other, ('kl', 'diversity'))


@pytest.mark.parametrize(
  'what, height, looks',
  [
    (found(TRADEOFF), 520, ink.looks(TRADEOFF['models'])),
    (found(perplexity=PERPLEXITY), 420, ink.looks(PERPLEXITY['models'])),
  ],
)
def test_other_charts(tmp_path, what, height, looks):
  path = tmp_path / 'chart.png'
  picture(what, path)
  drawn = pixels(path)
  assert drawn.shape == (1.25 * height, 1250, 3)
  shown = {look.fill for name, look in looks.items() if name != 'init'}
  assert len(shown) > 1 and all(has(drawn, colour) for colour in shown)


def test_nothing_to_draw(tmp_path):
  path = tmp_path / 'chart.png'
  with pytest.raises(UserError, match='draws an evaluation.json or perplexity'):
    picture(found(), path)
  with pytest.raises(UserError, match='draws an evaluation.json, found none'):
    picture(found(perplexity=PERPLEXITY), path, ('kl', 'reward'))
  assert not path.exists()


def test_one_that_cannot_be_written(tmp_path):
  (tmp_path / 'front.png').mkdir()
  with pytest.raises(UserError, match='front.png: cannot be written'):
    picture(found(synthetic.evaluation()), tmp_path / 'front.png')
  assert [p.name for p in tmp_path.iterdir()] == ['front.png']
