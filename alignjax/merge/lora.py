"""Low-rank adapters: cut out of a fine-tune, and folded back into a model.

A task vector's linear maps W [out, in] are replaced by scale * B A of rank r,
the best there is in the Frobenius norm: a truncated SVD (Eckart and Young).
Files are those of PEFT: adapter_config.json and adapter_model.safetensors. What
is no linear map (embedding, norms) has no adapter; what is lost is told.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from alignjax.core import directory
from alignjax.core.errors import UserError
from alignjax.core.spec import Spec
from alignjax.interop import (
  hf_facts,
  hf_files,
  hf_names,
  safetensors,
  safetensors_write,
)
from alignjax.interop.opened import Opened
from alignjax.merge import arrays, inputs

CONFIG = 'adapter_config.json'
WEIGHTS = 'adapter_model.safetensors'
LINEAR = r'.*/(attn/[qkvo]|ffw/(gate|up|down)|recurrent/(x|y|out))'
_PREFIX = 'base_model.model.model.'
_OVERSAMPLED, _POWERS = 16, 4  # of the randomised range finder


class Kept(NamedTuple):
  """What of a task vector an adapter holds.

  Attributes:
    energy: share of the squared norm of each linear map that its product has.
    lost: names of leaves that moved and have no adapter.
  """

  energy: dict[str, float]
  lost: list[str]


def factors(
  delta: np.ndarray, rank: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
  """(B [out, r], A [r, in]) with B A the best approximation of that rank.

  By a randomised range finder with power iterations (Halko, Martinsson and
  Tropp, arXiv 0909.4061, algorithm 4.4) unless the matrix is small; the same
  seed gives the same factors. Each takes the root of the singular values.
  """
  rows, columns = delta.shape
  width = min(rank + _OVERSAMPLED, rows, columns)
  basis = None
  if width < min(rows, columns) // 2:
    draw = np.random.default_rng(seed).standard_normal
    basis = np.linalg.qr(delta @ draw((columns, width), np.float32))[0]
    for _ in range(_POWERS):
      basis = np.linalg.qr(delta.T @ basis)[0]
      basis = np.linalg.qr(delta @ basis)[0]
    u, s, v = np.linalg.svd(basis.T @ delta, full_matrices=False)
    u = basis @ u
  else:
    u, s, v = np.linalg.svd(delta, full_matrices=False)
  root = np.sqrt(s[:rank])
  more = rank - len(root)  # a small matrix is whole before
  b = np.pad(u[:, :rank] * root, ((0, 0), (0, more)))
  return b, np.pad(root[:, None] * v[:rank], ((0, more), (0, 0)))


def extract(
  base: Opened,
  model: Opened,
  path: epath.PathLike,
  *,
  rank: int,
  leaves: str = LINEAR,
  overwrite: bool = False,
  step: Callable[[str], None] = lambda name: None,
) -> Kept:
  """Writes the adapter of `model` on `base`; all of it or nothing.

  Args:
    base: of the model's shapes.
    model: the fine-tune.
    path: the adapter's directory.
    rank: of every factor, less where a matrix is smaller.
    leaves: regex of the linear maps that get one, on whole canonical names.
    overwrite: replace an adapter that is there.
    step: called after each leaf.
  """
  if rank < 1:
    raise UserError(f'rank = {rank}: expected 1 or more')
  inputs.check_same(
    str(base.path), base.leaves, {str(model.path): model.leaves}
  )
  path = epath.Path(path)
  directory.check_free(path, CONFIG, overwrite)
  family = hf_facts.family(base.config)
  tensors: dict[str, np.ndarray] = {}
  energy: dict[str, float] = {}
  lost, modules = [], set()
  for name, spec in base.leaves.items():
    if not arrays.floating(spec.dtype):
      continue
    delta = _difference(base, model, name)
    if not re.fullmatch(leaves, name) or not re.fullmatch(LINEAR, name):
      if np.any(delta):
        lost.append(name)
      continue
    target = _module(family, name)
    b, a = factors(delta, rank)
    whole = float(np.vdot(delta, delta))
    left = delta - b @ a
    energy[name] = 1 - float(np.vdot(left, left)) / whole if whole else 1.0
    tensors[f'{_PREFIX}{target}.lora_A.weight'] = np.ascontiguousarray(a)
    tensors[f'{_PREFIX}{target}.lora_B.weight'] = np.ascontiguousarray(b)
    modules.add(target.rpartition('.')[2])
    step(name)
  if not tensors:
    raise UserError(f'no linear map of {base.path} matches {leaves!r}')
  _write(path, tensors, rank, sorted(modules), str(base.path))
  return Kept(energy, lost)


def folded(base: Opened, adapter: epath.PathLike) -> Opened:
  """`base` with an adapter of PEFT's added to its linear maps.

  Raises UserError for adapters that are more than products of two matrices,
  and for tensors that fit no linear map, all listed.
  """
  path = epath.Path(adapter)
  facts = hf_files.json_of(path / CONFIG)
  pairs = _pairs(base, path, facts)
  scale = _scale(facts, path)

  def load(name: str) -> np.ndarray:
    leaf = base.load(name)
    if name not in pairs:
      return leaf
    b, a = (arrays.float32(safetensors.read(tensor)) for tensor in pairs[name])
    matrix = inputs.outputs_first(name, arrays.float32(leaf)) + scale * (b @ a)
    found = inputs.stored_again(name, matrix, leaf.shape)
    return arrays.rounded(np.ascontiguousarray(found), leaf.dtype)

  return base._replace(load=load, view=lambda name, allocate=None: load(name))


def _difference(base: Opened, model: Opened, name: str) -> np.ndarray:
  """float32 model - base; a linear map as [out, in]."""
  first, other = (
    inputs.outputs_first(name, arrays.float32(np.asarray(x.load(name))))
    for x in (base, model)
  )
  return other - first


def _module(family: str, leaf: str) -> str:
  """'layers.0.self_attn.q_proj'."""
  return hf_names.tensor(family, leaf)[0].removesuffix('.weight')


def _scale(facts: Mapping[str, Any], path: epath.Path) -> float:
  for field in ('use_dora', 'fan_in_fan_out', 'lora_bias'):
    if facts.get(field):
      raise UserError(f'{path}: {field} adapters are not folded')
  if facts.get('peft_type') != 'LORA':
    raise UserError(f'{path}: peft_type {facts.get("peft_type")!r} is no LORA')
  for field in ('rank_pattern', 'alpha_pattern'):
    if facts.get(field):
      raise UserError(f'{path}: a {field} is not read; ranks must be one')
  rank, alpha = facts.get('r'), facts.get('lora_alpha')
  if (
    not isinstance(rank, int) or not isinstance(alpha, int | float) or rank < 1
  ):
    raise UserError(f'{path}: r = {rank!r}, lora_alpha = {alpha!r}')
  return alpha / (math.sqrt(rank) if facts.get('use_rslora') else rank)


def _pairs(
  base: Opened, path: epath.Path, facts: Mapping[str, Any]
) -> dict[str, tuple[safetensors.Tensor, safetensors.Tensor]]:
  """Leaf -> (B, A), once all tensors are of one."""
  family = hf_facts.family(base.config)
  found = safetensors.header(path / WEIGHTS)
  # Prefixes differ with the class that the adapter was trained in.
  ends = {
    re.sub(r'^base_model\.model\.((language_)?model\.)*', '', name): name
    for name in found
  }
  pairs, wrong = {}, []
  for leaf, spec in base.leaves.items():
    if not re.fullmatch(LINEAR, leaf):
      continue
    target = _module(family, leaf)
    names = [ends.pop(f'{target}.lora_{x}.weight', None) for x in 'BA']
    if names == [None, None]:
      continue
    if None in names:
      wrong.append(f'{target} has one of its two matrices')
      continue
    b, a = (found[str(name)] for name in names)
    rows, columns = inputs.outputs_first(
      leaf, np.broadcast_to(np.int8(0), spec.shape)
    ).shape
    r = facts.get('r')
    if (b.shape, a.shape) != ((rows, r), (r, columns)):
      wrong.append(
        f'{target} is {list(b.shape)} x {list(a.shape)}, expected'
        f' {[rows, r]} x {[r, columns]}'
      )
    pairs[leaf] = b, a
  wrong += [f'{name} fits no linear map' for name in sorted(ends.values())]
  if wrong or not pairs:
    raise UserError(
      f'{path} does not fit {base.path}: {"; ".join(wrong) or "it is empty"}'
    )
  return pairs


def _write(
  path: epath.Path,
  tensors: Mapping[str, np.ndarray],
  rank: int,
  modules: list[str],
  base: str,
) -> None:
  facts = {
    'peft_type': 'LORA',
    'task_type': 'CAUSAL_LM',
    'base_model_name_or_path': base,
    'r': rank,
    'lora_alpha': rank,  # the product as it is
    'lora_dropout': 0.0,
    'bias': 'none',
    'fan_in_fan_out': False,
    'target_modules': modules,
  }
  specs = {name: Spec(x.shape, x.dtype) for name, x in tensors.items()}
  with directory.replaced(path) as partial:
    with safetensors_write.writer(partial, specs, shard_bytes=2**62) as put:
      for name, x in tensors.items():
        put(name, x)
    (partial / safetensors.SINGLE).rename(partial / WEIGHTS)
    (partial / CONFIG).write_text(json.dumps(facts, indent=2) + '\n')
