"""Makes the golden file of RecurrentGemma by DeepMind's own package.

  python tests/golden/make_recurrentgemma.py

Needs recurrentgemma (made with 1.0.1, flax 0.12.8, jax 0.10.2, CPU); reading
the file needs none of it. Its rules differ from those of transformers: a query
sees W earlier keys and itself, and nothing crosses a document's start.
"""

import json
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import weights
from recurrentgemma.common import GriffinConfig, TemporalBlockType
from recurrentgemma.jax import Griffin

HERE = Path(__file__).parent
VOCAB, SEED = 80, 7
R, A = TemporalBlockType.RECURRENT, TemporalBlockType.ATTENTION
NUMBERS = dict(
  vocab_size=VOCAB,
  width=24,
  mlp_expanded_width=36,
  lru_width=30,  # not the width, as the published models have it
  num_heads=3,
  embeddings_scale_by_sqrt_dim=True,
  attention_window_size=8,
  logits_soft_cap=3.0,
)
MODEL = Griffin(
  GriffinConfig(**NUMBERS, block_types=(R, R, A, R)),
  gradient_checkpointing=False,
)


def named(tree):
  """Leaves by path joined by '/'."""
  flat = jax.tree_util.tree_flatten_with_path(tree)[0]
  return {
    jax.tree_util.keystr(path, simple=True, separator='/'): leaf
    for path, leaf in flat
  }


def weighted():
  """Parameters as a tree, their shapes by name, their checksum."""
  position = jnp.zeros((1, 1), jnp.int32)
  tree = jax.eval_shape(MODEL.init, jax.random.key(0), position, position)
  shapes = {name: x.shape for name, x in named(tree['params']).items()}
  values = weights.tree(SEED, shapes)
  structure = jax.tree.structure(tree['params'])
  params = jax.tree.unflatten(
    structure, [jnp.asarray(values[name]) for name in shapes]
  )
  return params, shapes, weights.checksum(values)


@jax.jit
def run(params, tokens, position):
  return MODEL.apply({'params': params}, tokens, position, return_cache=False)[
    0
  ]


@jax.jit
def read(params, tokens, position, cache=None):
  return MODEL.apply({'params': params}, tokens, position, cache)


def plain(params):
  """Logits, the mean next-token loss and its gradient."""
  tokens = weights.tokens(10, 2, 26, VOCAB)
  position = np.broadcast_to(np.arange(26, dtype=np.int32), tokens.shape)

  def loss(params):
    logp = jax.nn.log_softmax(run(params, tokens, position)[:, :-1])
    return -jnp.take_along_axis(logp, tokens[:, 1:, None], axis=-1).mean()

  value, gradient = jax.value_and_grad(loss)(params)
  return {
    'plain/tokens': tokens,
    'plain/logits': run(params, tokens, position),
    'loss': value,
  } | {f'grad/{name}': x for name, x in named(gradient).items()}


def packed(params):
  """Three documents in a row, each from position 0."""
  lengths = (17, 14, 9)
  tokens = weights.tokens(11, 1, sum(lengths), VOCAB)
  position = np.concatenate([np.arange(n, dtype=np.int32) for n in lengths])
  segment = np.repeat([1, 2, 3], lengths)[None].astype(np.int32)
  logits = run(params, tokens, position[None])
  for s in (1, 2, 3):
    columns = segment[0] == s
    alone = run(params, tokens[:, columns], position[None, columns])
    assert np.abs(logits[:, columns] - alone).max() < 1e-5
  return {
    'packed/tokens': tokens,
    'packed/position': position[None],
    'packed/segment': segment,
    'packed/logits': logits,
  }


def padded(params):
  """Left padding at position -1, as the package's sampler lays it out."""
  tokens = weights.tokens(12, 2, 26, VOCAB)
  position = np.arange(26, dtype=np.int32) - np.array([[7], [0]])
  position = np.maximum(position, -1).astype(np.int32)
  real = position >= 0
  tokens[0, 7] = 2
  tokens = np.where(real, tokens, 0).astype(np.int32)
  logits = run(params, tokens, position)
  return {
    'padded/tokens': tokens,
    'padded/position': position,
    'padded/logits': logits[real],
  }


def greedy(params):
  """64 likeliest tokens by the package's own cache, and by how much."""
  found = []
  for seed in range(20, 200):
    prompt = weights.tokens(seed, 1, 11, VOCAB)
    position = np.arange(11, dtype=np.int32)[None]
    _, cache = read(params, prompt[:, :-1], position[:, :-1])
    token, new, margins = prompt[:, -1:], [], []
    for t in range(10, 74):
      at = np.full((1, 1), t, np.int32)
      logits, cache = read(params, token, at, cache)
      second, first = np.sort(logits[0, -1])[-2:]
      margins.append(first - second)
      token = np.asarray(logits[:, -1:]).argmax(axis=-1).astype(np.int32)
      new.append(int(token[0, 0]))
    # Continuations that end in one repeated token, or that rounding may turn,
    # test less.
    if min(margins) > 1e-3 and len(set(new[-32:])) >= 6:
      found.append((prompt[0], new, margins))
    if len(found) == 2:
      break
  prompt, new, margins = zip(*found)
  return {
    'greedy/prompt': np.stack(prompt),
    'greedy/tokens': np.asarray(new, np.int32),
    'greedy/margin': np.asarray(margins, np.float32),
  }


def main() -> None:
  params, shapes, digest = weighted()
  facts = {
    'seed': SEED,
    'config': NUMBERS | {'block_types': 'RRAR'},
    'shapes': shapes,
    'sha256': digest,
    'versions': {x: version(x) for x in ('recurrentgemma', 'flax', 'jax')},
  }
  data = plain(params) | packed(params) | padded(params) | greedy(params)
  data = {name: np.asarray(x) for name, x in data.items()}
  path = HERE / 'recurrentgemma_deepmind'
  path.with_suffix('.json').write_text(json.dumps(facts, indent=1) + '\n')
  np.savez_compressed(path.with_suffix('.npz'), **data)
  top = np.abs(data['plain/logits']).max()
  print(f'largest logit {top:.2f}, loss {data["loss"]:.3f}')


if __name__ == '__main__':
  main()
