"""Verifiers of text: a pattern, a length, the number at its end.

All run on the host and take what they need from a tokenizer. Scores are 0 or 1
unless said otherwise; none of them raises on any text.
"""

import re
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np

from alignjax.core.errors import UserError
from alignjax.core.types import Reward

# A sign after a digit or a bracket is a minus; a comma parts three digits.
_NUMBER = re.compile(
  r'(?:(?<![\d)])[-+])?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)'
  r'(?:[eE][-+]?\d+)?'
)
_EXPRESSION = re.compile(r'([-+*/().\d\s]+)=\s*$')
_MAX_CHARS = 1000  # of an expression


def pattern(tokens: Any, *, regex: str, whole: bool = False) -> Reward:
  """1 where the response matches, somewhere or as a `whole`."""
  try:
    compiled = re.compile(regex, re.DOTALL)
  except re.error as error:
    raise UserError(f'reward.regex: {regex!r}: {error}') from None
  test = compiled.fullmatch if whole else compiled.search
  return _of_text(tokens, lambda prompt, text, finished: bool(test(text)))


def length(tokens: Any, *, target: int = 64, tolerance: int = 16) -> Reward:
  """1 at `target` tokens, falling to 0 at `tolerance` tokens away from it."""
  if target < 0 or tolerance < 1:
    raise UserError(
      f'reward: target = {target} and tolerance = {tolerance}: expected at '
      'least 0 and 1'
    )

  def reward(bundle, batch, key) -> Any:
    del bundle, key
    count = np.asarray(batch['mask']).sum(-1)
    score = 1 - np.abs(count - target) / tolerance
    return np.maximum(score, 0.0)[..., None].astype(np.float32)

  reward.host = True
  reward.names = ('length',)
  return reward


def arithmetic(tokens: Any, *, finished: bool = True) -> Reward:
  """1 where the last number of the response is the value of the prompt's sum.

  The prompt ends in an expression of numbers, + - * / and brackets, before
  '='; a prompt without one scores 0. Nothing is evaluated but these, exactly.
  With `finished`, a response that was cut short scores 0.
  """

  def right(prompt: str, text: str, done: bool) -> bool:
    if finished and not done:
      return False
    end = prompt[-_MAX_CHARS:]
    found = _EXPRESSION.search(end)
    if not found or (not found.start() and len(prompt) > len(end)):
      return False
    expected = value(found.group(1))
    return expected is not None and said(text) == expected

  return _of_text(tokens, right)


def answer(
  tokens: Any, source: Any, *, field: str = 'answer', finished: bool = True
) -> Reward:
  """1 where the response's answer is the number that its record gives.

  The record of a row (`source.records`) has the reference in `field`, of which
  the number after '####' counts, else the last one: GSM8K's files as they are
  (arXiv 2110.14168).

  Raises UserError for a source without that field, or a record without a
  number, naming it.
  """

  def expected(fact: dict[str, Any]) -> Decimal:
    if field not in fact:
      raise UserError(
        f'reward.field: no {field!r} in record {fact.get("name")}; found '
        f'{sorted(fact)}'
      )
    found = said(str(fact[field]))
    if found is None:
      raise UserError(f'record {fact.get("name")}: no number in {field!r}')
    return found

  # Before any compute; a source need not tell its size.
  size = len(source) if hasattr(source, '__len__') else 1
  for fact in source.records(range(size)):
    expected(fact)
  stop = frozenset(tokens.stop)

  def reward(bundle, batch, key) -> Any:
    del bundle, key
    facts = source.records(batch['id'])
    rows = zip(facts, np.asarray(batch['response']), np.asarray(batch['mask']))
    scores = []
    for fact, responses, masks in rows:
      right = expected(fact)
      scores.append([])
      for ids, mask in zip(responses, masks):
        kept = ids[mask].tolist()
        done = bool(kept) and kept[-1] in stop
        same = said(tokens.decode(kept)) == right
        scores[-1].append(same and (done or not finished))
    return np.asarray(scores, np.float32)[..., None]

  reward.host = True
  reward.names = ('correct',)
  return reward


def said(text: str) -> Decimal | None:
  """The answer of a text: the number after its last '####', or its last one.

  A number is written as people do: '-1,234.50', '.5', '2e3'.
  """
  _, marked, after = text.rpartition('####')
  numbers = _NUMBER.findall(after if marked else text)
  if not numbers:
    return None
  try:
    return Decimal(numbers[0 if marked else -1].replace(',', ''))
  except ArithmeticError:  # an exponent beyond any number
    return None


def value(expression: str) -> Fraction | None:
  """The value of + - * / and brackets over decimals; None if it has none."""
  pieces = re.findall(r'\d+(?:\.\d+)?|[-+*/()]', expression)
  whole = ''.join(pieces) == re.sub(r'\s', '', expression)
  if not whole or len(pieces) > 200 or len(expression) > _MAX_CHARS:
    return None
  try:
    result, rest = _sum(pieces)
  except (ArithmeticError, IndexError, RecursionError, ValueError):
    return None
  return None if rest else result


def _sum(pieces: list[str]) -> tuple[Fraction, list[str]]:
  total, pieces = _product(pieces)
  while pieces and pieces[0] in '+-':
    sign = 1 if pieces[0] == '+' else -1
    term, pieces = _product(pieces[1:])
    total += sign * term
  return total, pieces


def _product(pieces: list[str]) -> tuple[Fraction, list[str]]:
  total, pieces = _factor(pieces)
  while pieces and pieces[0] in '*/':
    operation = pieces[0]
    factor, pieces = _factor(pieces[1:])
    total = total * factor if operation == '*' else total / factor
  return total, pieces


def _factor(pieces: list[str]) -> tuple[Fraction, list[str]]:
  head, rest = pieces[0], pieces[1:]
  if head in '+-':
    inner, rest = _factor(rest)
    return (inner if head == '+' else -inner), rest
  if head == '(':
    inner, rest = _sum(rest)
    if rest[0] != ')':
      raise ValueError('an open bracket')
    return inner, rest[1:]
  return Fraction(head), rest


def _of_text(tokens: Any, score: Callable[[str, str, bool], float]) -> Reward:
  """score(prompt, response, whether it ended by itself) on every response."""
  stop = frozenset(tokens.stop)

  def one(prompt: str, ids: list[int]) -> float:
    return score(prompt, tokens.decode(ids), bool(ids) and ids[-1] in stop)

  def reward(bundle, batch, key) -> Any:
    del bundle, key
    prompts = [
      tokens.decode(row) for row in np.asarray(batch['prompt']).tolist()
    ]
    scores = [
      [one(prompt, ids[mask].tolist()) for ids, mask in zip(*row)]
      for prompt, *row in zip(
        prompts, np.asarray(batch['response']), np.asarray(batch['mask'])
      )
    ]
    return np.asarray(scores, np.float32)[..., None]

  reward.host = True
  reward.names = ('correct',)
  return reward
