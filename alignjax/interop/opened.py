"""A model on disk, whoever wrote it: what every reader of this room returns.

A record of facts and two functions that read. Nothing here opens a file, and
no weights are held: each call of `load` reads the tensors of one leaf.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from alignjax.core.spec import Spec
from alignjax.models.config import Config


class Opened(NamedTuple):
  """A decoder in files, in canonical names.

  Attributes:
    path: the directory, absolute.
    format: 'alignjax', 'hf' or 'deepmind'.
    config: the decoder that the leaves belong to.
    leaves: canonical leaf name -> shape and stored dtype, sorted by name.
    load: canonical leaf name -> the leaf in its stored dtype, C-contiguous;
      reads that leaf and nothing else.
    view: (canonical leaf name, allocate=np.empty) -> the same to look at: a
      window on the file, not contiguous in general, or what `allocate` gave
      for (shape, dtype), filled, or where the format does neither as `load`.
    origin: canonical leaf name -> names of the tensors that it is made of.
    tokenizer: tokenizer.model, or None.
    files: every tokenizer, chat and generation file that travels along, the
      tokenizer included.
    provenance: JSON; under 'source' what a writer needs to give the files
      back as they were.
    extra: foreign name -> shape and dtype of the tensors that are not the
      decoder's, such as a vision tower.
    load_extra: foreign name -> that tensor.
    weights: what a conditioned model is mixed by, () for others.
    head: what is on top, as ModelDir has it.
    merge: of what the leaves are merged as they are read (`merge.made.Merge`);
      None for a model that is on disk itself. `path` then only names it.
  """

  path: epath.Path
  format: str
  config: Config
  leaves: dict[str, Spec]
  load: Callable[[str], np.ndarray]
  view: Callable[..., np.ndarray]
  origin: Mapping[str, tuple[str, ...]]
  tokenizer: epath.Path | None
  files: tuple[epath.Path, ...]
  provenance: dict[str, Any]
  extra: dict[str, Spec]
  load_extra: Callable[[str], np.ndarray]
  weights: tuple[float, ...] = ()
  head: str = 'tied'
  merge: Any = None
