"""The Python API's model: load, apply, sample, save.

A `LoadedModel` is a decoder config, its canonical parameters and its tokenizer;
these four functions are thin compositions of the rooms below. What they compile
is kept for the next call of the same shapes.
"""

import dataclasses
import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, Float, Int

from alignjax.core import naming, tree
from alignjax.core.errors import UserError
from alignjax.core.spec import Spec
from alignjax.core.types import Params
from alignjax.data.tokenizer import ByteTokenizer, Tokenizer
from alignjax.interop import convert
from alignjax.interop import open as files_of
from alignjax.interop.opened import Opened
from alignjax.models import decoder
from alignjax.models.config import Config
from alignjax.policies import lm
from alignjax.policies.combine import sampled, under_guidance
from alignjax.policies.sample import sample as draw
from alignjax.system import model_dir

PROMPT_STEP = 32  # prompts are padded to multiples, or each length compiles


class LoadedModel(NamedTuple):
  """A model ready to use.

  Attributes:
    config: of the decoder; its dtype is what is computed in.
    params: the canonical tree, in the dtypes of the files.
    tokenizer: None if the directory has none.
    files: tokenizer, chat and generation files; saved along.
    provenance: JSON; where the weights come from.
    opened: the directory, for the tensors beyond the decoder (a vision tower),
      which are saved along as well; None for a model that was made here.
  """

  config: Config
  params: Params
  tokenizer: Tokenizer | ByteTokenizer | None = None
  files: tuple[epath.Path, ...] = ()
  provenance: dict[str, Any] = {}
  opened: Opened | None = None


def load(
  path: str | Path,
  role: str = 'policy',
  *,
  dtype: str | None = None,
  window_self: bool | None = None,
  weights: Sequence[float] | None = None,
) -> LoadedModel:
  """Reads a model: our directory, a Hugging Face one, or a DeepMind tree.

  Args:
    path: the directory; what it is, is seen from its files.
    role: which params of our format; others have one.
    dtype: what to compute in, 'float32' or 'bfloat16'; None takes the file's
      word. The params keep the dtype they are stored in.
    window_self: whether a window of W counts the query's own key; None takes
      the format's word (RecurrentGemma's W + 1, see Config).
    weights: of a conditioned model, which comes back mixed by them, as a
      plain one; its copies are the roles of its directory.

  Raises UserError if there is no sound model, or if its tokenizer has more ids
  than the embedding has rows. Checksums are verified where a format has them.
  """
  found = files_of.open(
    path, role=role, window_self=window_self, weights=weights
  )
  convert.check_tokenizer(found, found.config.vocab_size)
  config, file = found.config, found.tokenizer
  if dtype is not None:
    config = dataclasses.replace(config, dtype=dtype)
  return LoadedModel(
    config=config,
    params=naming.nested(
      {name: jnp.asarray(found.load(name)) for name in found.leaves}
    ),
    tokenizer=None if file is None else Tokenizer.load(os.fspath(file)),
    files=found.files,
    provenance=found.provenance,
    opened=found,
  )


def save(
  model: LoadedModel,
  path: str | Path,
  format: str = 'alignjax',
  *,
  overwrite: bool = False,
) -> None:
  """Writes a model in a format: 'alignjax', 'hf' or 'deepmind'.

  All of it or nothing. Raises UserError if `path` is taken, or if the params
  are not those of the config.
  """
  what = convert.plan(
    _in_memory(model), files_of.absolute(path), to=format, overwrite=overwrite
  )
  convert.run(what)


def apply(
  model: LoadedModel,
  tokens: Int[Array, 'B T'],
  *,
  positions: Int[Array, 'B T'] | None = None,
  segment_ids: Int[Array, 'B T'] | None = None,
) -> Float[Array, 'B T V']:
  """Raw float32 logits: nothing is masked; logits at t score token t + 1.

  Args:
    model: of `load`.
    tokens: ids.
    positions: count from 0 in every document; -1 is padding. By default every
      row is one document without padding.
    segment_ids: documents of a packed row; positions restart in each.
  """
  return _apply(model.config, model.params, tokens, positions, segment_ids)


def sample(
  model: LoadedModel,
  prompts: Sequence[str],
  *,
  max_new_tokens: int = 64,
  temperature: float = 1.0,
  top_k: int = 0,
  top_p: float = 1.0,
  count: int = 1,
  guidance_scale: float = 1.0,
  uncond: str = '',
  key: Array | None = None,
) -> list[list[str]]:
  """`count` texts for each prompt; temperature 0 takes the likeliest token.

  With `top_k` only so many of the likeliest tokens can be drawn, with `top_p`
  only the likeliest that have this share of the probability.
  A `guidance_scale` other than 1 leads away from the text `uncond`, or from no
  prompt at all (`policies.combine.guided`).
  """
  tokens = model.tokenizer
  if tokens is None:
    raise UserError('this model has no tokenizer; sample from token ids')
  negative = [uncond] if guidance_scale != 1 else []
  texts = [*prompts, *negative]
  encoded = [[tokens.bos, *ids] for ids in tokens.encode_batch(texts)]
  width = -(-max(map(len, encoded)) // PROMPT_STEP) * PROMPT_STEP
  padded = np.full((len(encoded), width), tokens.pad, np.int32)
  for row, ids in zip(padded, encoded):
    row[-len(ids) :] = ids
  drawn = (temperature, top_k, top_p, guidance_scale)
  run = _sampler(model.config, tokens, count, max_new_tokens, drawn)
  rows = padded[: len(prompts)]
  batch = {'prompt': jnp.asarray(rows), 'id': jnp.arange(len(rows))}
  if negative:
    batch['uncond'] = jnp.broadcast_to(padded[-1], rows.shape)
  out = run(model.params, batch, jax.random.key(0) if key is None else key)
  responses, masks = np.asarray(out['response']), np.asarray(out['mask'])
  return [
    [tokens.decode(ids[mask].tolist()) for ids, mask in zip(*row)]
    for row in zip(responses, masks)
  ]


@functools.partial(jax.jit, static_argnums=0)
def _apply(config: Config, params, tokens, positions, segment_ids):
  params = decoder.stacked(config, params)
  return decoder.apply(config, params, tokens, positions, segment_ids)


@functools.lru_cache(maxsize=16)
def _sampler(config: Config, tokens, count, max_new_tokens, drawn):
  parts = lm.model(config, tokens)
  temperature, top_k, top_p, guidance_scale = drawn
  policy = sampled(
    under_guidance(parts, 'policy', guidance_scale),
    temperature=temperature or 1.0,
    top_k=top_k,
    top_p=top_p,
  )

  @jax.jit
  def run(params, batch, key):
    # Canonical: decoding has no use for stacked layers.
    return draw(
      policy,
      policy.view({'policy': params}, batch),
      batch,
      key,
      count=count,
      max_new_tokens=max_new_tokens,
      stop=parts.stop,
      pad=parts.pad,
      greedy=temperature == 0,
    )

  return run


def _in_memory(model: LoadedModel) -> Opened:
  """The model as if it were opened; its params are where they are."""
  leaves = dict(sorted(tree.named(model.params).items()))
  if wrong := files_of.differing(model.config, leaves):
    raise UserError(f'params that do not fit the config: {"; ".join(wrong)}')
  opened = model.opened
  tokenizers = [f for f in model.files if f.name == model_dir.TOKENIZER]

  def nothing(name: str) -> np.ndarray:
    raise KeyError(name)

  return Opened(
    path=opened.path if opened else epath.Path('memory'),
    format=opened.format if opened else 'alignjax',
    config=model.config,
    leaves={name: Spec(x.shape, x.dtype) for name, x in leaves.items()},
    load=lambda name: np.asarray(leaves[name]),
    view=lambda name, allocate=None: np.asarray(leaves[name]),
    origin={name: (name,) for name in leaves},
    tokenizer=tokenizers[0] if tokenizers else None,
    files=model.files,
    provenance=model.provenance,
    extra=opened.extra if opened else {},
    load_extra=opened.load_extra if opened else nothing,
  )
