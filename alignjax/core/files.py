"""Writing a file whole or not at all. It knows nothing of what is written."""

import os
from pathlib import Path

from alignjax.core.types import UserError


def write(path: str | os.PathLike, data: str | bytes) -> None:
  """Writes by way of a temporary name beside `path`, made durable.

  Raises UserError where the file cannot be written; an old one survives.
  """
  path = Path(path)
  if isinstance(data, str):
    data = data.encode()
  partial = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(partial, 'wb') as file:
      file.write(data)
      file.flush()
      os.fsync(file.fileno())
    os.replace(partial, path)
  except OSError as error:
    try:
      partial.unlink(missing_ok=True)
    except OSError:
      pass  # its folder is not one: nothing was written
    raise UserError(f'{path}: cannot be written ({error.strerror})') from error
