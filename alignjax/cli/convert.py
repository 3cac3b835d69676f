"""`alignjax convert SRC DST --to FORMAT [--verify]`: one model, other files.

Prints what it is about to do, copies leaf by leaf, and on request certifies
that both directories hold the same model. The work is in `alignjax.interop`.
"""

import argparse
import ctypes
from collections.abc import Sequence
from typing import Any

from alignjax.cli import console

_EPILOG = """\
formats
  alignjax  our model directory
  hf        Hugging Face: config.json and safetensors
  deepmind  an Orbax tree as DeepMind's gemma and recurrentgemma read it
what SRC is, is seen from its files.

--verify writes certificate.json and certificate.txt into DST: names, shapes,
dtypes and checksums of every leaf, and the logits of a fixed probe, both sides
read from their files. Without --to it compares an existing DST with SRC. The
exit code is 1 if they are different.

examples
  alignjax convert gemma-2-2b-it model --to alignjax --verify
  alignjax convert model exported --to hf --verify
  alignjax convert gemma-2-2b-it exported --verify
"""
DIFFERENT = 1
_MMAP_THRESHOLD = -3  # of mallopt


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog='alignjax convert',
    description='Rewrite a model in another format.',
    epilog=_EPILOG,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  add = parser.add_argument
  add('source', metavar='SRC', help='a model of any format')
  add('path', metavar='DST', help='where the result goes')
  add('--to', metavar='alignjax|hf|deepmind', help='format of DST')
  add('--verify', action='store_true', help='compare DST with SRC')
  add(
    '--dtype',
    default='keep',
    metavar='keep|bfloat16|float32',
    help="of the decoder's leaves; keep",
  )
  add(
    '--window-self',
    choices=('true', 'false'),
    help="whether SRC's window counts the query's own key; by default as the"
    ' format has it',
  )
  add('--role', default='policy', metavar='R', help='of our format; policy')
  add('--overwrite', action='store_true', help='replace DST')
  add('--dry-run', action='store_true', help='print the plan only')
  return parser


def main(argv: Sequence[str]) -> int:
  """Converts and compares. Raises UserError; 1 if the models differ."""
  parser = _parser()
  args = parser.parse_args(argv)

  from alignjax.core.errors import UserError
  from alignjax.interop import convert, open
  from alignjax.system.progress import progress

  if args.to is None and not args.verify:
    raise UserError(
      '--to is missing: alignjax, hf or deepmind (or --verify alone, to compare'
      ' an existing DST with SRC)'
    )
  _return_memory()
  window_self = {None: None, 'true': True, 'false': False}[args.window_self]
  if open.absolute(args.source) == open.absolute(args.path):
    raise UserError(f'SRC and DST are the same: {args.path}')
  source = open.open(args.source, role=args.role, window_self=window_self)
  if args.to is not None:
    what = convert.plan(
      source,
      open.absolute(args.path),
      to=args.to,
      dtype=args.dtype,
      provenance={'converted_from': str(source.path)},
      overwrite=args.overwrite,
    )
    print(_plan(what, args.verify))
    if args.dry_run:
      print(f'would write {what.path}')
      return console.OK
    with progress('convert', what.steps) as advance:
      convert.run(what, _counted(advance))
    print(f'wrote {what.path}')
  return _verify(args, source) if args.verify else console.OK


def _plan(what: Any, verify: bool) -> str:
  from alignjax.interop import certificate

  source, config = what.source, what.config
  peak = what.peak_bytes
  if verify:
    peak = max(peak, certificate.peak_bytes(source, what.leaves))
  kinds = ', '.join(sorted({str(x.dtype) for x in what.leaves.values()}))
  lines = [
    f'{source.format} -> {what.to}: {config.layers} layers of width'
    f' {config.width} ({"/".join(dict.fromkeys(config.pattern))}),'
    f' {config.vocab_size} rows',
    f'{what.parameters:,} parameters in {len(what.leaves)} leaves ({kinds}),'
    f' {len(what.extra)} other tensors, {what.bytes / 2**20:,.0f} MiB',
    f'files that travel: {", ".join(f.name for f in source.files) or "none"}',
    f'config: {source.provenance.get("config", "stored with the model")}',
    *(f'note: {note}' for note in what.notes),
    f'peak memory of the arrays about {peak / 2**20:,.0f} MiB',
  ]
  return '\n'.join(lines)


def _verify(args: argparse.Namespace, source: Any) -> int:
  from alignjax.interop import certificate, open
  from alignjax.system.progress import progress

  # Hugging Face's files cannot say how the window counts.
  window_self = source.config.window_self
  destination = open.open(args.path, window_self=window_self)
  with progress('verify', certificate.steps(source)) as advance:
    found = certificate.compare(source, destination, _counted(advance))
  certificate.write(found, destination.path)
  print(found.verdict)
  print(f'wrote {destination.path / open.CERTIFICATES[1]}')
  return console.OK if found.same else DIFFERENT


def _return_memory() -> None:
  """Lets freed tensors go back to the system at once.

  glibc keeps them for each thread that has read one, and with many threads
  reading that soon adds up to the model.
  """
  try:
    ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 2**20)
  except (OSError, AttributeError):
    pass  # another C library


def _counted(advance: Any) -> Any:
  """A step that counts itself."""
  done = 0

  def step(text: str) -> None:
    nonlocal done
    done += 1
    advance(done, text)

  return step


if __name__ == '__main__':
  raise SystemExit(console.call('convert', main))
