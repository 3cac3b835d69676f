"""Gemma's chat format, byte for byte, and its loss mask.

  <bos><start_of_turn>user
  {text}<end_of_turn>
  <start_of_turn>model
  {text}<end_of_turn>

`chat` renders what a person reads; `chat_tokens` is what trains. Control
tokens are placed by id and message text is encoded apart from them, so no
message can open or close a turn. Refuses system turns (Gemma 1 and 2 have
none), images and tools.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from alignjax.core.types import UserError

_ROLES = {'user': 'user', 'model': 'model', 'assistant': 'model'}


class Ids(Protocol):
  """What the format needs of a tokenizer."""

  @property
  def bos(self) -> int: ...

  @property
  def start_of_turn(self) -> int: ...

  @property
  def end_of_turn(self) -> int: ...

  def encode(self, text: str, /) -> list[int]: ...


class Chat(NamedTuple):
  """Ids, and True where the loss is: model text and its <end_of_turn>."""

  ids: list[int]
  loss_mask: list[bool]


def _turns(
  messages: Sequence[Mapping[str, Any]], where: str
) -> Iterator[tuple[str, str]]:
  """(role, stripped text) of checked messages."""
  prefix = f'{where}: ' if where else ''
  if not isinstance(messages, Sequence) or isinstance(messages, str):
    raise UserError(
      f'{prefix}messages are a {type(messages).__name__}, expected a list'
    )
  if not messages:
    raise UserError(f'{prefix}no messages')
  for number, message in enumerate(messages, start=1):
    what = f'{prefix}message {number}'
    if not isinstance(message, Mapping):
      raise UserError(f'{what} is a {type(message).__name__}, expected a dict')
    for field in ('role', 'content'):
      if not isinstance(message.get(field), str):
        raise UserError(
          f'{what} has no text in field {field!r} (fields:'
          f' {", ".join(map(str, message)) or "none"})'
        )
    expected = 'user' if number % 2 else 'model'
    role = _ROLES.get(message['role'], '')
    if role != expected:
      raise UserError(
        f'{what} has role {message["role"]!r}, expected {expected!r}: turns'
        ' alternate between user and model and start with user'
      )
    yield role, message['content'].strip()


def chat(
  messages: Sequence[Mapping[str, Any]],
  *,
  generate: bool = False,
  where: str = '',
) -> str:
  """Render messages, each {'role': ..., 'content': ...}.

  Roles are user and model ('assistant' is rendered 'model'), alternating from
  user. `generate` opens a model turn at the end. `where` (a file and row) goes
  in front of errors. Source: the chat template of Gemma 1 to 3.
  """
  turns = [
    f'<start_of_turn>{role}\n{text}<end_of_turn>\n'
    for role, text in _turns(messages, where)
  ]
  opened = ['<start_of_turn>model\n'] if generate else []
  return ''.join(['<bos>', *turns, *opened])


def chat_tokens(
  tokenizer: Ids,
  messages: Sequence[Mapping[str, Any]],
  *,
  generate: bool = False,
  where: str = '',
) -> Chat:
  """Ids of `chat(messages)` and the loss mask, True on model turns only.

  The newline after a model's <end_of_turn> carries no loss: nothing is
  sampled after a stop token.
  """
  ids, mask = [tokenizer.bos], [False]

  def add(part: list[int], loss: bool) -> None:
    ids.extend(part)
    mask.extend([loss] * len(part))

  for role, text in _turns(messages, where):
    model = role == 'model'
    add([tokenizer.start_of_turn, *tokenizer.encode(f'{role}\n')], False)
    add([*tokenizer.encode(text), tokenizer.end_of_turn], model)
    add(tokenizer.encode('\n'), False)
  if generate:
    add([tokenizer.start_of_turn, *tokenizer.encode('model\n')], False)
  return Chat(ids, mask)
