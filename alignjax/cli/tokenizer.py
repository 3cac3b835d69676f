"""`alignjax tokenizer`: train a SentencePiece model from text, or look at one.

`train` writes one file; the form with --config and --workdir is the same as a
job and leaves W/tokenizer.model with W/tokenizer.json, which says from what
it was made. Refuses to download text and to touch a finished tokenizer of
another config.
"""

import argparse
import inspect
import json
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alignjax.cli import config, console
from alignjax.core import files
from alignjax.core.errors import UserError

_MODEL = 'tokenizer.model'
_RECORD = 'tokenizer.json'


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog='alignjax tokenizer',
    description='Train a SentencePiece tokenizer from text, or look at one.'
    ' As a job: --config=F.json --workdir=W, with the sections of'
    ' {"source": {"path": ...}, "vocab_size": 1536}.',
    allow_abbrev=False,
  )
  verbs = parser.add_subparsers(dest='verb', required=True)
  train = verbs.add_parser('train', help='write a model file')
  train.add_argument(
    '--source',
    default='',
    help='a directory, a text file or a JSONL file; without it, the source of'
    " Python's standard library",
  )
  train.add_argument('--out', required=True, type=Path, metavar='FILE.model')
  train.add_argument('--vocab_size', type=int, default=1536)
  train.add_argument('--max_bytes', type=int, default=6_000_000)
  train.add_argument('--field', default='text', help='of a JSONL row')
  train.add_argument('--pattern', default='*.py', help="a directory's files")
  train.add_argument('--seed', type=int, default=0)
  show = verbs.add_parser('show', help='sizes, special ids, pieces of a text')
  show.add_argument('model', metavar='FILE.model')
  show.add_argument('--text', help='text to encode')
  show.add_argument('--ids', type=int, nargs='*', help='ids to decode')
  return parser


def _trained(
  path: Path, source: dict[str, Any], vocab_size: int, seed: int
) -> str:
  """Train and write; returns a line that says what came out."""
  from alignjax.data import text, tokenizer

  start = time.monotonic()
  texts = [document.text for document in text.documents(**source)]
  size = sum(map(len, texts))
  print(f'training on {len(texts)} documents, {size:,} characters', flush=True)
  made = tokenizer.train(texts, path, vocab_size=vocab_size, seed=seed)
  sample = ''.join(texts[:: max(1, len(texts) // 50)])[:200_000]
  return (
    f'{path}: {made.size} pieces,'
    f' {len(sample) / len(made.encode(sample)):.2f} characters a token,'
    f' {time.monotonic() - start:.1f} s'
  )


def _show(args: argparse.Namespace) -> None:
  from alignjax.data.tokenizer import Tokenizer

  model = Tokenizer.load(args.model)
  print(
    f'{args.model}: {model.size} pieces; pad {model.pad}, eos {model.eos},'
    f' bos {model.bos}, unk {model.unk}, start_of_turn'
    f' {model.start_of_turn}, end_of_turn {model.end_of_turn}'
  )
  if args.text is not None:
    ids = model.encode(args.text)
    for i in ids:
      print(f'{i:>7}  {model.processor.IdToPiece(i)!r}')
    same = 'yes' if model.decode(ids) == args.text else 'NO'
    print(f'{len(ids)} tokens; decodes to the same text: {same}')
  if args.ids is not None:
    for i in args.ids:
      if not 0 <= i < model.size:
        raise UserError(f'id {i} is not in 0..{model.size - 1}')
    print(repr(model.decode(args.ids)))


def _section(settings: dict[str, Any]) -> tuple[dict[str, Any], int, int]:
  """(source, vocab_size, seed) of a job's config, checked."""
  from alignjax.core import lookup
  from alignjax.data import text

  known = {'source', 'vocab_size', 'seed'}
  for field in settings:
    if field not in known:
      raise UserError(
        f'no field {field!r} in a tokenizer config'
        f'{lookup.nearest(field, known)}'
      )
  source = lookup.fit('source', settings.get('source', {}), dict)
  signature = inspect.signature(text.documents).parameters
  for field, value in source.items():
    if field not in signature:
      raise UserError(
        f'no field {f"source.{field}"!r}{lookup.nearest(field, signature)}'
        f' (fields: {", ".join(signature)})'
      )
    lookup.fit(f'source.{field}', value, type(signature[field].default))
  numbers = {'vocab_size': 1536, 'seed': 0}
  for field in numbers:
    numbers[field] = lookup.fit(field, settings.get(field, numbers[field]), int)
  return dict(source), numbers['vocab_size'], numbers['seed']


def _finished(workdir: Path, settings: dict[str, Any]) -> bool:
  """Whether the workdir holds the tokenizer of these settings, whole."""
  try:
    record = json.loads((workdir / _RECORD).read_text('utf-8'))
    model = (workdir / _MODEL).read_bytes()
    whole = record['crc32'] == f'{zlib.crc32(model):08x}'
    changes = config.difference(record['config'], settings)
  except (OSError, ValueError, KeyError, TypeError):
    return False
  if whole and changes:
    raise UserError(
      f'--workdir={workdir} holds the tokenizer of another config:'
      f' {"; ".join(changes)}'
    )
  return whole


def _job(argv: Sequence[str]) -> None:
  settings, _, rest = config.load(argv)
  parser = argparse.ArgumentParser('alignjax tokenizer', allow_abbrev=False)
  parser.add_argument('--workdir', required=True, type=Path, metavar='W')
  workdir = parser.parse_args(rest).workdir
  plain = config.plain(settings)
  source, vocab_size, seed = _section(plain)
  if _finished(workdir, plain):
    print(f'{workdir / _MODEL}: done before')
    return
  if workdir.exists() and not workdir.is_dir():
    raise UserError(f'--workdir={workdir} is not a folder')
  print(_trained(workdir / _MODEL, source, vocab_size, seed), flush=True)
  crc = zlib.crc32((workdir / _MODEL).read_bytes())
  record = {'format': 1, 'config': plain, 'crc32': f'{crc:08x}'}
  text = json.dumps(record, indent=2, sort_keys=True) + '\n'
  files.write(workdir / _RECORD, text)


def main(argv: Sequence[str]) -> int:
  """Exit code; raises UserError for bad input."""
  if any(argument.startswith('--config') for argument in argv):
    _job(argv)
    return console.OK
  args = _parser().parse_args(argv)
  if args.verb == 'show':
    _show(args)
    return console.OK
  source = {
    'path': args.source,
    'field': args.field,
    'pattern': args.pattern,
    'max_bytes': args.max_bytes,
  }
  print(_trained(args.out, source, args.vocab_size, args.seed))
  return console.OK


if __name__ == '__main__':
  raise SystemExit(console.call('tokenizer', main))
