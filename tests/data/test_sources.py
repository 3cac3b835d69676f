"""Sources: a batch is a function of (seed, k), prompts fit, documents pack."""

import json

import numpy as np
import pytest

from alignjax.core.errors import UserError
from alignjax.data import pack, sources
from alignjax.data.tokenizer import ByteTokenizer

TOKENS = ByteTokenizer()
CODE = 'def f{i}(x):\n    y = x + {i}\n    return y\n\n\n'


@pytest.fixture
def folder(tmp_path):
  for i in range(30):
    (tmp_path / f'f{i:02}.py').write_text(CODE.format(i=i) * 4)
  return str(tmp_path)


def test_every_row_comes_once_an_epoch_and_epochs_differ():
  rows = sources.Rows({'x': np.arange(10)}, [{}] * 10, 5, 0)
  epochs = [
    np.concatenate([rows.batch(2 * e)['id'], rows.batch(2 * e + 1)['id']])
    for e in range(3)
  ]
  for epoch in epochs:
    assert sorted(epoch) == list(range(10))
  assert epochs[0].tolist() != epochs[1].tolist()
  np.testing.assert_array_equal(rows.batch(7)['x'], rows.batch(7)['x'])
  other = sources.Rows({'x': np.arange(10)}, [{}] * 10, 5, 1)
  assert other.batch(0)['id'].tolist() != rows.batch(0)['id'].tolist()
  third = next(rows.batches(3))
  np.testing.assert_array_equal(third['id'], rows.batch(3)['id'])


def test_prompts_are_whole_lines_and_leave_something_to_write(folder):
  source = sources.prompts(TOKENS, 4, 0, path=folder, prompt_tokens=40)
  batch = source.batch(0)
  assert batch['prompt'].shape == (4, 40)
  for row, fact in zip(batch['prompt'], source.records(batch['id'])):
    ids = row[row != TOKENS.pad]
    assert ids[0] == TOKENS.bos and row[-1] != TOKENS.pad
    assert TOKENS.decode(ids.tolist()) == fact['prompt']
    assert fact['prompt'].endswith('\n') and fact['reference'].strip()


def test_a_single_line_is_cut_between_words(tmp_path):
  file = tmp_path / 'rows.jsonl'
  row = {'question': 'How many apples are left when seven are eaten?'}
  file.write_text(f'{json.dumps(row)}\n' * 3)
  source = sources.prompts(
    TOKENS, 1, 0, path=str(file), field='question', part='all', prompt_tokens=20
  )
  assert {fact['prompt'] for fact in source.facts} == {'How many apples are'}
  assert source.facts[0]['reference'].startswith(' left when')


def test_held_out_files_are_not_trained_on(folder):
  names = {
    part: {
      fact['name'].split('#')[0]
      for fact in sources.prompts(
        TOKENS, 4, 0, path=folder, part=part, held_out=0.3, prompt_tokens=40
      ).facts
    }
    for part in ('train', 'held_out', 'all')
  }
  assert names['train'] and names['held_out']
  assert not names['train'] & names['held_out']
  assert names['train'] | names['held_out'] == names['all']


def test_a_prompt_that_does_not_fit_is_named(tmp_path):
  file = tmp_path / 'prompts.jsonl'
  rows = [{'text': 'short'}, {'text': 'long' * 30}]
  file.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  with pytest.raises(UserError, match='121 tokens is longer than the context'):
    sources.prompts(TOKENS, 1, 0, path=str(file), whole=True, prompt_tokens=32)
  whole = sources.prompts(
    TOKENS, 1, 0, path=str(file), whole=True, prompt_tokens=128
  )
  assert {fact['prompt'] for fact in whole.facts} == {'short', 'long' * 30}


def test_packed_documents_are_whole(folder):
  source = sources.text(TOKENS, 4, 0, path=folder, length=64, part='all')
  tokens, segment = source.fields['tokens'], source.fields['segment']
  position, mask = source.fields['position'], source.fields['loss_mask']
  assert (segment > 0).mean() > 0.6
  for r in range(len(tokens)):
    for s in range(1, segment[r].max() + 1):
      inside = segment[r] == s
      assert tokens[r][inside][0] == TOKENS.bos
      assert position[r][inside].tolist() == list(range(inside.sum()))
      assert mask[r][inside].all()
  assert (position[segment == 0] == -1).all() and not mask[segment == 0].any()
  # Nothing of the text is lost: the pieces of a file are all of it.
  said = sum(TOKENS.decode(row.tolist()).count('return y') for row in tokens)
  assert said == 30 * 4


def test_best_fit_fills_rows():
  lengths = [7, 3, 5, 5, 9, 1, 10]
  documents = [([4] * n, [True] * n) for n in lengths]
  rows = pack.pack(documents, 10)
  assert len(rows['tokens']) == 4
  assert (rows['segment'] > 0).all()


def test_a_part_that_is_empty_is_told(tmp_path):
  (tmp_path / 'only.py').write_text('x = 1\n')
  with pytest.raises(UserError, match='nothing falls into the held_out part'):
    sources.text(
      TOKENS, 1, 0, path=str(tmp_path), part='held_out', held_out=0.01
    )
  with pytest.raises(UserError, match="part: found 'test'"):
    sources.text(TOKENS, 1, 0, path=str(tmp_path), part='test')


@pytest.mark.parametrize('uncond', ['', 'bad code'])
def test_every_row_has_the_negative_prompt(folder, uncond):
  source = sources.prompts(
    TOKENS, 4, 0, path=folder, prompt_tokens=40, uncond=uncond
  )
  batch = source.batch(0)
  assert batch['uncond'].shape == batch['prompt'].shape
  for row in batch['uncond']:
    ids = [TOKENS.bos, *TOKENS.encode(uncond)]
    assert row[-len(ids) :].tolist() == ids
    assert (row[: -len(ids)] == TOKENS.pad).all()
  plain = sources.prompts(TOKENS, 4, 0, path=folder, prompt_tokens=40)
  assert 'uncond' not in plain.batch(0)


def test_a_negative_prompt_that_does_not_fit_is_named(folder):
  with pytest.raises(UserError, match='source.uncond: a prompt of 41 tokens'):
    sources.prompts(
      TOKENS, 4, 0, path=folder, prompt_tokens=40, uncond='x' * 40
    )
