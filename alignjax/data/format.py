"""Gemma's chat format, byte for byte, and its loss mask.

  <bos><start_of_turn>user
  {text}<end_of_turn>
  <start_of_turn>model
  {text}<end_of_turn>

Gemma 3 puts a system message in front of the first user text, with an empty
line between them; Gemma 1 and 2 and RecurrentGemma have none. `chat` renders
what a person reads; `chat_tokens` is what trains and what a model continues.
Control tokens are placed by id and message text is encoded apart from them, so
no message can open or close a turn, and there is exactly one BOS. Never encode
the text of `chat`. Refuses images and tools.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from alignjax.core.errors import UserError

_ROLES = {'user': 'user', 'model': 'model', 'assistant': 'model'}


class Ids(Protocol):
  """What the format needs of a tokenizer."""

  @property
  def bos(self) -> int: ...

  @property
  def start_of_turn(self) -> int: ...

  @property
  def end_of_turn(self) -> int: ...

  @property
  def system(self) -> bool: ...

  def encode(self, text: str, /) -> list[int]: ...


class Chat(NamedTuple):
  """Ids, and True where the loss is: model text and its <end_of_turn>."""

  ids: list[int]
  loss_mask: list[bool]


def _turns(
  messages: Sequence[Mapping[str, Any]], system: bool, where: str
) -> Iterator[tuple[str, str]]:
  """(role, text) of checked messages, the system's inside the first."""
  prefix = f'{where}: ' if where else ''
  if not isinstance(messages, Sequence) or isinstance(messages, str):
    raise UserError(
      f'{prefix}messages are a {type(messages).__name__}, expected a list'
    )
  if not messages:
    raise UserError(f'{prefix}no messages')
  front, roles = '', ('user', 'model')
  for number, message in enumerate(messages, start=1):
    what = f'{prefix}message {number}'
    found, text = _fields(message, what)
    if found == 'system' and number == 1:
      if not system:
        raise UserError(
          f"{what} has role 'system', which this model's chat format (Gemma 1,"
          ' Gemma 2, RecurrentGemma) does not have; put it into the first user'
          ' message'
        )
      if len(messages) == 1:
        raise UserError(
          f'{what} is the only one, expected a user message after it'
        )
      # As the template has it: this text is not trimmed.
      front, roles = f'{text}\n\n', ('model', 'user')
      continue
    expected = roles[1 - number % 2]
    role = _ROLES.get(found, '')
    if role != expected:
      raise UserError(
        f'{what} has role {found!r}, expected {expected!r}: turns'
        ' alternate between user and model and start with user'
      )
    yield role, front + text.strip()
    front = ''


def _fields(message: Any, what: str) -> tuple[str, str]:
  """(role, content) of a message."""
  if not isinstance(message, Mapping):
    raise UserError(f'{what} is a {type(message).__name__}, expected a dict')
  for field in ('role', 'content'):
    if not isinstance(message.get(field), str):
      raise UserError(
        f'{what} has no text in field {field!r} (fields:'
        f' {", ".join(map(str, message)) or "none"})'
      )
  return message['role'], message['content']


def chat(
  messages: Sequence[Mapping[str, Any]],
  *,
  generate: bool = False,
  system: bool = True,
  where: str = '',
) -> str:
  """Render messages, each {'role': ..., 'content': ...}.

  Roles are user and model ('assistant' is rendered 'model'), alternating from
  user, after one of 'system' at most. `generate` opens a model turn at the
  end. `system` is False for the format of Gemma 1 and 2, which refuses system
  messages. `where` (a file and row) goes in front of errors. Source: the chat
  templates of Gemma 1 to 3.
  """
  turns = [
    f'<start_of_turn>{role}\n{text}<end_of_turn>\n'
    for role, text in _turns(messages, system, where)
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

  The tokenizer says whether there are system messages: it is what tells Gemma
  3 from 1 and 2. The newline after a model's <end_of_turn> carries no loss:
  nothing is sampled after a stop token.
  """
  ids, mask = [tokenizer.bos], [False]

  def add(part: list[int], loss: bool) -> None:
    ids.extend(part)
    mask.extend([loss] * len(part))

  for role, text in _turns(messages, tokenizer.system, where):
    model = role == 'model'
    add([tokenizer.start_of_turn], False)
    if model:
      add(tokenizer.encode(f'{role}\n'), False)
      add(tokenizer.encode(text), True)
    else:
      # In one piece: a system text may begin with the newline's own piece.
      add(tokenizer.encode(f'{role}\n{text}'), False)
    add([tokenizer.end_of_turn], model)
    add(tokenizer.encode('\n'), False)
  if generate:
    add([tokenizer.start_of_turn, *tokenizer.encode('model\n')], False)
  return Chat(ids, mask)
