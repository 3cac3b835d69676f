"""Arrays that a killed command finds again, if nothing they are of changed."""

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from alignjax.core import files


def load(file: Path, stamp: str) -> dict[str, np.ndarray] | None:
  """What `save` wrote under the same stamp, else None."""
  try:
    with np.load(file, allow_pickle=False) as arrays:
      if str(arrays['stamp']) != stamp:
        return None
      return {name: arrays[name] for name in arrays if name != 'stamp'}
  except (OSError, ValueError, KeyError, zipfile.BadZipFile):
    return None


def save(file: Path, stamp: str, arrays: Mapping[str, np.ndarray]) -> None:
  """Writes all of them or none; `stamp` says what they are of."""
  out = io.BytesIO()
  everything: dict[str, Any] = {'stamp': np.array(stamp), **arrays}
  np.savez(out, **everything)
  files.write(file, out.getvalue())
