import sys

import pytest

from alignjax.core import lookup
from alignjax.core.errors import UserError

PARTS = """
from typing import Literal

def polite(
  model, *, scale=2, bonus: float = 1, rows: int = 3, clip: float | None = None,
  limit: int | None = None, kind: Literal['a', 'b'] = 'a', on=True,
  shape: tuple[int, ...] = (1, 2), fn=len,
):
  return dict(locals())

def needy(*, size: int):
  return size
"""


@pytest.fixture
def parts(tmp_path, monkeypatch):
  (tmp_path / 'my_parts').mkdir()
  (tmp_path / 'my_parts' / 'rewards.py').write_text(PARTS)
  monkeypatch.syspath_prepend(tmp_path)
  yield 'my_parts.rewards.polite'
  for name in [n for n in sys.modules if n.startswith('my_parts')]:
    del sys.modules[name]


def test_find_a_function_of_its_files_name_and_a_dotted_one():
  assert lookup.find('core', 'lookup.find') is lookup.find
  assert lookup.find('core', 'tree.lerp').__module__ == 'alignjax.core.tree'
  room = 'cli'  # no file there is named as its function
  assert lookup.find(room, 'console.call').__name__ == 'call'


def test_names_come_from_the_sources():
  assert 'tree.named' in lookup.names('core')
  assert not any('._' in name for name in lookup.names('core'))


@pytest.fixture
def room(tmp_path, monkeypatch):
  """A package whose room 'recipes' has bond.py, broken.py, verify.py."""
  folder = tmp_path / 'recipes'
  folder.mkdir()
  (folder / 'bond.py').write_text('def bond():\n  pass\ndef helper(): pass\n')
  (folder / 'verify.py').write_text('def code(): pass\ndef _no(): pass\n')
  monkeypatch.setattr(lookup, '_PACKAGE', tmp_path)
  return 'recipes'


def test_names_own_name_or_file_dot_function(room):
  assert lookup.names(room) == ['bond', 'verify.code']


@pytest.mark.parametrize(
  'name, hint',
  [
    ('bnod', "did you mean 'bond'"),
    ('verify.cod', "did you mean 'verify.code'"),
    ('no_such_pkg.part', 'known: bond, verify.code'),
    ('../etc', 'known: bond'),
    ('', 'known: bond'),
    ('json.decoder', 'known: bond'),  # a module, not a function
  ],
)
def test_unknown_name_gives_the_nearest_and_the_list(room, name, hint):
  with pytest.raises(UserError, match='no .* in recipes') as error:
    lookup.find(room, name)
  assert hint in str(error.value)


def test_outside_name_is_imported(parts):
  assert lookup.find('rewards', parts).__name__ == 'polite'


def test_an_import_error_inside_a_part_is_not_hidden(parts, tmp_path):
  (tmp_path / 'my_parts' / 'broken.py').write_text('import not_installed_x')
  with pytest.raises(ModuleNotFoundError, match='not_installed_x'):
    lookup.find('rewards', 'my_parts.broken.part')


def test_defaults_types(parts):
  section = lookup.defaults('rewards', parts)
  assert section.name == parts
  assert 'fn' not in section  # neither a number nor a name
  assert 'model' not in section
  assert section.scale == 2.0 and isinstance(section.scale, float)
  assert isinstance(section.bonus, float)
  assert isinstance(section.rows, int)
  assert section.on is True and section.shape == (1, 2)
  assert section.clip is None and section.get_type('clip') is float
  assert section.limit is None and section.get_type('limit') is int


def test_defaults_changed(parts):
  section = lookup.defaults('rewards', parts, scale=5, clip=1, shape=[3])
  assert (section.scale, section.clip, section.shape) == (5.0, 1.0, (3,))
  assert isinstance(section.clip, float)


@pytest.mark.parametrize(
  'changed, sentence',
  [
    ({'bonsu': 1.0}, "no field 'bonsu'; did you mean 'bonus'"),
    ({'rows': 0.1}, "'rows' takes a whole number, found 0.1"),
    ({'bonus': True}, "'bonus' takes a number, found True"),
    ({'kind': 3}, "'kind' takes a string, found 3"),
    ({'on': 1}, "'on' takes true or false, found 1"),
    ({'bonus': None}, "'bonus' cannot be None"),
  ],
)
def test_defaults_refuses(parts, changed, sentence):
  with pytest.raises(UserError) as error:
    lookup.defaults('rewards', parts, **changed)
  assert sentence in str(error.value)


def test_a_keyword_without_default_needs_a_value(parts):
  needy = parts.replace('polite', 'needy')
  with pytest.raises(UserError, match="needs a value for 'size'"):
    lookup.defaults('rewards', needy)
  section = lookup.defaults('rewards', needy, size=3)
  assert lookup.build('rewards', section) == 3


def test_build_passes_parts_and_numbers(parts):
  section = lookup.defaults('rewards', parts, rows=7)
  got = lookup.build('rewards', section, 'the model')
  assert got['model'] == 'the model'
  assert got['rows'] == 7 and got['clip'] is None and got['fn'] is len


def test_build_takes_a_section_read_from_json(parts):
  section = {'name': parts, 'bonus': 3, 'shape': [4, 5]}
  got = lookup.build('rewards', section, None)
  assert isinstance(got['bonus'], float) and got['shape'] == (4, 5)
  for wrong, sentence in [
    ({'bnous': 3}, "did you mean 'bonus'"),
    ({'rows': 1.5}, 'takes a whole number'),
    ({'rows': None}, 'cannot be None'),
  ]:
    with pytest.raises(UserError, match=sentence):
      lookup.build('rewards', {'name': parts} | wrong, None)
