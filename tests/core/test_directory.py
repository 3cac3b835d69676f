import shutil

import pytest
from etils import epath

from alignjax.core import directory


def test_an_old_directory_comes_back_if_the_new_one_cannot_move(tmp_path):
  path = epath.Path(tmp_path) / 'out'
  path.mkdir()
  (path / 'mark').write_text('old')
  with pytest.raises(OSError):
    with directory.replaced(path, 0) as partial:
      shutil.rmtree(partial)
  assert (path / 'mark').read_text() == 'old'
  assert [file.name for file in tmp_path.iterdir()] == ['out']


def test_leftovers_of_a_killed_run_do_not_get_in(tmp_path):
  path = epath.Path(tmp_path) / 'out'
  (tmp_path / '.out.partial').mkdir()
  (tmp_path / '.out.partial' / 'stale').write_text('')
  with directory.replaced(path, 0) as partial:
    assert not path.exists()
    (partial / 'mark').write_text('new')
  assert [file.name for file in path.iterdir()] == ['mark']
