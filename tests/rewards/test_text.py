"""Verifiers of text, on what models write and on what nobody should."""

import time
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest

from alignjax.core.errors import UserError
from alignjax.data.tokenizer import ByteTokenizer
from alignjax.rewards import text

TOKENS = ByteTokenizer()


class Facts:
  """Records of a source."""

  def __init__(self, *facts):
    self.facts = facts

  def __len__(self):
    return len(self.facts)

  def records(self, ids):
    return [self.facts[int(i)] for i in ids]


def batch_of(rows, stopped=True, width=64):
  """[(prompt, [responses])]; each response ends with a stop token."""
  count = len(rows[0][1])
  prompt = np.full((len(rows), 64), TOKENS.pad, np.int32)
  response = np.full((len(rows), count, width), TOKENS.pad, np.int32)
  mask = np.zeros(response.shape, bool)
  for b, (said, answers) in enumerate(rows):
    ids = [TOKENS.bos, *TOKENS.encode(said)]
    prompt[b, -len(ids) :] = ids
    for n, answer in enumerate(answers):
      ids = TOKENS.encode(answer) + [TOKENS.eos] * stopped
      response[b, n, : len(ids)] = ids
      mask[b, n, : len(ids)] = True
  ids = np.arange(len(rows), dtype=np.int32)
  return {'id': ids, 'prompt': prompt, 'response': response, 'mask': mask}


def scores(reward, rows, **about):
  assert reward.host and len(reward.names) == 1
  out = reward({}, batch_of(rows, **about), None)
  assert out.shape == (len(rows), len(rows[0][1]), 1)
  assert out.dtype == np.float32
  return out[..., 0].tolist()


@pytest.mark.parametrize(
  'said, number',
  [
    ('The answer is 42.', '42'),
    ('so $1,234.50 in all', '1234.50'),
    ('1,234,567', '1234567'),
    ('1, 2, 3', '3'),
    ('1,2,3', '3'),
    ('12,34', '34'),
    ('it is -7', '-7'),
    ('10-2', '2'),
    ('(3)-5', '5'),
    ('x = +3', '3'),
    ('about .5', '0.5'),
    ('2e3', '2000'),
    ('1.5E-1', '0.15'),
    ('007', '7'),
    ('3.140', '3.14'),
    ('2 or #### 18', '18'),
    ('#### 18 dollars and 5 cents', '18'),
    ('#### 1\n#### 2', '2'),
    ('٣٤', '34'),  # digits of another script are digits
    ('#### none, 3', '3'),
  ],
)
def test_the_number_that_a_text_says(said, number):
  assert text.said(said) == Decimal(number)


@pytest.mark.parametrize(
  'said', ['', 'none', '4 #### none', '²', '٪', '1e99999999999999999999999']
)
def test_texts_without_a_number(said):
  assert text.said(said) is None


def test_large_numbers_are_compared_exactly():
  nines = '9' * 50
  assert text.said(nines) == Decimal(nines)
  assert text.said(nines) != text.said(nines[:-1] + '8')
  assert text.said('1e999999') != Decimal(5)
  assert text.said('9' * 100_000) is not None


@pytest.mark.parametrize(
  'expression, value',
  [
    ('1+2*3', 7),
    ('(1+2)*3', 9),
    ('8/4/2', 1),
    ('8-4-2', 2),
    ('-3 - -4', 1),
    ('--3', 3),
    ('1/3*3', 1),
    ('0.1 + 0.2', Fraction(3, 10)),
    ('2*(3+(4-1))/3', 4),
    ('1' + '0' * 30 + '+1', 10**30 + 1),
  ],
)
def test_the_value_of_an_expression(expression, value):
  assert text.value(expression) == value


@pytest.mark.parametrize(
  'expression',
  [
    '',
    '1/0',
    '1/(2-2)',
    '(1',
    '1)',
    '1 2',
    '1+',
    '*1',
    '1**2',
    '1//2',
    '1..2',
    '()',
    '(' * 10_000 + '1' + ')' * 10_000,
    '(' * 150,
    '-' * 199 + '1' + '+',
    '9' * 1001,
  ],
)
def test_what_has_no_value(expression):
  assert text.value(expression) is None


def test_arithmetic():
  rows = [
    ('What is 3 + 4 =', ['7', 'It is 3 + 4 = 7.', '8', '']),
    ('(2+3)*4=', ['20', '20.0', '2 0', '1e1']),
    ('nothing to add', ['7', '0', '', '1']),
    ('1/0=', ['0', 'inf', '1', '']),
  ]
  reward = text.arithmetic(TOKENS)
  assert scores(reward, rows) == [
    [1, 1, 0, 0],
    [1, 1, 0, 0],
    [0] * 4,
    [0] * 4,
  ]
  cut = scores(reward, rows, stopped=False)
  assert cut == [[0] * 4] * 4
  any_end = text.arithmetic(TOKENS, finished=False)
  assert scores(any_end, rows, stopped=False)[0] == [1, 1, 0, 0]


def test_a_prompt_is_no_expression_from_its_middle_on():
  # Only its end is looked at, and that begins within a number.
  prompt = '1' * 5000 + '+1='
  row = np.array([[TOKENS.bos, *TOKENS.encode(prompt)]])
  batch = batch_of([('', ['2'])]) | {'prompt': row}
  assert text.arithmetic(TOKENS)({}, batch, None) == 0


def test_answers_of_records():
  rows = [('', ['so 72', '#### 72', '71', '72 or 3'])] * 2
  facts = Facts(
    {'name': 'a', 'answer': '48/2 = <<48/2=24>>24\n#### 72'},
    {'name': 'b', 'answer': 71},
  )
  reward = text.answer(TOKENS, facts)
  assert scores(reward, rows) == [[1, 1, 0, 0], [0, 0, 1, 0]]
  assert scores(reward, rows, stopped=False) == [[0] * 4] * 2


def test_bad_records_are_named_before_anything_runs():
  good = {'name': 'rows.jsonl:1', 'answer': '1'}
  with pytest.raises(UserError, match="no 'label' in record rows.jsonl:1"):
    text.answer(TOKENS, Facts(good), field='label')
  bad = {'name': 'rows.jsonl:2', 'answer': 'many'}
  with pytest.raises(UserError, match="rows.jsonl:2: no number in 'answer'"):
    text.answer(TOKENS, Facts(good, bad))


def test_patterns():
  rows = [('', ['a1', '1a', 'b', ''])]
  assert scores(text.pattern(TOKENS, regex=r'\d$'), rows) == [[1, 0, 0, 0]]
  whole = text.pattern(TOKENS, regex=r'[a-z]?', whole=True)
  assert scores(whole, rows) == [[0, 0, 1, 1]]
  with pytest.raises(UserError, match=r"reward.regex: '\('"):
    text.pattern(TOKENS, regex='(')


def test_lengths():
  rows = [('', ['x' * n for n in (0, 3, 5, 7, 11)])]  # and a stop token
  reward = text.length(TOKENS, target=6, tolerance=4)
  assert scores(reward, rows) == [[0, 0.5, 1, 0.5, 0]]
  with pytest.raises(UserError, match='tolerance = 0'):
    text.length(TOKENS, tolerance=0)


HOSTILE = [
  '9' * 50_000,
  '1,' * 20_000,
  '1,000' * 10_000,
  '-' * 50_000,
  '.' * 50_000,
  '(' * 50_000,
  '####' * 10_000,
  '1e' * 20_000,
  '1e999999',
  '1e-999999',
  '\x00\x01\x7f',
  '\u0660\u0967\u2460\U0001d7d8',
  'a' * 50_000 + '!',
]


@pytest.mark.parametrize('said', HOSTILE, ids=range(len(HOSTILE)))
def test_nothing_hostile_raises_or_takes_long(said):
  rewards = [
    text.answer(TOKENS, Facts({'answer': '5'})),
    text.arithmetic(TOKENS),
  ]
  ids = np.array(TOKENS.encode(said) + [TOKENS.eos])
  batch = {
    'id': np.zeros(1, np.int32),
    'prompt': np.array([TOKENS.encode(said + '=')]),
    'response': ids[None, None],
    'mask': np.ones((1, 1, len(ids)), bool),
  }
  begun = time.monotonic()
  for reward in rewards:
    assert reward({}, batch, None).item() in (0.0, 1.0)
  assert time.monotonic() - begun < 5
