"""Arithmetic about a step: FLOPs, memory without a compiler, time from facts.

FLOPs of the model and of the kernels that the compiler does not count are
exact. Memory here is an estimate for machines without libtpu and for sorting
candidates before they are compiled; whoever prints it says so. No arrays.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping
from typing import Any

from alignjax.core import placement
from alignjax.models import sharding
from alignjax.models.config import Config
from alignjax.models.shapes import shapes
from alignjax.plan.programs import Program
from alignjax.plan.topology import Topology

# Share of the peak that the attention kernel reaches, as an interval.
KERNEL_SHARE = (0.55, 0.55)
# Share of the peak that matrix products reach where no cycles are known.
MATMUL_SHARE = (0.65, 0.9)
_PRODUCTS = ('q', 'k', 'v', 'heads', 'mixer', 'gate', 'up', 'ffw')
# What `decoder.REMAT` keeps of a layer, and which linear maps run twice.
_KEPT = {
  'full': (),
  'outputs': ('ffw',),
  'products': (*_PRODUCTS, 'kernel'),
  'none': (*_PRODUCTS, 'rest'),
}
_AGAIN = {'full': r'.*', 'outputs': r'(?!.*ffw/down).*'}
_CHUNK = 256  # positions whose logits exist at once


@dataclasses.dataclass(frozen=True)
class Work:
  """FLOPs of one step on all devices.

  Attributes:
    model: what the mathematics asks for: 6 N T and causal attention.
    matmul: what linear maps execute, recomputation included.
    attention: what attention executes, recomputation included.
  """

  model: float
  matmul: float
  attention: float


@dataclasses.dataclass(frozen=True)
class Seconds:
  """A step's time as an interval, in seconds.

  The lower end hides all communication behind compute at the fast clock, the
  upper end adds it at the slow one; `unhidden` adds it at the fast one.
  """

  compute: tuple[float, float]
  kernels: float
  wire: float
  dcn: float
  low: float
  high: float
  unhidden: float


def pairs(length: int, span: int | None, begin: int = 0) -> int:
  """(query, key) pairs of causal attention from column `begin` on.

  `span` is the keys that a query sees, its own included; None = all.
  """
  span = min(span or length, length)

  def upto(n):
    if n <= span:
      return n * (n + 1) // 2
    return span * (span + 1) // 2 + (n - span) * span

  return upto(length) - upto(begin)


def _block_pairs(length: int, span: int | None) -> int:
  """Pairs in the blocks that the attention kernel visits."""
  size = next((s for s in (512, 384, 256, 128) if length % s == 0), length)
  blocks = length // size
  reach = blocks if span is None else -(-(span - 1) // size) + 1
  visited = sum(min(i + 1, reach) for i in range(blocks))
  return visited * size * size


def _spans(config: Config) -> list[int | None]:
  """Span of each attention layer."""
  kinds = [config.kind(i) for i in range(config.layers)]
  return [
    config.span if kind == 'local' else None
    for kind in kinds
    if kind != 'recurrent'
  ]


def linear_size(config: Config, which: str = '.*') -> tuple[int, int]:
  """Parameters of linear maps in (layers whose name matches, embedding)."""
  layers = embedding = 0
  for name, leaf in _leaves(config).items():
    if name == 'embedding':
      embedding = leaf.size
    elif leaf.ndim > 1 and not re.search(r'_bias$|/conv$', name):
      layers += leaf.size if re.fullmatch(which, name) else 0
  return layers, embedding


@functools.lru_cache(maxsize=64)
def _leaves(config: Config) -> Mapping[str, Any]:
  return shapes(config)


def work(config: Config, program: Program) -> Work:
  """FLOPs of a training step or a rollout, over all devices.

  A training step is 6 N per token and 12 per pair, query head and channel; a
  rollout reads every prompt once per prompt and then one token at a time.
  """
  layers, embedding = linear_size(config)
  per_pair = config.heads * config.head_dim
  tokens = program.rows * program.length
  if program.name == 'train':
    exact = sum(pairs(program.length, span) for span in _spans(config))
    kernel = sum(_block_pairs(program.length, s) for s in _spans(config))
    again = linear_size(config, _AGAIN.get(config.remat, ''))[0]
    # The head recomputes its logits chunk by chunk only if they do not fit.
    return Work(
      model=6.0 * (layers + embedding) * tokens
      + 12.0 * per_pair * exact * program.rows,
      matmul=(6.0 * layers + 2.0 * again + 8.0 * embedding) * tokens,
      attention=4.0
      * per_pair
      * kernel
      * program.rows
      * _passes(config.remat != 'none'),
    )
  prompt = program.length - program.new
  begin = prompt if program.new else 0
  exact = sum(pairs(program.length, s, begin) for s in _spans(config))
  read = program.new or program.length
  matmul = 2.0 * (layers + embedding) * read * program.rows
  attention = 4.0 * per_pair * exact * program.rows
  return Work(matmul + attention, matmul, attention)


def _passes(again: bool) -> float:
  """Multiples of a forward pass of attention: dk, dv 4/2 and dq 3/2."""
  return 1 + again + 4 / 2 + 3 / 2


def kernel_flops(
  config: Config, program: Program, calls: Mapping[str, float], devices: int
) -> float:
  """FLOPs of the attention kernels on one device.

  `calls` counts the kernels of one step by name; they say themselves how often
  a pass is recomputed.
  """
  spans = _spans(config)
  if not spans or not calls:
    return 0.0
  forward = sum(4.0 * _block_pairs(program.length, span) for span in spans)
  forward *= config.heads * config.head_dim * program.rows / devices
  total = 0.0
  for name, count in calls.items():
    if 'splash' not in name:
      continue
    fused = 'dkv' in name and 'no_residuals' not in name and 'fused' in name
    share = 2.5 if fused else 2.0 if 'dkv' in name else 1.0
    share = 1.5 if 'dq' in name else share
    total += forward * share * count / len(spans)
  return total


def seconds(
  topology: Topology,
  *,
  cycles: float,
  kernel_flops: float,
  wire: float,
  dcn: float = 0.0,
) -> Seconds:
  """Time of a step on one device, from its cycles, kernels and wire bytes."""
  slow, fast = topology.generation.clock
  compute = cycles / fast, cycles / slow
  kernels = kernel_flops / (KERNEL_SHARE[0] * topology.flops)
  links, between = wire / topology.ici, dcn / topology.dcn
  return Seconds(
    compute=compute,
    kernels=kernels,
    wire=links,
    dcn=between,
    low=max(compute[0] + kernels, links, between),
    high=compute[1] + kernels + links + between,
    unhidden=compute[0] + kernels + links + between,
  )


def rough_seconds(
  topology: Topology, work: Work, wire: float, moved: float = 0.0
) -> Seconds:
  """Time of a step where nothing was compiled.

  `wire` and `moved` are bytes of one device over links and to memory.
  """
  flops = (work.matmul + work.attention) / topology.device_count
  memory = moved / (
    topology.generation.hbm_bandwidth / topology.generation.devices_per_chip
  )
  low, high = (
    max(flops / (share * topology.flops), memory)
    for share in reversed(MATMUL_SHARE)
  )
  links = wire / topology.ici
  return Seconds(
    compute=(low, high),
    kernels=0.0,
    wire=links,
    dcn=0.0,
    low=max(low, links),
    high=high + links,
    unhidden=low + links,
  )


def wire(
  config: Config,
  program: Program,
  sizes: Mapping[str, int],
  microbatches: int = 1,
) -> float:
  """Bytes that one device sends in a step, estimated.

  Weights are gathered over 'fsdp' for every pass, gradients scattered over it
  and summed over 'data'; two all-reduces of activations a layer and pass over
  'tensor'.
  """
  width = 2 if config.dtype == 'bfloat16' else 4
  layers, embedding = linear_size(config)
  fsdp, data, tensor = (sizes.get(a, 1) for a in ('fsdp', 'data', 'tensor'))
  training = program.name == 'train'
  passes = (2 + (config.remat == 'full')) if training else 1
  weights = width * layers / tensor
  # Weights are gathered, and their gradients scattered, by every microbatch.
  parts = microbatches if training else 1
  out = parts * weights * passes * (fsdp - 1) / fsdp
  if training:
    out += parts * width * layers / tensor * (fsdp - 1) / fsdp
    shard = 4 * (layers + embedding) / tensor / fsdp
    out += 2 * shard * (data - 1) / data
  rows = program.rows / (fsdp * data)
  stream = width * rows * program.length * config.width
  out += 2 * passes * config.layers * 2 * stream * (tensor - 1) / tensor
  return out


def temporaries(
  config: Config,
  program: Program,
  sizes: Mapping[str, int],
  microbatches: int = 1,
) -> dict[str, int]:
  """Kind -> bytes of temporaries on one device, estimated.

  Args:
    sizes: mesh axis -> size.
    microbatches: parts of a batch of a training step.
  """
  width = 2 if config.dtype == 'bfloat16' else 4
  compute, gathered = _weights(config, sizes, width)
  ways = math.prod(sizes.get(axis, 1) for axis in ('data', 'fsdp'))
  tensor = sizes.get('tensor', 1)
  rows = program.rows / ways
  found: dict[str, float] = {'compute copy': compute if width == 2 else 0}
  if program.name != 'train':
    found['layer'] = gathered / 2
    found['logits'] = 4 * 3 * rows * config.vocab_size / tensor
    return {k: int(x) for k, x in found.items()} | {'cache': program.cache}
  tokens = rows / microbatches * program.length
  values = _activations(config, tensor)
  kept = sum(values[name] for name in _KEPT[config.remat])
  # Logits, their exponentials and their gradient, float32, chunk by chunk.
  logits = 3 * 4 * rows / microbatches * _CHUNK * config.vocab_size / tensor
  found |= {
    # In the compute dtype where the copy is, and summed where masters are.
    'gradients': program.arguments['parameters'] + found['compute copy'],
    'streams': tokens * config.width * width * config.layers,
    'saved': tokens * width * kept * config.layers,
    # The head is done before the first layer goes backward.
    'work': max(logits, gathered + tokens * width * sum(values.values())),
  }
  return {k: int(x) for k, x in found.items()}


def _weights(config, sizes, width) -> tuple[int, int]:
  """Bytes of (the stored compute copy, one layer gathered for use)."""
  compute = gathered = 0
  for name, leaf in _leaves(config).items():
    spec = sharding.spec(name, leaf)
    ways = math.prod(placement.ways(entry, sizes) for entry in spec)
    compute += leaf.size * width // ways
    if name.startswith('layer_0/'):
      split = placement.ways('tensor', sizes) if 'tensor' in spec else 1
      # In use, and its gradient before it is scattered.
      gathered += 2 * leaf.size * width // split
  return compute, gathered


def _activations(config: Config, tensor: int) -> dict[str, float]:
  """Values per token and layer, by the names that recomputation knows."""
  recurrent = config.count('recurrent') / config.layers
  heads = (1 - recurrent) * config.heads * config.head_dim / tensor
  keys = (1 - recurrent) * config.kv_heads * config.head_dim / tensor
  hidden = config.hidden / tensor
  return {
    **{'q': heads, 'k': keys, 'v': keys, 'heads': heads, 'kernel': heads},
    **{'mixer': config.width, 'ffw': config.width, 'gate': hidden},
    'up': hidden,
    # Norms, their inputs, the gated product; gates and states of the RG-LRU.
    'rest': 6 * config.width
    + hidden
    + 10 * recurrent * config.lru_width / tensor,
  }
