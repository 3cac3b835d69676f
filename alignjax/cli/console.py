"""What every verb shares: the list of verbs, and errors in one sentence.

Kept free of heavy imports, so that `alignjax --help` is instant. A traceback
is for bugs; a UserError is one line on stderr and exit code 2.
"""

import os
import sys
from collections.abc import Callable, Sequence

VERBS = {
  'run': 'run the job graph of a config on this machine',
  'train': 'one training run',
  'sample': 'text from a model, or a conversation with it',
  'calibrate': 'rewards of reference responses, for recipes that need them',
  'evaluate': 'reward, KL, win rate and diversity of models',
  'perplexity': 'how well models predict held-out text',
  'teach': 'write down what a teacher says about the rows of a source',
  'merge': 'merge the weights of models',
  'plan': 'what a run needs on a TPU slice, without a TPU',
  'convert': 'rewrite a model in another format, with a certificate',
  'report': 'one offline HTML file from runs and evaluations',
  'inspect': 'what a model, by name or on disk, or a training run holds',
  'tokenizer': 'train a SentencePiece tokenizer from text',
}

OK = 0
BAD_INPUT = 2
INTERRUPTED = 75  # saved; the same command continues
KEYBOARD = 130


def call(
  verb: str,
  main: Callable[[Sequence[str]], int | None],
  argv: Sequence[str] | None = None,
) -> int:
  """Exit code of `main(argv)`; argv defaults to the process's arguments."""
  try:
    code = main(sys.argv[1:] if argv is None else argv) or OK
    sys.stdout.flush()
    return code
  except KeyboardInterrupt:
    return KEYBOARD
  except BrokenPipeError:
    # `| head` has seen enough; the interpreter's own flush must not complain.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return OK
  except Exception as error:
    from alignjax.core.errors import UserError

    if not isinstance(error, UserError):
      raise
    sys.stdout.flush()
    print(f'{f"alignjax {verb}".strip()}: {error}', file=sys.stderr)
    return BAD_INPUT
