"""Shapes of a decoder's leaves, written down: what files are compared with.

The modules of this room declare the same when they are traced, and a test holds
the two together; but a table needs neither JAX nor Flax, and opening a model on
disk should not wait for them.
"""

from collections.abc import Iterator

from alignjax.core.spec import Spec
from alignjax.models.config import Config

Shape = tuple[int, ...]


def shapes(config: Config) -> dict[str, Spec]:
  """Canonical leaf -> shape and master dtype, sorted by the parts of names."""
  found: dict[str, Shape] = {
    'embedding': (config.vocab_size, config.width),
    'final_norm': (config.width,),
  }
  for i in range(config.layers):
    for name, shape in _layer(config, config.kind(i)):
      found[f'layer_{i}/{name}'] = shape
  names = sorted(found, key=lambda name: name.split('/'))
  return {name: Spec(found[name], 'float32') for name in names}


def _layer(c: Config, kind: str) -> Iterator[tuple[str, Shape]]:
  mixer = 'recurrent' if kind == 'recurrent' else 'attn'
  inner = _recurrent(c) if kind == 'recurrent' else _attention(c)
  for name, shape in inner:
    yield f'{mixer}/{name}', shape
  for name, shape in _feed_forward(c):
    yield f'ffw/{name}', shape
  for sublayer in (mixer, 'ffw'):
    yield f'pre_{sublayer}_norm', (c.width,)
    if c.post_norm:
      # That of a recurrent mixer has the same name.
      after = 'attn' if sublayer == mixer else sublayer
      yield f'post_{after}_norm', (c.width,)


def _attention(c: Config) -> Iterator[tuple[str, Shape]]:
  yield 'q', (c.width, c.heads, c.head_dim)
  yield 'k', (c.width, c.kv_heads, c.head_dim)
  yield 'v', (c.width, c.kv_heads, c.head_dim)
  yield 'o', (c.heads, c.head_dim, c.width)
  if c.bias:
    yield 'o_bias', (c.width,)
  if c.qk_norm:
    yield 'q_norm', (c.head_dim,)
    yield 'k_norm', (c.head_dim,)


def _recurrent(c: Config) -> Iterator[tuple[str, Shape]]:
  width, block = c.lru_width, c.lru_width // c.heads
  for name in 'xy':
    yield name, (c.width, width)
    yield f'{name}_bias', (width,)
  yield 'conv', (c.conv_width, width)
  yield 'conv_bias', (width,)
  for name in ('input_gate', 'a_gate'):
    yield name, (c.heads, block, block)
    yield f'{name}_bias', (c.heads, block)
  yield 'a_param', (width,)
  yield 'out', (width, c.width)
  yield 'out_bias', (c.width,)


def _feed_forward(c: Config) -> Iterator[tuple[str, Shape]]:
  for name in ('gate', 'up'):
    yield name, (c.width, c.hidden)
    if c.bias:
      yield f'{name}_bias', (c.hidden,)
  yield 'down', (c.hidden, c.width)
  if c.bias:
    yield 'down_bias', (c.width,)
