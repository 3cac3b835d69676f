import numpy as np
import pytest

from alignjax.cli import inspect
from alignjax.core.types import UserError
from alignjax.system import model_dir


@pytest.fixture(autouse=True)
def models(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for seed, name in enumerate(['base', 'a', 'b']):
    draw = np.random.default_rng(seed).normal
    leaves = {
      f'layer_{i}/attn/q': draw(size=(3, 2)).astype(np.float32)
      for i in range(11)
    }
    model_dir.write(
      name,
      config={'width': 3},
      params={'policy': leaves.items()},
      provenance={'by': name},
    )


def test_inspect_shows_leaves_and_provenance(capsys):
  assert inspect.main(['base']) == 0
  said = capsys.readouterr().out
  assert '66 parameters' in said and '3 x 2' in said and 'float32' in said
  assert '"by": "base"' in said and '"width": 3' in said
  assert said.index('layer_2/') < said.index('layer_10/')


def test_inspect_diff_measures_the_task_vector(capsys):
  assert inspect.main(['base', '--diff', 'a']) == 0
  rows = {}
  for line in capsys.readouterr().out.splitlines():
    cells = line.replace('│', '|').split('|')
    if len(cells) == 5 and cells[1].strip() in ('layer_10', 'all'):
      rows[cells[1].strip()] = [float(cell) for cell in cells[2:4]]
  base, a = (
    np.stack(
      [
        model_dir.load(model_dir.read(p))[f'layer_{i}']['attn']['q']
        for i in range(11)
      ]
    )
    for p in ('base', 'a')
  )
  for row, (x, y) in {'layer_10': (base[10], a[10]), 'all': (base, a)}.items():
    moved = np.linalg.norm(y - x)
    expected = [moved, moved / np.linalg.norm(x)]
    np.testing.assert_allclose(rows[row], expected, rtol=1e-3)


def test_inspect_refuses_what_is_no_model(tmp_path):
  with pytest.raises(UserError, match='no model directory'):
    inspect.main(['absent'])
