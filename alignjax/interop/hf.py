"""Hugging Face directories: config.json and safetensors files, in and out.

`read` compares every tensor that config.json implies with the headers before
it returns, and then reads one tensor at a time. `writer` takes one leaf at a
time. Neither needs torch or transformers. Weights in a pickle are never opened.
"""

import contextlib
import dataclasses
import functools
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from etils import epath

from alignjax.core import directory
from alignjax.core.errors import UserError
from alignjax.core.files import Room
from alignjax.core.journal import Put
from alignjax.core.spec import Spec
from alignjax.interop import (
  hf_config,
  hf_facts,
  hf_files,
  hf_names,
  safetensors,
  safetensors_write,
)
from alignjax.interop.opened import Opened
from alignjax.interop.safetensors import Tensor
from alignjax.models.config import Config
from alignjax.models.shapes import shapes

CONFIG = 'config.json'
TOKENIZER = 'tokenizer.model'
RECORD = 'alignjax.json'  # where the weights come from, if we know
# What travels with the weights, whatever it says.
FILES = (
  TOKENIZER,
  'tokenizer.json',
  'tokenizer_config.json',
  'special_tokens_map.json',
  'added_tokens.json',
  'chat_template.jinja',
  'chat_template.json',
  'generation_config.json',
  'preprocessor_config.json',
  'processor_config.json',
)
_FLOATS = (np.float16, ml_dtypes.bfloat16, np.float32, np.float64)

Specs = Mapping[str, Spec]


class Leaf(NamedTuple):
  """Where a canonical leaf lies: its tensor, how to turn it, its shape."""

  tensor: Tensor
  form: hf_names.Form
  shape: tuple[int, ...]


def read(path: epath.PathLike, *, window_self: bool | None = None) -> Opened:
  """What a directory holds; no weights are read, but headers are checked.

  An lm_head is compared with the embedding: the only tensors looked into.

  Args:
    path: the directory.
    window_self: see Config; None is the rule that the weights were trained
      with, which for RecurrentGemma is not the one of transformers.

  Raises UserError naming all tensors that are missing, too many or of another
  shape, or what else is wrong.
  """
  path = _absolute(path)
  file = path / CONFIG
  facts = hf_files.json_of(file)
  config = hf_config.config_of(facts, str(file), window_self=window_self)
  found = hf_files.tensors(path)
  prefix = _prefix(found)
  table = found.get(f'{prefix}embed_tokens.weight')
  if table is not None:
    config = _with_table(config, table)
  leaves, extra = _matched(path, facts['model_type'], config, prefix, found)
  head = next((name for name in hf_names.HEADS if name in found), None)
  stored = leaves['embedding'].tensor
  _check_head(found, head, stored)
  source = {
    'format': 'hf',
    'path': str(path),
    'config': facts,
    'prefix': prefix,
    'lm_head': head,
    'dtype': stored.dtype.name,
    'rows': stored.shape[0],
    'extra': len(extra),
  }
  tokenizer = path / TOKENIZER
  return Opened(
    path=path,
    format='hf',
    config=config,
    leaves={
      name: Spec(leaf.shape, leaf.tensor.dtype) for name, leaf in leaves.items()
    },
    load=functools.partial(_load, leaves),
    view=functools.partial(_view, leaves),
    origin={name: (leaf.tensor.name,) for name, leaf in leaves.items()},
    tokenizer=tokenizer if tokenizer.exists() else None,
    files=tuple(path / name for name in FILES if (path / name).exists()),
    provenance=_record(path) | {'source': source},
    extra={name: Spec(x.shape, x.dtype) for name, x in extra.items()},
    load_extra=functools.partial(_load_extra, extra),
  )


def check_free(path: epath.PathLike, overwrite: bool = False) -> None:
  """Raises UserError if `path` must not be written to."""
  directory.check_free(_absolute(path), CONFIG, overwrite)


@contextlib.contextmanager
def writer(
  path: epath.PathLike,
  config: Config,
  leaves: Specs,
  *,
  source: Mapping[str, Any] | None = None,
  files: Sequence[epath.PathLike] = (),
  record: Mapping[str, Any] = {},  # noqa: B006
  overwrite: bool = False,
  shard_bytes: int = safetensors_write.SHARD_BYTES,
  task: str = '',
) -> Iterator[Put]:
  """Writes a directory that transformers loads: all of it or nothing.

  Yields put(name, array), to be called once for each of `leaves` that is not
  in `put.finished`.

  Args:
    path: must not exist, unless it is such a directory and `overwrite`.
    config: the decoder.
    leaves: canonical name -> shape and dtype; a name with a dot is that of a
      tensor beyond the decoder, written as it is.
    source: provenance['source'] of what `read` returned: config.json, names
      and an lm_head are then as they were. None writes them anew.
    files: tokenizer and other files to copy under their own names.
    record: JSON that `read` gives back as provenance, in a file of its own.
    overwrite: replace an existing directory.
    shard_bytes: a file is closed before it would grow beyond this.
    task: names what is written; the same one continues after an interruption.

  Raises UserError before anything is written if no family of Hugging Face's
  has these leaves or there is no room, and if the disk runs full.
  """
  path = _absolute(path)
  directory.check_free(path, CONFIG, overwrite)
  table = leaves['embedding']
  source = source if source and _fits(source, config, leaves) else {}
  facts = _facts(config, str(path / CONFIG), table, source)
  model_type = facts['model_type']
  names, heads = _names(model_type, leaves, source)
  specs = {name: _stored(leaves[leaf], form) for leaf, name, form in names}
  specs |= dict.fromkeys(heads, table)
  total = sum(map(safetensors_write.size, specs.values()))
  forms = {leaf: (name, form) for leaf, name, form in names}

  with directory.replaced(path, total, task) as partial:
    with safetensors_write.writer(
      partial, specs, shard_bytes=shard_bytes, resume=bool(task)
    ) as write:
      yield _put(write, forms, heads, leaves)
    text = json.dumps(facts, indent=2, ensure_ascii=False) + '\n'
    (partial / CONFIG).write_text(text)
    if record:
      (partial / RECORD).write_text(json.dumps(dict(record), indent=2) + '\n')
    for file in map(epath.Path, files):
      if file.name in FILES:
        file.copy(partial / file.name)


def _put(
  write: Put,
  forms: Mapping[str, tuple[str, hf_names.Form]],
  heads: Sequence[str],
  leaves: Specs,
) -> Put:
  """Of leaves, from that of tensors; a tied head is a second tensor."""

  def targets(leaf: str) -> set[str]:
    return {forms[leaf][0], *(heads if leaf == 'embedding' else ())}

  def put(leaf: str, array: Any) -> None:
    for name in targets(leaf) - write.finished:
      write(name, forms[leaf][1].store(np.asarray(array)))

  def room(leaf: str) -> Room | None:
    (name, form), several = forms[leaf], len(targets(leaf)) > 1
    found = None if several else write.room(name)
    if found is None:
      return None
    return found._replace(array=form.load(found.array, leaves[leaf].shape))

  finished = {leaf for leaf in forms if targets(leaf) <= write.finished}
  return Put(put, frozenset(finished), room)


def _absolute(path: epath.PathLike) -> epath.Path:
  text = os.fspath(path)
  return epath.Path(text if '://' in text else os.path.abspath(text))


def _check_head(
  found: Mapping[str, Tensor], head: str | None, table: Tensor
) -> None:
  if head and not safetensors.same(found[head], table):
    raise UserError(
      f'{found[head].file}: {head} differs from {table.name}; a model whose'
      ' head is not its embedding is not supported'
    )


def _record(path: epath.Path) -> dict[str, Any]:
  file = path / RECORD
  return hf_files.json_of(file) if file.exists() else {}


def _prefix(found: Mapping[str, Tensor]) -> str:
  for name in ('embed_tokens.weight', 'layers.0.'):
    for prefix in hf_names.PREFIXES:
      if any(tensor.startswith(prefix + name) for tensor in found):
        return prefix
  return hf_names.PREFIXES[0]


def _with_table(config: Config, table: Tensor) -> Config:
  """Rows and dtype as stored; other rows only where both are known."""
  rows = table.shape[0] if table.shape else 0
  known = any({rows, config.vocab_size} == x for x in hf_config.PADDED_ROWS)
  wide = table.dtype.itemsize >= 4
  return dataclasses.replace(
    config,
    vocab_size=rows if known else config.vocab_size,
    dtype='float32' if wide else 'bfloat16',
  )


def _matched(
  path: epath.Path,
  model_type: str,
  config: Config,
  prefix: str,
  found: Mapping[str, Tensor],
) -> tuple[dict[str, Leaf], dict[str, Tensor]]:
  """Leaves and the tensors beyond them, once nothing is wrong with any."""
  missing, wrong = [], []
  leaves: dict[str, Leaf] = {}
  left = {name: x for name, x in found.items() if name not in hf_names.HEADS}
  for leaf, spec in sorted(shapes(config).items()):
    name, form = hf_names.tensor(model_type, leaf)
    tensor = left.pop(prefix + name, None)
    if tensor is None:
      missing.append(prefix + name)
      continue
    expected = form.shape(spec.shape)
    if tensor.shape != expected:
      wrong.append(f'{tensor.name} is {tensor.shape}, expected {expected}')
    if tensor.dtype not in _FLOATS:
      wrong.append(f'{tensor.name} is {tensor.dtype}, expected a float')
    leaves[leaf] = Leaf(tensor, form, spec.shape)
  vision = model_type == 'gemma3'
  extra = {k: x for k, x in left.items() if re.fullmatch(hf_names.VISION, k)}
  unknown = sorted(set(left) - set(extra if vision else ()))
  problems = [
    f'{len(names)} {what}: {hf_files.some(names)}'
    for what, names in (
      ('missing', sorted(missing)),
      ('not expected', unknown),
      ('of another shape or dtype', wrong),
    )
    if names
  ]
  if problems:
    raise UserError(
      f'{path}: tensors and {CONFIG} do not agree: {"; ".join(problems)}'
    )
  return leaves, extra


def _load(leaves: Mapping[str, Leaf], name: str) -> np.ndarray:
  tensor, form, shape = leaves[name]
  return np.ascontiguousarray(form.load(safetensors.read(tensor), shape))


def _view(
  leaves: Mapping[str, Leaf], name: str, allocate: Any = None
) -> np.ndarray:
  del allocate  # nothing is held
  tensor, form, shape = leaves[name]
  return form.load(safetensors.view(tensor), shape)


def _load_extra(extra: Mapping[str, Tensor], name: str) -> np.ndarray:
  return safetensors.read(extra[name])


def _fits(source: Mapping[str, Any], config: Config, leaves: Specs) -> bool:
  """Whether what is written is still the kind of model that was read."""
  model_type = source['config']['model_type']
  if model_type == 'gemma3' and source['extra']:
    if not any('.' in leaf for leaf in leaves):
      return False  # it has lost its image side: a text model
  family = hf_facts.family(config)
  return family.removesuffix('_text') == model_type.removesuffix('_text')


def _facts(
  config: Config,
  where: str,
  table: Spec,
  source: Mapping[str, Any],
) -> dict[str, Any]:
  dtype = np.dtype(table.dtype).name
  if source:
    return hf_facts.kept(config, where, dtype=dtype, source=source)
  return hf_facts.facts_of(config, where, dtype=dtype)


def _names(
  model_type: str, leaves: Specs, source: Mapping[str, Any]
) -> tuple[list[tuple[str, str, hf_names.Form]], list[str]]:
  """(leaf, tensor, form) in the order of layers, and names of the heads."""
  prefix = source.get('prefix', hf_names.PREFIXES[0])
  out = []
  for leaf in sorted(leaves, key=_order):
    if '.' in leaf:
      out.append((leaf, leaf, hf_names.SAME))
    else:
      name, form = hf_names.tensor(model_type, leaf)
      out.append((leaf, prefix + name, form))
  head = source.get('lm_head')
  return out, [head] if head else []


def _order(leaf: str) -> tuple[int, int, str]:
  layer = re.match(r'layer_(\d+)/', leaf)
  if layer:
    return 1, int(layer[1]), leaf
  return {'embedding': 0, 'final_norm': 2}.get(leaf, 3), 0, leaf


def _stored(spec: Spec, form: hf_names.Form) -> Spec:
  return Spec(form.shape(spec.shape), spec.dtype)
