import ast
import random
import re
import sysconfig
import textwrap
import time
import warnings
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from alignjax.data.tokenizer import ByteTokenizer
from alignjax.rewards import verify
from alignjax.rewards.verify import INDICATORS, grade_python
from alignjax.stages import score

PROMPT = 'def f(self, x):\n    y = x\n'
GOOD = (
  '    if x > 3:\n'
  '        return self.foo(x, y)\n'
  '    for i in range(3):\n'
  '        y += i\n'
  '    return y\n'
)
MODULES = (
  'argparse bdb calendar cmd copy csv datetime functools gzip inspect queue'
  ' selectors shutil statistics subprocess tarfile tempfile zipapp'
).split()
HACKS = {
  'empty': '',
  'blank': '  \n\n    \n',
  'comments': '    # x = 1\n    # y = 2\n',
  'docstring': '    """Return self.foo(x, y) if a else b."""\n',
  'open docstring': '    """Return self.foo(x, y) if a.\n\n    And so on',
  'strings': '    "a" "b"\n    "c"\n    "d"\n',
  'literals': '    "a", "b", 1, 2.0, (3, "c")\n',
  'pass': '    pass\n' * 8,
  'ellipsis': '    ...\n' * 8,
  'pass and ellipsis': '    pass; ...\n    ...\n    pass\n',
  'one line': '    self.x = x\n' * 6,
  'one long line': '    foo(a, b, c, d, e, f, g, h=1)\n' * 6,
  'one cycle': '    a = b(c, d)\n    for e in f: g(h)\n' * 6,
  'within a line': '    z = ' + 'x + y + ' * 20 + 'x\n',
  'prompt again': PROMPT * 6,
  'brackets': '(' * 100,
  'prose': 'the quick brown fox jumps over the lazy dog and so on\n',
}


def pieces() -> list[tuple[str, str]]:
  """(prompt, continuation) cut from real functions at line ends.

  Only continuations that say something: no comments or long strings, enough
  different words and few repetitions.
  """
  rng, found = random.Random(0), []
  for module in MODULES:
    text = Path(sysconfig.get_path('stdlib'), f'{module}.py').read_text()
    lines = text.split('\n')
    for node in ast.walk(ast.parse(text)):
      if not isinstance(node, ast.FunctionDef):
        continue
      has_doc = ast.get_docstring(node) is not None
      body = node.body[1:] if has_doc else node.body
      if not body:
        continue
      head = lines[node.lineno - 1 : node.body[0].lineno - 1]
      code = lines[body[0].lineno - 1 : node.end_lineno]
      code = textwrap.dedent('\n'.join([*head, *code])).split('\n')
      cut = rng.randint(len(head), max(len(head), len(code) - 5))
      rest = '\n'.join(code[cut : cut + 9]) + '\n'
      if len(set(re.findall(r'\w+', rest))) > 16 and '#' not in rest:
        if not re.search('"""|\'\'\'', '\n'.join(code)):
          piece = '\n'.join(code[:cut]) + '\n', rest
          if grade_python(*piece).indicators['repetition'] < 0.1:
            found.append(piece)
  return rng.sample(found, 40)


@pytest.fixture(scope='module')
def real() -> list[tuple[str, str]]:
  return pieces()


@pytest.mark.parametrize('finished', [True, False])
@pytest.mark.parametrize('hack', HACKS)
def test_hacks_score_near_zero(hack, finished):
  assert grade_python(PROMPT, HACKS[hack], finished=finished).score < 0.1


@pytest.mark.parametrize(
  'hack, indicator',
  [
    ('empty', 'empty'),
    ('blank', 'empty'),
    ('comments', 'comment_only'),
    ('docstring', 'string_only'),
    ('literals', 'string_only'),
    ('pass', 'trivial'),
    ('ellipsis', 'trivial'),
  ],
)
def test_each_hack_has_its_indicator(hack, indicator):
  found = grade_python(PROMPT, HACKS[hack]).indicators
  assert found == {name: float(name == indicator) for name in INDICATORS}


def test_repetition_is_a_share():
  assert grade_python(PROMPT, GOOD).indicators['repetition'] == 0
  six = grade_python(PROMPT, HACKS['one long line']).indicators['repetition']
  assert 0.7 < six < 1
  assert grade_python(PROMPT, PROMPT).indicators['repetition'] > 0.5


def test_real_code_scores_high(real):
  for prompt, rest in real:
    assert grade_python(prompt, rest).score > 0.95, rest


def test_real_code_cut_anywhere_is_never_wrong(real):
  """A half token at the end, or an open bracket, block or string, is fine."""
  for prompt, rest in real:
    for cut in range(len(rest) // 2, len(rest), 7):
      grade = grade_python(prompt, rest[:cut], min_tokens=1, finished=False)
      assert grade.score > 0.9, rest[:cut]


def test_corruption_lowers_the_score(real):
  rng = random.Random(1)
  for prompt, rest in real:
    lines = rest.rstrip('\n').split('\n')
    number = rng.choice([n for n, line in enumerate(lines) if line.strip()])
    lines[number] = lines[number].rstrip() + ' ) = = ('
    bad = grade_python(prompt, '\n'.join(lines) + '\n').score
    assert bad < grade_python(prompt, rest).score


def test_a_later_error_costs_less(real):
  for prompt, rest in real:
    lines = rest.rstrip('\n').split('\n')
    scores = [
      grade_python(
        prompt, '\n'.join([*lines[:n], '= = )', *lines[n:]]) + '\n'
      ).score
      for n in range(len(lines) + 1)
    ]
    assert scores == sorted(scores)
    assert scores[0] < 0.1 < scores[-1]


def test_scores_spread_within_a_line():
  scores = {
    grade_python(PROMPT, f'    z = [{"a, b + c, "[:n]} ? d e f]\n').score
    for n in range(0, 11, 2)
  }
  assert len(scores) > 4


def test_the_unfinished_line_is_graded():
  """A good line does not buy an endless last one without a newline."""
  line = '    if x > 3: return foo(a, b, c)\n'
  clean = grade_python(PROMPT, line + '    ret', finished=False).score
  junk = grade_python(PROMPT, line + '    a b c d ' * 9, finished=False).score
  assert clean == 1
  assert junk < 0.5


def test_short_answers_score_little():
  assert 0 < grade_python(PROMPT, '    return y\n').score < 0.25
  assert grade_python(PROMPT, '    return y\n', min_tokens=2).score == 1


@pytest.mark.parametrize(
  'prompt',
  [
    'garbage here (\n\ndef f(self, x):\n    y = x\n',
    '        if a:\n            b = 1\n    def f(self, x):\n        pass\n',
    'end of a docstring\n"""\ndef f(x):\n    y = x\n',
  ],
)
def test_a_prompt_that_does_not_parse_is_cut_at_its_front(prompt):
  indent = '    ' if prompt.startswith('    ') else ''
  text = ''.join(indent + line for line in GOOD.splitlines(True))
  assert grade_python(prompt, text).score == 1
  assert grade_python(prompt, '= = )\n' + text).score == 0


TEXT = st.text(max_size=200) | st.lists(
  st.sampled_from(
    'def class if else: try: x y ( ) [ ] { } = + , : """ \' \\ \n \t @ # 1 0x'
    ' lambda not f" async \r \x0c \x00 \ud800 é match case return'.split(' ')
    + ['\n    ', '\n        ', ' ', 'def f(x):\n    ']
  ),
  max_size=60,
).map(''.join)


@hypothesis.settings(deadline=None, max_examples=300)
@hypothesis.given(TEXT, TEXT, st.booleans())
def test_any_text_gets_a_score(prompt, completion, finished):
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    grade = grade_python(prompt, completion, finished=finished)
  assert 0 <= grade.score <= 1
  assert set(grade.indicators) == set(INDICATORS)
  assert all(0 <= value <= 1 for value in grade.indicators.values())


@pytest.mark.parametrize('unit', ['(', '-', 'a.', 'if 1:\n', 'x=', 'lambda:'])
def test_deep_nesting_is_no_crash(unit):
  assert grade_python(PROMPT, unit * 30_000).score < 0.2
  assert 0 <= grade_python(unit * 30_000, GOOD).score <= 1


def test_nothing_is_run(tmp_path):
  target = tmp_path / 'written'
  grade_python('', f'open({str(target)!r}, "w").write("x")\n')
  assert not target.exists()


def test_a_grade_is_not_shared():
  grade_python(PROMPT, GOOD).indicators['empty'] = 9.0
  assert grade_python(PROMPT, GOOD).indicators['empty'] == 0


def test_grading_is_fast(real):
  """Loose: 1.5 ms on an idle machine, three times that on a busy one."""
  texts = [(p + '#\n', r[:-9] + ' = = )') for p, r in real]
  start = time.process_time()
  for prompt, rest in texts:
    grade_python(prompt, rest)
  assert (time.process_time() - start) / len(texts) < 4.5e-3


def batch_of(tokenizer, prompts, responses, length=200):
  """Prompts [B] and responses [B][N] of (text, stop id or None)."""
  B, N = len(prompts), len(responses[0])
  prompt = np.zeros((B, 80), np.int32)
  response = np.zeros((B, N, length), np.int32)
  mask = np.zeros((B, N, length), bool)
  for b, text in enumerate(prompts):
    ids = [tokenizer.bos, *tokenizer.encode(text)]
    prompt[b, -len(ids) :] = ids
    for n, (body, stop) in enumerate(responses[b]):
      ids = tokenizer.encode(body) + ([] if stop is None else [stop])
      response[b, n, : len(ids)] = ids
      response[b, n, len(ids) :] = 99  # what lies behind the mask is not read
      mask[b, n, : len(ids)] = True
  return {'prompt': prompt, 'response': response, 'mask': mask}


def test_reward_of_a_batch():
  tokenizer = ByteTokenizer()
  batch = batch_of(
    tokenizer,
    [PROMPT, 'import os\n'],
    [
      [(GOOD, tokenizer.eos), ('', tokenizer.end_of_turn), (GOOD[:-9], None)],
      [('= (', None), ('# no\n', tokenizer.eos), ('\nx = os.sep', None)],
    ],
  )
  reward = verify.python_code(tokenizer)
  assert score.names(reward) == ('score', *INDICATORS)
  found = reward({}, batch, None)
  assert found.shape == (2, 3, 7) and found.dtype == np.float32
  values = dict(zip(score.names(reward), np.moveaxis(found, -1, 0)))
  np.testing.assert_allclose(values['score'][0, :2], [1, 0])
  np.testing.assert_array_equal(values['score'][1, :2], [0, 0])
  assert 0 < values['score'][1, 2] < 1
  np.testing.assert_array_equal(values['truncated'], [[0, 0, 1], [1, 0, 1]])
  np.testing.assert_array_equal(values['empty'], [[0, 1, 0], [0, 0, 0]])
  np.testing.assert_array_equal(values['comment_only'][1], [0, 1, 0])
  lenient = verify.python_code(tokenizer, min_tokens=1)({}, batch, None)
  assert lenient[1, 2, 0] == 1


def test_the_same_response_is_graded_once():
  tokenizer = ByteTokenizer()
  batch = batch_of(tokenizer, [PROMPT], [[('    q = 3\n', tokenizer.eos)] * 3])
  before = verify._grade.cache_info().misses
  for _ in range(2):
    verify.python_code(tokenizer)({}, batch, None)
  assert verify._grade.cache_info().misses == before + 1
