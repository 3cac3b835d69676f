"""Verifiers of text on texts of every kind, hostile ones among them."""

from decimal import Decimal

import numpy as np
import pytest

from alignjax.core.types import UserError
from alignjax.data.tokenizer import ByteTokenizer
from alignjax.rewards import text

TOKENS = ByteTokenizer()


def batch_of(prompts, responses, *, finished=True):
  """Rows of one response each, ended by a stop token if `finished`."""
  end = [TOKENS.stop[0]] if finished else []
  ids = [TOKENS.encode(x) + end for x in responses]
  width = max(map(len, ids)) + 1
  response = np.zeros((len(ids), 1, width), np.int32)
  for row, x in zip(response, ids):
    row[0, : len(x)] = x
  lengths = np.array([len(x) for x in ids])
  encoded = [[TOKENS.bos, *TOKENS.encode(x)] for x in prompts]
  wide = max(map(len, encoded))
  prompt = np.zeros((len(ids), wide), np.int32)
  for row, x in zip(prompt, encoded):
    row[-len(x) :] = x
  return {
    'id': np.arange(len(ids)),
    'prompt': prompt,
    'response': response,
    'mask': np.arange(width) < lengths[:, None, None],
  }


def scores(reward, prompts, responses, **more):
  out = reward({}, batch_of(prompts, responses, **more), None)
  assert out.shape == (len(responses), 1, 1) and out.dtype == np.float32
  return out[:, 0, 0].tolist()


def test_patterns():
  somewhere = text.pattern(TOKENS, regex=r'\bcat\b')
  assert scores(somewhere, ['', ''], ['a\ncat.', 'concat']) == [1, 0]
  whole = text.pattern(TOKENS, regex=r'<a>.*</a>', whole=True)
  assert scores(whole, [''] * 2, ['<a>x\ny</a>', '<a>x</a> ']) == [1, 0]
  with pytest.raises(UserError, match=r"reward.regex: '\(': "):
    text.pattern(TOKENS, regex='(')


def test_lengths_count_tokens():
  reward = text.length(TOKENS, target=4, tolerance=2)
  found = scores(reward, [''] * 4, ['abc', 'ab', 'a', 'abcde'])
  assert found == [1, 0.5, 0, 0]  # the stop token counts
  with pytest.raises(UserError, match='tolerance = 0'):
    text.length(TOKENS, tolerance=0)


def test_arithmetic_is_read_and_never_run():
  reward = text.arithmetic(TOKENS)
  prompts = ['2 + 3 * (4 - 1) =', 'What is 7/2=', 'no sum', '1/0 =', '5 =']
  right = ['11', 'it is 3.50', '1', '0', '5.0']
  assert scores(reward, prompts, right) == [1, 1, 0, 0, 1]
  assert scores(reward, prompts[:1], ['so 11 it is, not 12']) == [0]
  assert scores(reward, prompts[:1], ['11'], finished=False) == [0]
  lenient = text.arithmetic(TOKENS, finished=False)
  assert scores(lenient, prompts[:1], ['11'], finished=False) == [1]


@pytest.mark.parametrize(
  'written, expected',
  [
    ('#### 1,234', '1234'),
    ('3 then #### 5 and #### -7. 8', '-7'),
    ('the answer is $12.50.', '12.5'),
    ('+.5', '0.5'),
    ('4 before #### none', None),
    ('nothing', None),
    ('', None),
    ('9' * 5000, None),
    ('1,2,3,', '123'),
  ],
)
def test_answers_are_found(written, expected):
  found = text.said(written)
  if expected is None and written.startswith('9'):
    assert found is not None  # a number, however long
  else:
    assert found == (None if expected is None else Decimal(expected))


@pytest.mark.parametrize(
  'expression',
  ['(' * 5000 + '1' + ')' * 5000, '-' * 5000 + '1', '1+' * 5000 + '1', '9**9'],
)
def test_hostile_expressions_have_no_value(expression):
  assert text.value(expression) is None


def test_values():
  for expression, expected in [
    ('2*-3', '-6'),
    ('(1+2)*(3-4)/2', '-1.5'),
    ('--1', '1'),
    ('1.5*2', '3'),
    ('1 2', None),
    ('(1', None),
    ('1)', None),
    ('', None),
    ('9' * 150 + '*' + '9' * 150, 'big'),
  ]:
    found = text.value(expression)
    if expected == 'big':
      assert found is not None
    else:
      assert found == (None if expected is None else Decimal(expected))


class Source:
  def __init__(self, *facts):
    self.facts = facts

  def records(self, ids):
    return [self.facts[i] for i in ids]


def test_answers_of_records():
  source = Source(
    {'name': 'r:1', 'answer': 'so 3+4\n#### 7'},
    {'name': 'r:2', 'answer': '1,000'},
  )
  reward = text.answer(TOKENS, source)
  assert scores(reward, ['', ''], ['it is 7', '#### 1000.0']) == [1, 1]
  assert scores(reward, ['', ''], ['8', '']) == [0, 0]
  with pytest.raises(UserError, match="no 'label' in record r:1; found"):
    text.answer(TOKENS, source, field='label')
  with pytest.raises(UserError, match="record r:9: no number in 'answer'"):
    text.answer(TOKENS, Source({'name': 'r:9', 'answer': 'none'}))
