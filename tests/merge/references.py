"""Merging methods once more, in float64 on whole leaves; and how to call ours.

Task vectors are rounded to float32 first, as they are part of what is defined.
"""

import jax
import jax.numpy as jnp
import numpy as np

from alignjax.merge import arrays, blocks, method

NAME = 'layer_0/ffw/up'


def streamed(name, base, models, **numbers):
  """The merge through blocks, as of models on disk."""
  how = method.method(name)
  method.check_numbers(how, numbers, len(models), False)
  stacked = [models[0] if base is None else base, *models]
  leaf = blocks.Leaf(NAME, *base.shape, lambda a, b: [x[a:b] for x in stacked])
  total = None
  if how.passes:
    total = blocks.total(how, 0, leaf, None)
    method.check_total(how, 'layer_0', total)
  stats, given = blocks.settled(how, leaf, numbers, total)
  parts = [
    blocks.merged(how, leaf, [(stats, given)], block, [np.float32])[0]
    for block in leaf.blocks(how)
  ]
  assert all(part.dtype == np.float32 for part in parts)
  return np.concatenate(parts)


def compiled(name, base, models, **numbers):
  """The merge of whole leaves by JAX; numbers are traced but for counts."""
  how = method.method(name)
  method.check_numbers(how, numbers, len(models), False)
  if how.prepare is not None:
    numbers = how.prepare(base.size, **numbers)
  fixed = {k: v for k, v in numbers.items() if k in ('ranks', 'seed')}
  traced = {k: v for k, v in numbers.items() if k not in fixed}

  @jax.jit
  def merge(base, models, traced):
    given, stats = {**fixed, **traced}, None
    told = {k: v for k, v in given.items() if k != 'seed'}
    for one in how.passes:
      stats = one.settle(one.measure(base, models, stats), stats, **told)
    index = jnp.arange(base.size, dtype=jnp.uint32).reshape(base.shape)
    return method.combine(
      how, base, models, stats, given, name=NAME, index=index
    )

  found = merge(jnp.asarray(base), [jnp.asarray(m) for m in models], traced)
  assert found.dtype == jnp.float32
  return np.asarray(found)


def deltas(base, models):
  return [np.float64(np.float32(m) - np.float32(base)) for m in models]


def uniform(shape, model, seed):
  index = np.arange(np.prod(shape), dtype=np.uint32).reshape(shape)
  return arrays.uniform(index, method.stream(seed, NAME, model))


def top(x, k):
  return x >= np.sort(x, axis=None)[-k] if k else np.zeros(x.shape, bool)


def adding(base, changes, weights, scale):
  weights = weights or [1.0] * len(changes)
  return base + scale * sum(w * d for w, d in zip(weights, changes))


def electing(base, changes, weights, scale):
  out = np.array(base, np.float64)
  weights = weights or [1.0] * len(changes)
  for place in np.ndindex(base.shape):
    ds = [d[place] for d in changes]
    sign = np.sign(sum(w * d for w, d in zip(weights, ds)))
    chosen = [(w, d) for w, d in zip(weights, ds) if d * sign > 0]
    if share := sum(w for w, _ in chosen):
      out[place] += scale * sum(w * d for w, d in chosen) / share
  return out


def linear(base, models, weights=None, t=None):
  weights = weights if t is None else [1 - t, t]
  return np.average(np.float64(models), axis=0, weights=weights)


def liti(base, models, liti_rate):
  return base + liti_rate * deltas(base, models)[0]


def slerp(base, models, t=None):
  merged, *others = deltas(base, models)
  for m, d in enumerate(others, start=2):
    share = 1 / m if t is None else t
    cosine = np.sum(merged * d) / np.linalg.norm(merged) / np.linalg.norm(d)
    angle = np.arccos(cosine)
    merged = np.sin((1 - share) * angle) * merged + np.sin(share * angle) * d
    merged /= np.sin(angle)
  return base + merged


def task_arithmetic(base, models, weights=None, scale=1.0):
  return adding(base, deltas(base, models), weights, scale)


def ties(base, models, density=0.2, weights=None, scale=1.0):
  k = round(density * 1e6) * base.size // 10**6
  kept = [d * top(abs(d), k) for d in deltas(base, models)]
  return electing(base, kept, weights, scale)


def breadcrumbs(
  base, models, join, density=0.9, gamma=0.01, weights=None, scale=1.0
):
  kept = []
  for d in deltas(base, models):
    size = np.sort(abs(d), axis=None)[::-1]
    k, drop = int(density * d.size), int(gamma * d.size)
    drop = min(drop, d.size - k)
    kept.append(d * (abs(d) <= size[drop]) * (abs(d) >= size[drop + k - 1]))
  return join(base, kept, weights, scale)


def dare(base, models, join, density=0.5, weights=None, scale=1.0, seed=0):
  kept = [
    np.where(uniform(d.shape, m, seed) < np.float32(density), d / density, 0)
    for m, d in enumerate(deltas(base, models))
  ]
  return join(base, kept, weights, scale)


def della(
  base, models, join, density=0.5, epsilon=0.1, weights=None, scale=1.0, seed=0
):
  kept = []
  for m, d in enumerate(deltas(base, models)):
    rank = np.empty(d.shape)
    for row, out in zip(abs(d), rank):
      out[np.argsort(row, kind='stable')] = np.arange(len(row))
    share = density + epsilon * (2 * rank / (d.shape[1] - 1) - 1)
    stays = uniform(d.shape, m, seed) < share
    kept.append(stays * d / np.where(stays, share, 1))
  return join(base, kept, weights, scale)


def sce(base, models, density=0.1, scale=1.0):
  ds = np.stack(deltas(base, models))
  mask = top(np.var(ds, axis=0), int(density * base.size))
  ds = ds * mask
  weights = np.sum(ds**2, axis=(1, 2))
  agree = np.sign(ds) == np.sign(ds.sum(0))
  share = np.einsum('m,mij->ij', weights, agree * mask)
  step = np.einsum('m,mij->ij', weights, ds * agree)
  return base + scale * step / np.where(share > 0, share, 1)


def model_stock(base, models):
  ds = [d.ravel() / np.linalg.norm(d) for d in deltas(base, models)]
  count = len(ds)
  total = sum(a @ b for i, a in enumerate(ds) for b in ds[:i])
  cosine = max(0, total / (count * (count - 1) / 2))
  t = count * cosine / (1 + (count - 1) * cosine)
  return t * np.mean(np.float64(models), axis=0) + (1 - t) * base


def log(point, other):
  part = other - (point @ other) * point
  size = np.linalg.norm(part)
  angle = np.arctan2(size, point @ other)
  return part * (angle / size if size else 0)


def sphere(vectors, weights, steps):
  weights = np.array(weights or [1.0] * len(vectors)) / sum(
    weights or [1.0] * len(vectors)
  )
  norms = [np.linalg.norm(v) for v in vectors]
  units = [np.ravel(v) / n for v, n in zip(vectors, norms)]
  point = sum(w * u for w, u in zip(weights, units))
  point /= np.linalg.norm(point)
  for _ in range(steps):
    tangent = sum(w * log(point, u) for w, u in zip(weights, units))
    if size := np.linalg.norm(tangent):
      point = np.cos(size) * point + np.sin(size) * tangent / size
  return (weights @ norms * point).reshape(vectors[0].shape)


def karcher(base, models, weights=None):
  return sphere(np.float64(models), weights, 300)


def multislerp(base, models, weights=None):
  return base + sphere(deltas(base, models), weights, 1)


def slerp_raw(base, models, t=0.5):
  a, b = np.float64(models)
  cosine = np.sum(a * b) / np.linalg.norm(a) / np.linalg.norm(b)
  angle = np.arccos(cosine)
  first, second = np.sin((1 - t) * angle), np.sin(t * angle)
  return (first * a + second * b) / np.sin(angle)


def nearswap(base, models, t=1e-4):
  (d,) = deltas(base, models)
  share = np.minimum(1, t / np.where(d == 0, 1, abs(d)))
  return base + share * d


def importance(base, model):
  b, m = np.float64(base), np.float64(model)
  p, q = np.exp(m), np.exp(b)
  p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
  return abs(m - b) * np.sum(p * np.log(p / q), axis=1, keepdims=True)


def arcee_fusion(base, models):
  found = importance(base, models[0])
  low, middle, high = np.quantile(found, [0.25, 0.5, 0.75], method='lower')
  bound = middle + 1.5 * (high - low)
  return np.where(found >= bound, models[0], base).astype(np.float64)


def ram(base, models, epsilon=1e-5, r=0.0, alpha=0.2):
  ds = np.stack(deltas(base, models))
  changed = abs(ds) > np.float32(epsilon)
  count = changed.sum(0)
  out = np.array(base, np.float64)
  for d, mine in zip(ds, changed):
    unique, shared = mine & (count == 1), mine & (count > 1)
    factor = 1 + r * min(alpha, shared.sum() / max(unique.sum(), 1e-9))
    out += factor * d * unique + d * shared / np.maximum(count, 1)
  return out


def ram_plus(base, models, epsilon=1e-5, r=0.1, alpha=0.2):
  return ram(base, models, epsilon, r, alpha)


def ema(base, models, rate=0.1):
  out = np.float64(models[0])
  for model in models[1:]:
    out = (1 - rate) * out + rate * model
  return out
