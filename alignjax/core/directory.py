"""A directory written whole or not at all; what is in it, it does not know."""

import contextlib
import errno
import shutil
from collections.abc import Iterator

from etils import epath

from alignjax.core.errors import UserError

_TASK = '.task'


def check_free(path: epath.Path, mark: str, overwrite: bool) -> None:
  """Raises UserError if `path` must not be written to.

  Only a directory that holds the file `mark` is ever overwritten.
  """
  if not path.exists():
    return
  if path.is_dir() and not list(path.iterdir()):
    return
  if not overwrite:
    raise UserError(f'{path} exists already; to replace it, pass --overwrite')
  if not (path / mark).exists():
    raise UserError(
      f'{path} exists and has no {mark}, so it is not overwritten'
    )


@contextlib.contextmanager
def replaced(
  path: epath.Path, needed_bytes: int = 0, task: str = ''
) -> Iterator[epath.Path]:
  """Yields a directory that becomes `path` when the block ends.

  After an error there is none, and an old one is untouched. Raises UserError
  if `needed_bytes` have no room, or the disk runs full all the same.

  With a `task`, a text that names what is to be in it, an interrupted or killed
  block leaves what it has, and the next block of the same task is given that.
  """
  partial = path.parent / f'.{path.name}.partial'
  mark = partial / _TASK
  try:
    if not (task and mark.exists() and mark.read_text() == task):
      _remove(partial)
      partial.mkdir(parents=True)
      _check_room(path, partial, needed_bytes)
      if task:
        mark.write_text(task)
    yield partial
    mark.unlink(missing_ok=True)
    _swap(partial, path)
  except BaseException as error:
    interrupted = not isinstance(error, Exception)
    if not (task and interrupted):
      _remove(partial)
    if _is_disk_full(error):
      raise UserError(f'disk full while writing {path}') from error
    raise


def _check_room(
  path: epath.Path, partial: epath.Path, needed_bytes: int
) -> None:
  if '://' in str(path):
    return
  free = shutil.disk_usage(partial).free
  if needed_bytes > free:
    raise UserError(
      f'disk full: {path} needs {needed_bytes / 1e9:.3f} GB, its disk has'
      f' {free / 1e9:.3f} GB left'
    )


def _swap(partial: epath.Path, path: epath.Path) -> None:
  """`partial` becomes `path`; what was there goes once it is replaced."""
  if not path.exists():
    partial.rename(path)
    return
  old = path.parent / f'.{path.name}.replaced'
  _remove(old)
  path.rename(old)
  try:
    partial.rename(path)
  except BaseException:
    old.rename(path)
    raise
  _remove(old)


def _remove(path: epath.Path) -> None:
  if path.exists():
    path.rmtree()


def _is_disk_full(error: BaseException) -> bool:
  full = isinstance(error, OSError) and error.errno == errno.ENOSPC
  # TensorStore says it in words, in an error of another type.
  return full or 'No space left on device' in str(error)
