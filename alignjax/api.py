"""The Python API's model: load, apply, sample, save.

A `LoadedModel` is a decoder config, its stacked parameters and its tokenizer;
these four functions are thin compositions of the rooms below.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from alignjax.core.types import Params, UserError
from alignjax.data.tokenizer import ByteTokenizer, Tokenizer
from alignjax.models import decoder
from alignjax.models.config import Config, from_json, to_json
from alignjax.policies import lm
from alignjax.policies.combine import tempered
from alignjax.policies.sample import sample as draw
from alignjax.system import model_dir


class LoadedModel(NamedTuple):
  """A model ready to use. `params` are in the canonical tree.

  `tokenizer` is None if the directory has none; `tokenizer_file` is copied
  along when the model is saved.
  """

  config: Config
  params: Params
  tokenizer: Tokenizer | ByteTokenizer | None
  tokenizer_file: Path | None = None
  provenance: dict[str, Any] = {}


def load(path: str | Path, role: str = 'policy') -> LoadedModel:
  """Reads a model directory; every leaf's checksum is verified."""
  found = model_dir.read(path)
  file = Path(found.tokenizer) if found.tokenizer else None
  return LoadedModel(
    config=from_json(found.config),
    params=model_dir.load(found, role),
    tokenizer=Tokenizer.load(file) if file else None,
    tokenizer_file=file,
    provenance=found.provenance,
  )


def save(
  model: LoadedModel, path: str | Path, *, overwrite: bool = False
) -> None:
  """Writes a model directory: all of it or nothing."""
  model_dir.write(
    path,
    config=to_json(model.config),
    params={'policy': model.params},
    provenance=model.provenance,
    tokenizer=model.tokenizer_file,
    overwrite=overwrite,
  )


def apply(
  model: LoadedModel,
  tokens: Int[Array, 'B T'],
  *,
  positions: Int[Array, 'B T'] | None = None,
  segment_ids: Int[Array, 'B T'] | None = None,
) -> Float[Array, 'B T V']:
  """Raw float32 logits: nothing is masked; logits at t score token t + 1."""
  params = decoder.stacked(model.config, model.params)
  return decoder.apply(model.config, params, tokens, positions, segment_ids)


def sample(
  model: LoadedModel,
  prompts: Sequence[str],
  *,
  max_new_tokens: int = 64,
  temperature: float = 1.0,
  count: int = 1,
  key: Array | None = None,
) -> list[list[str]]:
  """`count` texts for each prompt; temperature 0 takes the likeliest token."""
  tokens = model.tokenizer
  if tokens is None:
    raise UserError('this model has no tokenizer; sample from token ids')
  encoded = [[tokens.bos, *ids] for ids in tokens.encode_batch(list(prompts))]
  width = max(map(len, encoded))
  padded = np.full((len(encoded), width), tokens.pad, np.int32)
  for row, ids in zip(padded, encoded):
    row[-len(ids) :] = ids
  parts = lm.model(model.config, tokens)
  policy = tempered(parts.policy('policy'), temperature or 1.0)
  bundle = {'policy': decoder.stacked(model.config, model.params)}

  @jax.jit
  def run(bundle, batch, key):
    return draw(
      policy,
      policy.view(bundle, batch),
      batch,
      key,
      count=count,
      max_new_tokens=max_new_tokens,
      stop=parts.stop,
      pad=parts.pad,
      greedy=temperature == 0,
    )

  batch = {'prompt': jnp.asarray(padded), 'id': jnp.arange(len(padded))}
  out = run(bundle, batch, jax.random.key(0) if key is None else key)
  responses, masks = np.asarray(out['response']), np.asarray(out['mask'])
  return [
    [tokens.decode(ids[mask].tolist()) for ids, mask in zip(*row)]
    for row in zip(responses, masks)
  ]
