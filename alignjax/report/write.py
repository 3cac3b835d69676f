"""Writing a file whole or not at all. It knows nothing of what is written."""

import os
from pathlib import Path

from alignjax.core.types import UserError


def write(path: str | os.PathLike, data: bytes) -> None:
  """Write `data` by way of a temporary name beside `path`.

  Raises UserError where the file cannot be written; an old one survives.
  """
  path = Path(path)
  partial = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial.write_bytes(data)
    os.replace(partial, path)
  except OSError as error:
    try:
      partial.unlink(missing_ok=True)
    except OSError:
      pass  # its folder is not one: nothing was written
    raise UserError(f'{path}: cannot be written ({error.strerror}).') from error
