"""Records of a teacher: written once, joined by row, refused if others'."""

import json
import sys

import grain
import numpy as np
import pytest

from alignjax.core import lookup
from alignjax.core.errors import UserError
from alignjax.data import sources
from alignjax.data import teacher as records
from alignjax.data.tokenizer import ByteTokenizer, fingerprint, train

TOKENS = ByteTokenizer()
ABOUT = {'k': 3, 'targets': 'counts', 'draw_seed': 0, 'teacher': 'abc'}


@pytest.fixture
def section(tmp_path):
  """Some dozens of rows of 32 tokens, as the section of a config."""
  for i in range(20):
    text = ''.join(f'def f_{i}_{j}():\n  return {j}\n\n' for j in range(9))
    (tmp_path / f'file_{i}.py').write_text(text)
  return lookup.defaults(
    'data', 'sources.text', path=str(tmp_path), length=32, part='all'
  )


def build(section, batch_size=4, seed=0):
  return lookup.build('data', section, TOKENS, batch_size, seed)


def say(batch):
  """A teacher whose records tell which row they are of."""
  shape = (*batch['tokens'][:, 1:].shape, 3)
  ids = np.broadcast_to(batch['id'][:, None, None], shape) + np.arange(3)
  probs = np.broadcast_to(np.float32([0.5, 0.25, 0.25]), shape)
  return ids, probs * (batch['tokens'][:, 1:, None] % 2)


def write(path, source, fn=say, tokens=TOKENS, about=ABOUT, shard_rows=8):
  records.write(path, source, tokens, about, fn, shard_rows=shard_rows)


def joined(path, section, batch_size=4, tokens=TOKENS, seed=0):
  return records.recorded(
    tokens, batch_size, seed, rows=section, path=str(path)
  )


def test_records_come_back_with_their_rows(tmp_path, section):
  source = build(section)
  done = []
  records.write(
    tmp_path / 'out',
    source,
    TOKENS,
    ABOUT,
    say,
    shard_rows=8,
    advance=lambda n, text: done.append(n),
  )
  assert done[-1] == len(source) and done == sorted(done)
  found = joined(tmp_path / 'out', section, batch_size=6, seed=5)
  other = build(section, batch_size=6, seed=5)
  assert len(found) == len(other) and not found.listens
  for k in range(len(source) // 3):  # into the second epoch
    batch, want = found.batch(k), other.batch(k)
    ids, probs = say(want)
    np.testing.assert_array_equal(batch.pop('teacher_ids'), ids)
    np.testing.assert_array_equal(batch.pop('teacher_probs'), probs)
    for name, x in want.items():
      np.testing.assert_array_equal(batch[name], x)
  begun = next(found.batches(3))
  np.testing.assert_array_equal(begun['id'], other.batch(3)['id'])


def test_grain_reads_what_is_written(tmp_path, section):
  source = build(section)
  write(tmp_path / 'out', source)
  files = sorted(str(f) for f in (tmp_path / 'out').glob('*.array_record'))
  assert len(files) == -(-len(source) // 8)
  read = grain.sources.ArrayRecordDataSource(files)
  assert len(read) == len(source)
  head = records._HEAD.unpack_from(read[9])
  assert head[0] == 9


def test_an_interrupted_writing_goes_on(tmp_path, section):
  source, calls = build(section), []

  def dies(batch):
    calls.append(batch['id'])
    if len(calls) == 5:
      raise KeyboardInterrupt
    return say(batch)

  with pytest.raises(KeyboardInterrupt):
    write(tmp_path / 'out', source, dies)
  with pytest.raises(UserError, match='no record of row 16; the same'):
    joined(tmp_path / 'out', section)
  calls.clear()
  write(tmp_path / 'out', source, lambda b: calls.append(b['id']) or say(b))
  assert calls[0][0] == 16  # two whole files were there
  write(tmp_path / 'whole', source)
  for file in sorted((tmp_path / 'whole').iterdir()):
    twin = tmp_path / 'out' / file.name
    assert twin.read_bytes() == file.read_bytes()
  names = {file.name for file in (tmp_path / 'out').iterdir()}
  assert names == {file.name for file in (tmp_path / 'whole').iterdir()}
  # And a third time nothing is computed.
  write(tmp_path / 'out', source, None)


def test_records_of_something_else_are_refused(tmp_path, section):
  out = tmp_path / 'out'
  write(out, build(section))
  trained = train(['def f(x):\n  return x\n'] * 50, tmp_path / 't.model')
  section.length = 48
  with pytest.raises(UserError, match='length = 32, expected 48') as error:
    joined(out, section)
  assert '\n' not in str(error.value)
  section.length = 32
  section.max_bytes = 900
  with pytest.raises(UserError, match='rows = '):
    joined(out, section)
  section.max_bytes = 6_000_000
  with pytest.raises(UserError, match="tokenizer = 'bytes', expected"):
    joined(out, section, tokens=trained)
  # As many rows, of which one reads otherwise.
  file = tmp_path / 'file_3.py'
  file.write_text(file.read_text().replace('return 1', 'return 7'))
  with pytest.raises(UserError, match='rows_digest'):
    joined(out, section)
  with pytest.raises(UserError, match='rows_digest'):
    write(out, build(section))


def test_another_teacher_does_not_go_on(tmp_path, section):
  source = build(section)
  write(tmp_path / 'out', source)
  for change, message in (
    ({'teacher': 'xyz'}, "teacher = 'abc', expected 'xyz'"),
    ({'draw_seed': 1}, 'draw_seed = 0, expected 1'),
    ({'k': 4}, 'k = 3, expected 4'),
  ):
    with pytest.raises(UserError, match=message):
      write(tmp_path / 'out', source, about=ABOUT | change)
  with pytest.raises(UserError, match='left alone'):
    write(tmp_path, source)


def test_a_missing_row_and_damage(tmp_path, section):
  source, out = build(section), tmp_path / 'out'
  write(out, source)
  shard = out / 'teacher-000001.array_record'
  data = shard.read_bytes()
  shard.unlink()
  records._reader.cache_clear()
  with pytest.raises(UserError, match='no record of row 8'):
    joined(out, section)
  # A file of other rows under this name.
  shard.write_bytes((out / 'teacher-000000.array_record').read_bytes())
  records._reader.cache_clear()
  found = joined(out, section)
  with pytest.raises(UserError, match=r'record \d is of row \d, expected row'):
    for k in range(len(source) // 4):
      found.batch(k)
  shard.write_bytes(data[: len(data) // 2])
  records._reader.cache_clear()
  with pytest.raises(UserError, match='teacher-000001.*damaged'):
    joined(out, section)
  (out / 'teacher.json').write_text('[]')
  with pytest.raises(UserError, match='not a teacher'):
    joined(out, section)
  facts = {'format': 1, 'k': 'many', 'rows': 3, 'shard_rows': 4}
  (out / 'teacher.json').write_text(json.dumps(facts))
  with pytest.raises(UserError, match='expected numbers'):
    joined(out, section)
  with pytest.raises(UserError, match='`alignjax teach` writes them'):
    joined(tmp_path / 'nowhere', section)


def test_prompts_have_no_positions_to_teach(tmp_path, section):
  prompts = lookup.defaults('data', 'sources.prompts', path=section.path)
  with pytest.raises(UserError, match='plain sequences'):
    write(tmp_path / 'out', build(prompts))
  assert not (tmp_path / 'out').exists()


def test_without_the_package_it_says_so(tmp_path, section, monkeypatch):
  source = build(section)
  monkeypatch.setitem(sys.modules, 'array_record.python', None)
  with pytest.raises(UserError, match='need the package array_record'):
    write(tmp_path / 'out', source)


def test_fingerprints(tmp_path):
  lines = ['def f(x):\n  return x\n'] * 50
  one = train(lines, tmp_path / 'a.model')
  two = train(lines, tmp_path / 'b.model')
  other = train(['while True:\n  pass\n'] * 50, tmp_path / 'c.model')
  assert fingerprint(one) == fingerprint(two) != fingerprint(other)
  assert fingerprint(TOKENS) == 'bytes'


def test_prompts_with_the_text_that_follows(section):
  found = sources.prompts(
    TOKENS, 4, 0, path=section.path, prompt_tokens=24, response_tokens=10
  )
  response, mask = found.fields['response'], found.fields['mask']
  assert response.shape == mask.shape == (len(found), 1, 10)
  for row, inside, fact in zip(response[:, 0], mask[:, 0], found.facts):
    text = TOKENS.decode(row[inside].tolist())
    assert text and fact['reference'].startswith(text)
  with pytest.raises(UserError, match='response_tokens'):
    sources.prompts(
      TOKENS, 4, 0, path=section.path, whole=True, response_tokens=4
    )
