"""`alignjax VERB ...`: finds the verb's file and hands over. No flags here."""

import os
import sys

from alignjax.cli import console


def _usage() -> str:
  width = max(map(len, console.VERBS))
  verbs = [f'  {verb:<{width}}  {does}' for verb, does in console.VERBS.items()]
  return '\n'.join(
    ['usage: alignjax VERB ...', '', *verbs, '']
    + ['`alignjax VERB --help` says more; `alignjax --version`.']
  )


def _verb(verb: str, argv: list[str]) -> int:
  from alignjax.core import lookup
  from alignjax.core.errors import UserError

  if verb not in console.VERBS:
    raise UserError(
      f'no verb {verb!r}{lookup.nearest(verb, console.VERBS)}'
      f' (verbs: {", ".join(console.VERBS)})'
    )
  return lookup.find('cli', f'{verb}.main')(argv)


def main() -> int:
  """Entry point of the console script; returns the exit code."""
  verb, *argv = sys.argv[1:] or ['--help']
  if verb in ('-h', '--help', 'help'):
    print(_usage())
    return console.OK
  if verb == '--version':
    from importlib import metadata

    print(f'alignjax {metadata.version("alignjax")}')
    return console.OK
  # As `python -m alignjax.cli.VERB` does, so that a user's own parts are
  # found in the folder they work in.
  if os.getcwd() not in sys.path and '' not in sys.path:
    sys.path.insert(0, os.getcwd())
  known = verb in console.VERBS
  return console.call(
    verb if known else '', lambda rest: _verb(verb, list(rest)), argv
  )


if __name__ == '__main__':
  raise SystemExit(main())
