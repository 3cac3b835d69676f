"""`alignjax sample`: text from a model of any format, or a conversation.

Without --chat: prompts in, texts out. With it, `cli/chat.py` takes over.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alignjax.cli import console
from alignjax.core.errors import UserError


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog='alignjax sample',
    description='Text from a model, or a conversation with --chat. '
    'Without --prompt, each line of standard input is a prompt or a message.',
    allow_abbrev=False,
  )
  parser.add_argument('path', metavar='PATH', help='a model in any format')
  parser.add_argument('--prompt', action='append', metavar='TEXT')
  parser.add_argument('--n', type=int, default=1, help='texts per prompt')
  parser.add_argument(
    '--max_new_tokens', type=int, help='64; 1024 of an answer with --chat'
  )
  parser.add_argument('--temperature', type=float, default=1.0)
  parser.add_argument(
    '--top_k', type=int, default=0, help='draw from the K likeliest; 0: all'
  )
  parser.add_argument(
    '--top_p',
    type=float,
    default=1.0,
    help='draw from the likeliest that have this share of the probability',
  )
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument(
    '--weights',
    metavar='W,...',
    help='of a conditioned model: what each of its objectives weighs, sum 1',
  )
  parser.add_argument(
    '--best-of',
    type=int,
    metavar='K',
    help='of K texts, keep the --n with the highest --reward',
  )
  parser.add_argument(
    '--reward',
    default='verify.python_code',
    help='a reward that needs only the text',
  )
  parser.add_argument(
    '--guidance',
    type=float,
    default=1.0,
    metavar='SCALE',
    help='of the logits away from --uncond; 1 is none, 3 is usual',
  )
  parser.add_argument(
    '--uncond', default='', metavar='TEXT', help='negative prompt; empty'
  )
  parser.add_argument(
    '--chat', action='store_true', help='hold a conversation in the terminal'
  )
  parser.add_argument(
    '--system', metavar='TEXT', help='for --chat: what the model is told first'
  )
  return parser


def main(argv: Sequence[str]) -> int:
  """Exit code; raises UserError for bad input."""
  args = _parser().parse_args(argv)
  if args.max_new_tokens is None:
    args.max_new_tokens = 1024 if args.chat else 64
  _check(args)
  args.weights = _weights(args.weights)
  if args.chat:
    return _chat(args)
  prompts = args.prompt
  if prompts is None:
    prompts = [line.rstrip('\n') for line in sys.stdin]
  # The shell has no newlines in arguments as easily as '\n'.
  prompts = [prompt.replace('\\n', '\n') for prompt in prompts]
  if not prompts:
    raise UserError('no prompt: use --prompt TEXT or standard input')

  import jax

  from alignjax import api
  from alignjax.cli.chat import note

  model = _loaded(args.path, args.weights)
  note('compiling and writing ...')
  texts = api.sample(
    model,
    prompts,
    max_new_tokens=args.max_new_tokens,
    temperature=args.temperature,
    top_k=args.top_k,
    top_p=args.top_p,
    count=args.best_of or args.n,
    guidance_scale=args.guidance,
    uncond=args.uncond.replace('\\n', '\n'),
    key=jax.random.key(args.seed),
  )
  note('')
  for prompt, written in zip(prompts, texts):
    if args.best_of:
      written = _best(args, model.tokenizer, prompt, written)
    for text in written:
      print(f'{prompt}{text}')
      if len(prompts) > 1 or len(written) > 1:
        print('-' * 72)
  return console.OK


def _check(args: argparse.Namespace) -> None:
  if args.temperature < 0 or args.n < 1 or args.max_new_tokens < 1:
    raise UserError(
      '--temperature must be at least 0, --n and --max_new_tokens at least 1'
    )
  if args.top_k < 0 or not 0 < args.top_p <= 1:
    raise UserError('--top_k must be at least 0, --top_p above 0 and up to 1')
  if args.best_of is not None and args.best_of < args.n:
    raise UserError(f'--best-of={args.best_of} is less than --n={args.n}')
  if args.uncond and args.guidance == 1:
    raise UserError('--uncond needs --guidance, such as 3')
  if args.chat and (
    args.prompt or args.best_of or args.n > 1 or args.guidance != 1
  ):
    raise UserError(
      '--chat reads messages from standard input: no --prompt, --n,'
      ' --best-of or --guidance'
    )
  if args.system is not None and not args.chat:
    raise UserError('--system needs --chat')


def _weights(text: str | None) -> tuple[float, ...] | None:
  try:
    return None if text is None else tuple(map(float, text.split(',')))
  except ValueError:
    raise UserError(
      f'--weights={text}: expected numbers such as 0.3,0.7'
    ) from None


def _loaded(path: str, weights: tuple[float, ...] | None) -> Any:
  """The model, with a word on what takes the time."""
  import math

  from alignjax import api
  from alignjax.cli import parts
  from alignjax.cli.chat import note
  from alignjax.interop.open import open as open_model

  cache = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
  parts.compilation_cache(Path(cache) / 'alignjax')
  leaves = open_model(path, weights=weights).leaves
  count = sum(math.prod(leaf.shape) for leaf in leaves.values())
  note(f'reading {count / 1e9:.2g} B parameters ...')
  model = api.load(path, weights=weights)
  note('')
  return model


def _chat(args: argparse.Namespace) -> int:
  from alignjax.cli import chat
  from alignjax.data.format import chat_tokens
  from alignjax.data.tokenizer import Tokenizer
  from alignjax.interop.open import open as open_model

  file = open_model(args.path, weights=args.weights).tokenizer
  if file is None:
    raise UserError(
      f'{args.path} has no tokenizer.model, which a conversation needs'
    )
  # Its turn marks, and whether it has system messages, before the weights.
  first = [{'role': 'user', 'content': ''}]
  if args.system is not None:
    first.insert(0, {'role': 'system', 'content': args.system})
  chat_tokens(Tokenizer.load(file), first, where='--system')
  model = _loaded(args.path, args.weights)
  chat.converse(
    model,
    chat.typed(),
    system=args.system,
    max_new_tokens=args.max_new_tokens,
    temperature=args.temperature,
    top_k=args.top_k,
    top_p=args.top_p,
    seed=args.seed,
  )
  return console.OK


def _best(args, tokenizer, prompt, texts) -> list[str]:
  import jax
  import numpy as np

  from alignjax.rewards import compose

  reward = compose.build({'name': args.reward}, {'tokens': tokenizer})
  prompt_ids = tokenizer.encode(prompt)
  encoded = [tokenizer.encode(text) for text in texts]
  width = max(map(len, encoded)) + 1
  response = np.full((1, len(texts), width), tokenizer.pad, np.int32)
  for row, ids in zip(response[0], encoded):
    row[: len(ids)] = ids
    row[len(ids)] = tokenizer.eos
  lengths = np.array([[len(ids) + 1 for ids in encoded]])
  batch = {
    'prompt': np.array([prompt_ids], np.int32),
    'response': response,
    'mask': np.arange(width) < lengths[..., None],
  }
  scores = reward({}, batch, jax.random.key(0))[0, :, 0]
  return [texts[i] for i in np.argsort(-scores, kind='stable')[: args.n]]


if __name__ == '__main__':
  raise SystemExit(console.call('sample', main))
