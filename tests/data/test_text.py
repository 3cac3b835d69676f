import json
import os
import zlib

import pytest

from alignjax.core.errors import UserError
from alignjax.data import text
from alignjax.data.text import Document, documents, split


def refused(path, *words, **options):
  with pytest.raises(UserError) as error:
    documents(str(path), **options)
  for word in words:
    assert word in str(error.value)


def test_a_directory_in_order_of_names(tmp_path):
  (tmp_path / 'b').mkdir()
  (tmp_path / 'b' / 'c.py').write_text('x = 1\r\n', newline='')
  (tmp_path / 'a.py').write_text('y = "é"\n')
  (tmp_path / 'empty.py').touch()
  (tmp_path / 'no.txt').write_text('not this')
  assert documents(str(tmp_path)) == [
    Document('a.py', 'y = "é"\n'),
    Document('b/c.py', 'x = 1\n'),
  ]


def test_a_limit_keeps_the_same_part_of_a_directory(tmp_path):
  for n in range(20):
    (tmp_path / f'{n:02}.py').write_text('x' * 10)
  found = documents(str(tmp_path), max_bytes=55)
  assert len(found) == 5 and found == sorted(found)
  assert found == documents(str(tmp_path), max_bytes=55)
  assert [d.name for d in found] != [f'{n:02}.py' for n in range(5)]


def test_a_text_file_and_its_beginning(tmp_path):
  file = tmp_path / 'plays.txt'
  file.write_text('one\ntwo\nthree\n')
  assert documents(str(file)) == [Document('plays.txt', 'one\ntwo\nthree\n')]
  assert documents(str(file), max_bytes=9)[0].text == 'one\ntwo\n'
  refused(file, 'plays.txt', 'first line', 'max_bytes', max_bytes=2)


def test_jsonl_rows(tmp_path):
  file = tmp_path / 'rows.jsonl'
  rows = [{'body': 'a\nb'}, {'body': 'ü', 'n': 1}]
  file.write_text('\n\n'.join(map(json.dumps, rows)))
  assert documents(str(file), field='body') == [
    Document('rows.jsonl:1', 'a\nb'),
    Document('rows.jsonl:3', 'ü', {'n': 1}),
  ]
  assert len(documents(str(file), field='body', max_bytes=3)) == 1


def test_the_standard_library():
  found = documents('stdlib', max_bytes=400_000)
  assert found == documents('', max_bytes=400_000)
  assert 300_000 < sum(len(d.text.encode()) for d in found) <= 400_000
  folders = {part for d in found for part in d.name.split('/')[:-1]}
  assert not folders & {'test', 'tests', 'site-packages', 'encodings'}


@pytest.mark.parametrize(
  'data, words',
  [
    (b'', ['empty']),
    (b' \n\n', ['empty']),
    (b'abc\0def', ['binary', 'byte 3']),
    (b'abc\n\xff\xfe', ['not UTF-8', 'byte 4', '0xff']),
    (b'\xe9t\xe9', ['not UTF-8', 'byte 0', '0xe9']),
  ],
)
def test_a_bad_file_is_named(tmp_path, data, words):
  (tmp_path / 'bad.txt').write_bytes(data)
  refused(tmp_path / 'bad.txt', 'bad.txt', *words)


@pytest.mark.parametrize(
  'row, words',
  [
    (b'{"txt": "a", "id": 3}', ["no field 'text'", 'txt, id']),
    (b'{"text": "a"', ['not JSON']),
    (b'["a"]', ['list', 'object']),
    (b'{"text": 3}', ['int', 'string']),
    (b'{"text": " "}', ['nothing', "'text'"]),
    (b'{"text": "\xff"}', ['not UTF-8', 'byte 10', '0xff']),
    (b'{"text": "\\ud800"}', ['surrogate', "'text'"]),
  ],
)
def test_a_bad_row_is_named(tmp_path, capsys, row, words):
  file = tmp_path / 'rows.jsonl'
  file.write_bytes(b'{"text": "fine"}\n' + row + b'\n')
  refused(file, 'rows.jsonl', 'row 2', *words, max_bad=0)
  assert [d.text for d in documents(str(file))] == ['fine']
  assert 'skipped 1 of 2 rows' in capsys.readouterr().err
  file.write_bytes(row)
  refused(file, 'row 1', *words)


def test_other_bad_sources(tmp_path):
  refused(tmp_path / 'none', 'none', 'no such file')
  refused(tmp_path, "'*.py'", 'no file')
  (tmp_path / 'a.py').touch()
  refused(tmp_path, 'empty')
  (tmp_path / 'b.jsonl').write_bytes(b'{"text": "\0"}')
  refused(tmp_path / 'b.jsonl', 'binary', 'row 1')
  (tmp_path / 'c.jsonl').touch()
  refused(tmp_path / 'c.jsonl', 'empty')
  refused(tmp_path, 'max_bytes', max_bytes=0)


def test_bad_files_of_a_directory_up_to_a_limit(tmp_path, capsys):
  (tmp_path / 'good.py').write_text('x = 1\n')
  for n in range(3):
    (tmp_path / f'bad{n}.py').write_bytes(b'\xff')
  assert [d.name for d in documents(str(tmp_path), max_bad=3)] == ['good.py']
  assert 'skipped 3 of 4 files' in capsys.readouterr().err
  refused(tmp_path, '3 of 4', 'not UTF-8', max_bad=2)
  os.remove(tmp_path / 'good.py')
  refused(tmp_path, 'not UTF-8')


CODE = '''"""Doc

not a block
"""
import os
import zlib
import sys

# About f.
@wraps
def f(
  x,
):
  return x

  # still f

if a:
  b

else:
  c

class A:

# def gone(self): pass

  y = """
Unindented

text
"""
'''


def test_pieces_are_whole_blocks():
  blocks = split(Document('a', CODE), 40)
  assert [b.split('\n')[0] for b in blocks] == [
    '"""Doc',
    'import sys',
    '# About f.',
    'if a:',
    'class A:',
  ]
  whole = split(Document('a', CODE), 75)
  assert any('# About f.' in p and 'still f' in p for p in whole)
  assert split(Document('a', CODE), 10_000) == [CODE]


def test_pieces_fit_and_are_in_the_document():
  for document in documents(max_bytes=300_000):
    for piece in split(document, 300):
      assert 0 < len(piece) <= 300 and piece.endswith('\n')
      assert piece.rstrip() in document.text
      assert not piece[0].isspace() and piece[0] not in ')]}'


def test_nothing_is_lost_where_blocks_are_short():
  lines = [f'x{n} = {n}\n\n' for n in range(100)]
  pieces = split(Document('a', ''.join(lines)), 50)
  assert ''.join(pieces).split() == ''.join(lines).split()
  assert max(map(len, pieces)) > 40


def test_prose_with_odd_quotes_still_splits():
  pieces = split(Document('a', "a ''' quote\n\nsecond\n\nthird\n"), 12)
  assert pieces == ["a ''' quote\n", 'second\n', 'third\n']


def test_a_line_beyond_the_limit_is_dropped():
  assert split(Document('a', 'x' * 99 + '\n\nshort\n'), 20) == ['short\n']
  assert split(Document('a', '\n \n'), 20) == []


def test_held_out_is_a_stable_share():
  names = [f'folder/file{n}.py' for n in range(2000)]
  held = {n for n in names if text.held_out(n, 0.1)}
  assert 150 < len(held) < 250
  assert held < {n for n in names if text.held_out(n, 0.2)}
  assert not any(text.held_out(n, 0.0) for n in names)
  assert all(text.held_out(n, 1.0) for n in names)
  # crc32 of a name does not change between runs, machines and versions.
  assert [text.held_out(n, 0.5) for n in ('a.py', 'b.py', 'c.py')] == [
    zlib.crc32(n) < 2**31 for n in (b'a.py', b'b.py', b'c.py')
  ]
