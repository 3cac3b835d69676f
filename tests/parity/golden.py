"""Golden files as models on disk, and the comparisons that all peers share.

The weights of a golden model are made anew from names and shapes and written
in the peer's own format, so that the tests go in by the front door.
"""

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from safetensors.numpy import save_file

import alignjax as aj
from alignjax.api import LoadedModel
from alignjax.core import naming, tree
from alignjax.models import decoder
from alignjax.policies import lm
from alignjax.policies.sample import sample
from tests import tiny
from tests.golden import weights

FOLDER = Path(weights.__file__).parent


class Golden(NamedTuple):
  """What a peer computed. `data` by name; `tensors` are its weights."""

  facts: dict[str, Any]
  data: dict[str, np.ndarray]
  tensors: dict[str, np.ndarray]

  @property
  def gradients(self) -> dict[str, np.ndarray]:
    return {
      name.removeprefix('grad/'): x
      for name, x in self.data.items()
      if name.startswith('grad/')
    }


@functools.cache
def read(family: str) -> Golden:
  facts = json.loads((FOLDER / f'{family}.json').read_text())
  with np.load(FOLDER / f'{family}.npz', allow_pickle=False) as file:
    data = dict(file)
  tensors = weights.tree(facts['seed'], facts['shapes'])
  assert weights.checksum(tensors) == facts['sha256'], 'other weights'
  return Golden(facts, data, tensors)


def hugging_face(folder, golden: Golden, tensors) -> Path:
  """A directory as `save_pretrained` writes it."""
  folder.mkdir()
  (folder / 'config.json').write_text(json.dumps(golden.facts['config']))
  file = folder / 'model.safetensors'
  save_file(tensors, file, metadata={'format': 'pt'})
  return folder


def deepmind(folder, golden: Golden, tensors) -> Path:
  """An Orbax tree, nested as the linen module's parameters are."""
  del golden
  with ocp.StandardCheckpointer() as saver:
    saver.save(folder, naming.nested(tensors))
  return folder


@functools.partial(jax.jit, static_argnums=0)
def apply(config, params, *arrays):
  return decoder.apply(config, decoder.stacked(config, params), *arrays)


@functools.partial(jax.jit, static_argnums=0)
def loss_and_gradient(config, params, tokens):
  """Mean next-token loss of whole rows, by canonical leaf."""

  def loss(params):
    logp = jax.nn.log_softmax(apply(config, params, tokens)[:, :-1])
    return -jnp.take_along_axis(logp, tokens[:, 1:, None], axis=-1).mean()

  return jax.value_and_grad(loss)(params)


def check_plain(model: LoadedModel, golden: Golden) -> None:
  logits = aj.apply(model, golden.data['plain/tokens'])
  tiny.check_logits(logits, golden.data['plain/logits'])


def check_packed(model: LoadedModel, golden: Golden) -> None:
  data = golden.data
  logits = aj.apply(
    model,
    data['packed/tokens'],
    positions=data['packed/position'],
    segment_ids=data['packed/segment'],
  )
  tiny.check_logits(logits, data['packed/logits'])


def check_padded(model: LoadedModel, golden: Golden) -> None:
  data = golden.data
  position = data['padded/position']
  logits = aj.apply(model, data['padded/tokens'], positions=position)
  real = np.asarray(logits)[position >= 0]
  tiny.check_logits(real, data['padded/logits'])


def check_gradient(
  model: LoadedModel, golden: Golden, gradient: LoadedModel
) -> None:
  """`gradient`: the peer's gradient, loaded as if it were the weights.

  A change of layout only moves numbers, so gradients follow their weights.
  """
  loss, found = loss_and_gradient(
    model.config, model.params, golden.data['plain/tokens']
  )
  np.testing.assert_allclose(loss, golden.data['loss'], rtol=1e-5)
  expected = tree.named(gradient.params)
  found = tree.named(found)
  assert found.keys() == expected.keys()
  errors = {
    name: np.linalg.norm(x - expected[name]) / np.linalg.norm(expected[name])
    for name, x in found.items()
  }
  assert {name: e for name, e in errors.items() if not e <= 1e-4} == {}


def check_greedy(model: LoadedModel, golden: Golden) -> None:
  """64 tokens through the cache; near ties may fall either way."""
  data = golden.data
  policy = lm.lm(model.config, 'policy')
  batch = {
    'prompt': jnp.asarray(data['greedy/prompt']),
    'id': jnp.arange(len(data['greedy/prompt'])),
  }

  @jax.jit
  def draw(params):
    bundle = {'policy': decoder.stacked(model.config, params)}
    view = policy.view(bundle, batch)
    key = jax.random.key(0)
    return sample(
      policy, view, batch, key, count=1, max_new_tokens=64, greedy=True
    )

  found = np.asarray(draw(model.params)['response'])[:, 0]
  for row, tokens, margin in zip(
    found, data['greedy/tokens'], data['greedy/margin']
  ):
    clear = np.cumprod(margin > 1e-4).sum()
    assert clear == 64  # the files were made so that nothing is a near tie
    np.testing.assert_array_equal(row, tokens)


def differs(a, b) -> float:
  """Largest difference of two arrays of logits."""
  return float(np.abs(np.asarray(a) - np.asarray(b)).max())
