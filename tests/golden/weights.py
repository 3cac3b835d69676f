"""The weights behind every golden file, from names and shapes alone.

Only numpy and integer arithmetic, so that the scripts that make the files and
the tests that read them get the same bits on any machine and any version.
Nothing is zero, which a fresh model's norms and biases would be: that hides
bugs. No model code here, neither ours nor a peer's.
"""

import hashlib
import zlib
from collections.abc import Mapping, Sequence

import numpy as np


def normal(seed: int, name: str, shape: Sequence[int]) -> np.ndarray:
  """Standard normal numbers (sums of twelve uniforms), float32."""
  size = int(np.prod(shape))
  bits = np.random.Philox(key=[seed, zlib.crc32(name.encode())])
  raw = bits.random_raw(3 * size).reshape(size, 3)
  parts = [(raw >> np.uint64(16 * i)) & np.uint64(0xFFFF) for i in range(4)]
  total = sum(part.sum(axis=1) for part in parts).astype(np.float64)
  return (total / 65536 - 6).astype(np.float32).reshape(shape)


def array(seed: int, name: str, shape: Sequence[int]) -> np.ndarray:
  """Values of one tensor, at a scale that fits its kind.

  Names are Hugging Face's or DeepMind's. The recurrence's decay spreads over
  -4 to 1, so that channels forget at very different rates.
  """
  if name.endswith(('recurrent_param', 'a_param')):
    return np.float32(-1.5) + np.clip(normal(seed, name, shape), -2.5, 2.5)
  if name.endswith(('embed_tokens.weight', 'embedding')):
    return np.float32(0.15) * normal(seed, name, shape)
  if 'norm' in name:
    return np.float32(0.3) * normal(seed, name, shape)
  if name.endswith(('bias', '/b')):
    return np.float32(0.1) * normal(seed, name, shape)
  return np.float32(0.35) * normal(seed, name, shape)


def tree(
  seed: int, shapes: Mapping[str, Sequence[int]]
) -> dict[str, np.ndarray]:
  """All tensors of a model."""
  return {name: array(seed, name, shape) for name, shape in shapes.items()}


def checksum(tensors: Mapping[str, np.ndarray]) -> str:
  """SHA-256 over names and bytes: says at once that the weights differ."""
  digest = hashlib.sha256()
  for name in sorted(tensors):
    digest.update(name.encode())
    digest.update(np.ascontiguousarray(tensors[name]).tobytes())
  return digest.hexdigest()


def tokens(seed: int, rows: int, length: int, vocab: int) -> np.ndarray:
  """Ids from 3 on, each row beginning with 2 as a real row does."""
  bits = np.random.Philox(key=[seed, 1])
  raw = bits.random_raw(rows * length).reshape(rows, length)
  out = (3 + raw % np.uint64(vocab - 3)).astype(np.int32)
  out[:, 0] = 2
  return out
