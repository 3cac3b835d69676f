"""`alignjax sample`: text from a model directory."""

import argparse
import sys
from collections.abc import Sequence

from alignjax.cli import console
from alignjax.core.types import UserError


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog='alignjax sample',
    description='Text from a model directory. Without --prompt, each line of '
    'standard input is a prompt.',
    allow_abbrev=False,
  )
  parser.add_argument('path', metavar='PATH', help='a model directory')
  parser.add_argument('--prompt', action='append', metavar='TEXT')
  parser.add_argument('--n', type=int, default=1, help='texts per prompt')
  parser.add_argument('--max_new_tokens', type=int, default=64)
  parser.add_argument('--temperature', type=float, default=1.0)
  parser.add_argument('--seed', type=int, default=0)
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
  return parser


def main(argv: Sequence[str]) -> int:
  """Exit code; raises UserError for bad input."""
  args = _parser().parse_args(argv)
  if args.temperature < 0 or args.n < 1 or args.max_new_tokens < 1:
    raise UserError(
      '--temperature must be at least 0, --n and --max_new_tokens at least 1'
    )
  if args.best_of is not None and args.best_of < args.n:
    raise UserError(f'--best-of={args.best_of} is less than --n={args.n}')
  prompts = args.prompt
  if prompts is None:
    prompts = [line.rstrip('\n') for line in sys.stdin]
  # The shell has no newlines in arguments as easily as '\n'.
  prompts = [prompt.replace('\\n', '\n') for prompt in prompts]
  if not prompts:
    raise UserError('no prompt: use --prompt TEXT or standard input')

  import jax

  from alignjax import api

  model = api.load(args.path)
  texts = api.sample(
    model,
    prompts,
    max_new_tokens=args.max_new_tokens,
    temperature=args.temperature,
    count=args.best_of or args.n,
    key=jax.random.key(args.seed),
  )
  for prompt, written in zip(prompts, texts):
    if args.best_of:
      written = _best(args, model.tokenizer, prompt, written)
    for text in written:
      print(f'{prompt}{text}')
      if len(prompts) > 1 or len(written) > 1:
        print('-' * 72)
  return console.OK


def _best(args, tokenizer, prompt, texts) -> list[str]:
  import numpy as np

  from alignjax.core import lookup

  reward = lookup.find('rewards', args.reward)(tokenizer)
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
  scores = reward({}, batch, None)[0, :, 0]
  return [texts[i] for i in np.argsort(-scores, kind='stable')[: args.n]]


if __name__ == '__main__':
  raise SystemExit(console.call('sample', main))
