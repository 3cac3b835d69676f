"""An interrupted merge goes on with the leaves that are not finished."""

import os

import jax
import numpy as np
import pytest

from alignjax.core import naming
from alignjax.core.journal import NAME, Journal, Put, checksum
from alignjax.interop import convert
from alignjax.interop.open import open as open_model
from alignjax.merge import driver, inputs, planning
from alignjax.models.config import to_json
from alignjax.models.gemma import gemma
from alignjax.models.shapes import shapes
from alignjax.system import model_dir

CONFIG = gemma(
  family='gemma2',
  vocab_size=64,
  width=8,
  hidden=12,
  layers=2,
  heads=2,
  kv_heads=1,
  head_dim=4,
  window=4,
)


@pytest.fixture(params=['alignjax', 'deepmind', 'hf', 'hf, all leaves large'])
def paths(request, tmp_path, monkeypatch):
  if 'large' in request.param:
    monkeypatch.setattr(inputs, 'HELD_BYTES', 0)
  monkeypatch.setattr(model_dir, 'PART_BYTES', 1)  # a leaf, a part
  for seed in range(2):
    draw = np.random.default_rng(seed).normal
    weights = jax.tree.map(
      lambda x, draw=draw: draw(size=x.shape).astype('f4'),
      naming.nested(shapes(CONFIG)),
    )
    model_dir.write(
      tmp_path / f'own_{seed}',
      config=to_json(CONFIG),
      params={'policy': weights},
      provenance={},
    )
    to, *_ = request.param.split(',')
    opened = open_model(tmp_path / f'own_{seed}')
    convert.run(convert.plan(opened, tmp_path / f'{to}_{seed}', to=to))
  return [tmp_path / f'{to}_{seed}' for seed in range(2)]


def merged(paths, out, stop_after=None, rate=0.3):
  """What was merged, until an interruption."""
  said = []

  def step(text):
    said.append(text)
    if len(said) == stop_after:
      raise KeyboardInterrupt

  base, model = paths
  what = planning.plan(
    'liti', base=base, models=[model], out=out, liti_rate=rate
  )
  try:
    driver.run(what, step)
  except KeyboardInterrupt:
    assert stop_after
  return said


def contents(path):
  opened = open_model(path)
  return {name: opened.load(name).tobytes() for name in opened.leaves}


def test_finished_leaves_are_kept(paths, tmp_path):
  merged(paths, tmp_path / 'whole')
  assert len(merged(paths, tmp_path / 'out', stop_after=9)) == 9
  assert not (tmp_path / 'out').exists()
  assert (tmp_path / '.out.partial').exists()
  said = merged(paths, tmp_path / 'out')
  found = [text for text in said if text.startswith('found')]
  assert 5 <= len(found) <= 9 and len(said) > 20
  assert contents(tmp_path / 'out') == contents(tmp_path / 'whole')
  assert not list(tmp_path.glob('.*')) and not list(tmp_path.glob('out/.*'))


def test_damaged_leaves_are_merged_again(paths, tmp_path):
  merged(paths, tmp_path / 'whole')
  merged(paths, tmp_path / 'out', stop_after=9)
  partial = tmp_path / '.out.partial'
  lines = (partial / '.finished').read_text().splitlines()
  assert len(lines) >= 5
  (partial / '.finished').write_text(
    '\n'.join(lines[:-1]) + '\n' + lines[-1][:-3]  # a line cut off
  )
  file = next(iter(partial.glob('*.safetensors')), None)
  if file is None:
    file = next(iter(partial.rglob('*embedding/0.0')))
  data = bytearray(file.read_bytes())
  data[-20:] = bytes(20)
  file.write_bytes(data)
  merged(paths, tmp_path / 'out')
  assert contents(tmp_path / 'out') == contents(tmp_path / 'whole')


def test_another_merge_begins_anew(paths, tmp_path):
  merged(paths, tmp_path / 'out', stop_after=9)
  said = merged(paths, tmp_path / 'out', rate=0.4)
  assert not [text for text in said if text.startswith('found')]
  merged(paths, tmp_path / 'whole', rate=0.4)
  assert contents(tmp_path / 'out') == contents(tmp_path / 'whole')
  merged(paths, tmp_path / 'more', stop_after=9)
  file = next(path for path in sorted(paths[1].rglob('*')) if path.is_file())
  later = file.stat().st_mtime + 10  # an input that may be another
  os.utime(file, (later, later))
  said = merged(paths, tmp_path / 'more')
  assert not [text for text in said if text.startswith('found')]


def test_an_error_leaves_nothing(paths, tmp_path):
  def step(text):
    raise ValueError('by a caller')

  base, model = paths
  what = planning.plan('liti', base=base, models=[model], out=tmp_path / 'out')
  with pytest.raises(ValueError, match='by a caller'):
    driver.run(what, step)
  assert not [path for path in tmp_path.iterdir() if 'out' in path.name]


def test_a_checksum_tells_what_was_not_written():
  x = np.random.default_rng(0).integers(1, 255, 30_001, np.uint8)
  found = checksum(x)
  assert checksum(x.copy()) == found
  for place in (0, 5000, 29_999):
    for width in (1, 4096):
      other = x.copy()
      other[place : place + width] = 0
      assert checksum(other) != found
  assert len({checksum(x[:n]) for n in (0, 1, 4095, 4096, 4097)}) == 5


def test_a_journal_forgets_lines_that_were_cut(tmp_path):
  journal = Journal(tmp_path)
  assert journal.found == {}
  journal.add('a', '1')
  journal.add('b', '2')
  text = (tmp_path / NAME).read_text()
  (tmp_path / NAME).write_text(text[:-4])
  again = Journal(tmp_path)
  assert again.found == {'a': '1'}
  again.confirm(lambda name: None)
  assert Journal(tmp_path).found == {}
  assert isinstance(Put(print).finished, frozenset)
