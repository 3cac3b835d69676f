"""A conversation in the terminal, which `alignjax sample --chat` holds.

The whole conversation is read again at every turn, in a prompt padded to a
power of two, so that a new program is compiled only when it has doubled. The
answer is drawn a few tokens at a time by the one decoding loop. No verb, no
server, no memory beyond the conversation.
"""

import functools
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from alignjax.api import LoadedModel
from alignjax.core.errors import UserError
from alignjax.data.format import chat_tokens
from alignjax.data.tokenizer import streamed
from alignjax.policies import lm
from alignjax.policies import sample as sampling
from alignjax.policies.combine import sampled

WIDTH = 64  # of the shortest prompt
BLOCK_S = 0.05  # how long a block of tokens may take before it is shown
BLOCK_TOKENS = 32

# Blocks of new ids for a prompt and a key.
Writer = Callable[[list[int], jax.Array], Iterator[list[int]]]


def converse(
  model: LoadedModel,
  messages: Iterable[str],
  *,
  system: str | None = None,
  max_new_tokens: int = 1024,
  temperature: float = 1.0,
  top_k: int = 0,
  top_p: float = 1.0,
  seed: int = 0,
) -> None:
  """Answers one message after the other on stdout, until there are no more.

  '/reset' forgets what was said, '/exit' ends. Ctrl-C ends an answer; what has
  been said of it stays part of the conversation.
  """
  tokenizer = model.tokenizer
  assert tokenizer is not None
  write = writer(
    model,
    max_new_tokens=max_new_tokens,
    temperature=temperature,
    top_k=top_k,
    top_p=top_p,
  )
  opening = [] if system is None else [{'role': 'system', 'content': system}]
  said = [*opening]
  for turn, message in enumerate(messages):
    if message.strip() == '/exit':
      return
    if message.strip() == '/reset':
      said = [*opening]
      continue
    if not message.strip():
      continue
    said.append({'role': 'user', 'content': message})
    prompt = chat_tokens(tokenizer, said, generate=True).ids
    key = jax.random.fold_in(jax.random.key(seed), turn)
    answer = _answer(write(prompt, key), tokenizer.decode)
    said.append({'role': 'model', 'content': tokenizer.decode(answer)})


def _answer(blocks: Iterator[list[int]], decode) -> list[int]:
  """Shows an answer while it comes; its ids."""
  ids: list[int] = []
  times: list[float] = []

  def kept():
    for block in blocks:
      ids.extend(block)
      times.append(time.monotonic())
      yield block

  interrupted = False
  begun = False
  try:
    for text in streamed(decode, kept()):
      if not begun:
        note('')  # once: it clears the line that the answer is written on
      begun = True
      _show(text)
  except KeyboardInterrupt:
    interrupted = True
  print(flush=True)
  # The first token has waited for the prompt, and maybe for the compiler.
  speed = ''
  if len(times) > 1 and times[-1] > times[0]:
    speed = f', {(len(ids) - 1) / (times[-1] - times[0]):.1f} tokens/s'
  note(f'{len(ids)} tokens{speed}{", interrupted" * interrupted}', end='\n')
  return ids


def writer(
  model: LoadedModel,
  *,
  max_new_tokens: int,
  temperature: float,
  top_k: int = 0,
  top_p: float = 1.0,
) -> Writer:
  """A function that answers prompts, blocks of ids as they are drawn.

  Blocks are as long as fits into BLOCK_S. Temperature 0 takes the likeliest
  token.
  """
  parts = lm.model(model.config, model.tokenizer)
  policy = sampled(
    parts.policy('policy'),
    temperature=temperature or 1.0,
    top_k=top_k,
    top_p=top_p,
  )
  ending: dict[str, Any] = {
    'stop': parts.stop,
    'pad': parts.pad,
    'greedy': temperature == 0,
  }
  # Once: nothing is cast or turned in a turn.
  weights = jax.jit(
    lambda params: lm.decoding(policy.view({'policy': params}, {}), rows=1)
  )(model.params)
  widths: set[int] = set()

  @jax.jit
  def begin(weights, prompt, key):
    batch = {'prompt': prompt, 'id': jnp.zeros(1, jnp.int32)}
    return sampling.begin(
      policy,
      weights,
      batch,
      key,
      count=1,
      max_new_tokens=max_new_tokens,
      **ending,
    )

  @functools.partial(jax.jit, donate_argnums=1)
  def advance(weights, state, steps):
    return sampling.advance(policy, weights, state, steps, **ending)

  def write(ids: list[int], key) -> Iterator[list[int]]:
    prompt = _bucket(ids, parts.pad)
    if prompt.size not in widths:
      note(f'compiling for {prompt.size} tokens ...')
      widths.add(prompt.size)
    state = begin(weights, prompt, key)
    shown, steps = 0, 1
    while True:
      length = int(state.length)
      yield np.asarray(state.out['response'])[0, shown:length].tolist()
      shown = length
      if length >= max_new_tokens or bool(state.done[0]):
        return
      start = time.monotonic()
      state = advance(weights, state, steps)
      state.length.block_until_ready()
      took = time.monotonic() - start
      steps = max(1, steps // 2) if took > BLOCK_S else steps * 2
      steps = min(steps, BLOCK_TOKENS)

  return write


def _bucket(ids: list[int], pad: int) -> np.ndarray:
  """The prompt on the right of a row whose width is a power of two."""
  width = max(WIDTH, 1 << (len(ids) - 1).bit_length())
  row = np.full((1, width), pad, np.int32)
  row[0, -len(ids) :] = ids
  return row


def typed() -> Iterator[str]:
  """What a person types, or the lines of a pipe."""
  if not sys.stdin.isatty():
    try:
      for line in sys.stdin:
        yield line.rstrip('\r\n')
    except UnicodeDecodeError as error:
      raise UserError(f'standard input is not text: {error}') from None
    return
  try:
    import readline  # noqa: F401  (gives `input` its line editing)
  except ImportError:
    pass
  note('Ctrl-C stops an answer; /reset forgets; /exit or Ctrl-D ends', end='\n')
  while True:
    try:
      yield input('> ')
    except EOFError:
      print()
      return
    except KeyboardInterrupt:
      print()


def note(text: str, *, end: str = '') -> None:
  """A dim remark in place of the one before; only where stderr is a terminal.

  Without `end` it stays until the next one; '' removes it.
  """
  if sys.stderr.isatty():
    dim = f'\x1b[2m{text}\x1b[0m' if text else ''
    print(f'\r\x1b[2K{dim}', end=end, file=sys.stderr, flush=True)


def _show(text: str) -> None:
  if sys.stdout.isatty():
    # A model must not move the cursor or set the title of a window.
    text = re.sub(r'[\x00-\x08\x0b-\x1f\x7f-\x9f]', '\ufffd', text)
  print(text, end='', flush=True)
