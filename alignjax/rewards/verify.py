"""Verifiable rewards: what a program on the host can check about a text.

`python_code` asks how far Python's own parser accepts a response as the
continuation of its prompt. It refuses to run the text, to judge what the code
does, and to know token ids: text comes from a tokenizer that is passed in.

A prefix of a source file is viable when some continuation of it parses. The
parser says so itself (the flag behind `codeop` and the interactive prompt),
and viability is monotone: a prefix of a viable prefix is viable. So the length
of the longest viable prefix, in tokens, is found by bisection, and

  score = accepted share * min(1, distinct / min_tokens) * originality

over the tokens that say something: comments, docstrings and other statements
made only of literals, `pass` and `...` do not count, all numbers are one token
to `distinct` and so are all strings, and originality falls from 1 to 0 as runs
of five tokens repeat what the response or its prompt has said already. Hence
empty, comment-only, string-only and repetitive texts and copies of the prompt
score near 0, and short ones little.
"""

import ast
import functools
import itertools
import re
import warnings
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from alignjax.core.types import Batch, Reward

INDICATORS = (
  'empty',
  'comment_only',
  'string_only',
  'repetition',
  'trivial',
  'truncated',
)

# Parse only, and say 'incomplete input' where the text ends too early
# (codeop.PyCF_ALLOW_INCOMPLETE_INPUT, the same in Python 3.11 to 3.13).
_FLAGS = ast.PyCF_ONLY_AST | 0x4000
# Longer texts are graded on their beginning: deep nesting costs the parser
# memory, and no response of a sampler comes near this.
_MAX_CHARS = 20_000
_MAX_LINES = 100  # of a prompt that does not parse as it is
# 95 in 100 pieces of the standard library repeat less than this share of
# their runs of five tokens.
_RUN = 5
_TOLERATED = 0.3
_TRIVIAL = frozenset({'pass', '...', 'Ellipsis'})
_SILENT = _TRIVIAL | set('()[]{},:;+-')
_LEXEME = re.compile(
  r"""
  (?P<string>[rbfuRBFU]{0,2}(?:
      \"\"\"(?:[^\\]|\\.)*?(?:\"\"\"|\\?\Z)
    | '''(?:[^\\]|\\.)*?(?:'''|\\?\Z)
    | "(?:[^"\\\n]|\\.)*"?
    | '(?:[^'\\\n]|\\.)*'?))
  | (?P<comment>\#[^\n]*)
  | (?P<newline>\n)
  | (?P<space>(?:[^\S\n]|\\\n)+)
  | (?P<name>[^\W\d]\w*)
  | (?P<number>\.?\d[\w.]*)
  | (?P<op>\.\.\.|->|:=|(?:\*\*|//|<<|>>)=?|[-+*/%&|^<>=!@]=|.)
  """,
  re.VERBOSE | re.DOTALL,
)


class Text(Protocol):
  """What a reward needs of a tokenizer."""

  @property
  def stop(self) -> tuple[int, ...]: ...

  def decode(self, ids: Sequence[int], /) -> str: ...


class Grade(NamedTuple):
  """A score in [0, 1] and what a hack would look like.

  Indicators: `empty`, `comment_only`, `string_only` (nothing but strings,
  other literals and comments), `trivial` (nothing but pass and ellipsis
  besides) and `truncated` (no stop token) are 0 or 1; `repetition` is the
  share of runs of five tokens that occurred before, prompt included.
  """

  score: float
  indicators: dict[str, float]


class _Token(NamedTuple):
  kind: str
  text: str
  begin: int
  end: int
  cut: int  # where a text that ends with this token is cut; 0 = mid-line


class _Lexed(NamedTuple):
  tokens: list[_Token]
  counts: list[bool]  # per token: does it say something?
  comments: bool


def _error(source: str) -> tuple[int, int] | None:
  """None for a viable source, else about where it fails: (line, column)."""
  try:
    compile(source, '<response>', 'exec', _FLAGS, dont_inherit=True)
  except SyntaxError as error:
    if 'incomplete input' in str(error.msg):
      return None
    return error.lineno or 0, error.offset or 0
  except (ValueError, OverflowError, MemoryError, RecursionError, SystemError):
    return 0, 0  # NUL, lone surrogates, nesting beyond the parser's stack
  return None


def _lex(source: str, start: int) -> _Lexed:
  """Tokens of the source, and whether there are comments after `start`.

  More forgiving than Python's tokenizer, which stops at the first error: what
  was rejected has to be counted as well.
  """
  tokens: list[_Token] = []
  counts: list[bool] = []
  depth, comments = 0, False

  def close():
    statement = tokens[len(counts) :]
    counts.extend([not _silent(statement)] * len(statement))

  for match in _LEXEME.finditer(source):
    kind, begin, end = match.lastgroup or 'op', match.start(), match.end()
    if kind == 'newline':
      if tokens and not tokens[-1].cut:
        tokens[-1] = tokens[-1]._replace(cut=end)
      if not depth:
        close()
    elif kind == 'comment':
      comments |= begin >= start
    elif kind != 'space':
      text = match.group()
      tokens.append(_Token(kind, text, begin, end, 0))
      if text in '([{':
        depth += 1
      elif text in ')]}' and depth:
        depth -= 1
  close()
  return _Lexed(tokens, counts, comments)


def _silent(statement: list[_Token]) -> bool:
  """True for docstrings, pass, ... and other statements of mere literals."""
  return all(
    t.kind in ('string', 'number') or t.text in _SILENT for t in statement
  )


def _until(source: str, token: _Token) -> str:
  """Source up to and with a token, so that only real errors are errors.

  Within a line a backslash stands for 'to be continued': without it the end
  of the text would also be the end of the statement.
  """
  return source[: token.cut] if token.cut else source[: token.end] + ' \\\n'


def _accepted(source: str, tokens: list[_Token]) -> int:
  """How many leading tokens the parser accepts."""
  if not tokens:
    return 0
  error = _error(_until(source, tokens[-1]))
  if error is None:
    return len(tokens)
  # The reported place is a hint only ("'(' was never closed").
  line, column = error
  lines = source.split('\n', line)[: max(line - 1, 0)]
  place = sum(map(len, lines)) + len(lines) + column - 1
  ends = [token.end for token in tokens]
  hint = bisect_right(ends, max(place, 0))
  low, high = 0, len(tokens) - 1  # accepted is in [low, high]
  for probe in (hint, hint + 1):
    if low < probe <= high:
      if _error(_until(source, tokens[probe - 1])) is None:
        low = probe
      else:
        high = probe - 1
        break

  def rejected(count: int) -> bool:
    return _error(_until(source, tokens[count - 1])) is not None

  return bisect_left(range(high + 1), True, low + 1, key=rejected) - 1


def _scaffolds(prompt: str) -> Iterator[str]:
  """Suffixes of the prompt from its line starts, made to stand alone.

  A suffix that starts indented gets the blocks around it that it needs.
  """
  lines = prompt.split('\n')[-_MAX_LINES:]
  widths = [len(x) - len(x.lstrip(' ')) if x.strip() else 0 for x in lines]
  for i in range(len(lines)):
    levels = {*range(0, widths[i], 4), *widths[i:]}
    heads = [' ' * w + 'if 1:\n' for w in sorted(levels) if w < widths[i]]
    yield ''.join(heads) + '\n'.join(lines[i:])


@functools.lru_cache(maxsize=4096)
def _viable(prompt: str) -> str:
  """The prompt, or the longest part of its end that Python can continue."""
  for suffix in itertools.chain([prompt], _scaffolds(prompt)):
    whole = not suffix or suffix.endswith('\n')
    if _error(suffix if whole else suffix + ' \\\n') is None:
      # The end of a cut docstring looks like the beginning of one.
      if suffix is prompt or not _ends_in_string(suffix):
        return suffix
  return ''


def _ends_in_string(source: str) -> bool:
  tokens = _lex(source, 0).tokens
  return bool(tokens) and tokens[-1].kind == 'string' and not tokens[-1].cut


def _repetition(said: list[str], words: list[str]) -> float:
  """Share of the runs of words that repeat earlier ones, or `said`."""
  before = set(zip(*(said[i:] for i in range(_RUN))))
  runs = list(zip(*(words[i:] for i in range(_RUN))))
  return 1 - len(set(runs) - before) / len(runs) if runs else 0.0


def _content(tokens: list[_Token], min_tokens: int) -> float:
  kinds = ('string', 'number')
  distinct = {t.kind if t.kind in kinds else t.text for t in tokens}
  return min(1.0, len(distinct) / max(min_tokens, 1))


@functools.lru_cache(maxsize=16_384)
def _grade(prompt: str, completion: str, min_tokens: int, finished: bool):
  completion = completion[:_MAX_CHARS]
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')  # "invalid escape sequence" and the like
    prompt = _viable(prompt[-_MAX_CHARS:])
    source = prompt + completion + ('\n' if finished else '')
    tokens, counts, comments = _lex(source, len(prompt))
    first = bisect_left(tokens, len(prompt), key=lambda t: t.begin)
    said = [t.text for t, says in zip(tokens[:first], counts) if says]
    tokens, counts = tokens[first:], counts[first:]
    if not finished and tokens and not tokens[-1].cut:
      tokens, counts = tokens[:-1], counts[:-1]  # may have been cut short
    length = _accepted(source, tokens)
  words = [t.text for t, says in zip(tokens, counts) if says]
  kept = [t for t, says in zip(tokens[:length], counts) if says]
  repetition = _repetition(said, words)
  score = 0.0
  if kept:
    # Of the accepted part: junk after it must not dilute what it repeats.
    fresh = 1 - _repetition(said, [t.text for t in kept])
    original = min(1.0, fresh / (1 - _TOLERATED)) ** 3
    score = len(kept) / len(words) * _content(kept, min_tokens) * original
  empty = not completion.strip()
  silent = not words and not empty
  trivial = any(t.text in _TRIVIAL for t in tokens)
  comment_only = not tokens and comments
  return score, (
    float(empty),
    float(silent and comment_only),
    float(silent and not trivial and not comment_only),
    repetition,
    float(silent and trivial),
    float(not finished),
  )


def grade_python(
  prompt: str,
  completion: str,
  *,
  min_tokens: int = 12,
  finished: bool = True,
) -> Grade:
  """Grade how far Python accepts `completion` after `prompt`; never raises.

  Args:
    prompt: the beginning of a source file, from a top-level statement to any
      line end. If it does not parse as such, its longest ending that does.
    completion: the continuation.
    min_tokens: distinct significant tokens below which the score is scaled
      down.
    finished: whether the completion ended by itself. If not, its last token
      may be half a token and is left out.

  An open block, bracket or string at the end is incomplete, not wrong.
  """
  score, values = _grade(prompt, completion, min_tokens, finished)
  return Grade(score, dict(zip(INDICATORS, values)))


def _grades(tokenizer: Text, batch: Any, min_tokens: int) -> list[list[Grade]]:
  """Grades by row and response, [B][N]."""
  prompts = np.asarray(batch['prompt']).tolist()
  responses = np.asarray(batch['response'])
  masks = np.asarray(batch['mask'])
  stop = frozenset(tokenizer.stop)

  def grade(prompt: str, ids: list[int]) -> Grade:
    return grade_python(
      prompt,
      tokenizer.decode(ids),
      min_tokens=min_tokens,
      finished=bool(ids) and ids[-1] in stop,
    )

  texts = map(tokenizer.decode, prompts)
  return [
    [grade(text, ids[mask].tolist()) for ids, mask in zip(*row)]
    for text, *row in zip(texts, responses, masks)
  ]


def python_code(tokenizer: Text, *, min_tokens: int = 12) -> Reward:
  """Reward in [0, 1] of Python source: (bundle, batch, key) -> f32 [B, N, 7].

  The first score is the reward; the others, named in `names`, are the hack
  indicators of `grade_python`, to be logged. Runs on the host. Reads `prompt`,
  `response` and `mask`; a response is finished when its last token is a stop
  token.
  """

  def reward(bundle: Any, batch: Batch, key: Any) -> Any:
    del bundle, key
    rows = _grades(tokenizer, batch, min_tokens)
    return np.array(
      [
        [(g.score, *(g.indicators[name] for name in INDICATORS)) for g in row]
        for row in rows
      ],
      np.float32,
    )

  reward.names = ('score', *INDICATORS)
  reward.host = True
  return reward
