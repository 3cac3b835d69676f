"""TPU slices by name: 'v5p:4x4x4' -> chips, memory, peaks, links, devices.

The table is public numbers and, for usable memory, what the compiler itself
says when a program does not fit. Nothing here compiles, and nothing knows a
model; only `devices` needs jax and libtpu.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable
from typing import Any

from alignjax.core.errors import UserError
from alignjax.core.lookup import nearest

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Generation:
  """A generation of TPU, per chip unless it says device.

  Attributes:
    name: as in a topology's name.
    devices_per_chip: what JAX sees; two where cores are devices.
    hbm_gib: usable by a program, per device, as the compiler bounds it.
    flops: peak bfloat16 FLOP/s.
    clock: Hz, the interval in which cycles may be turned into seconds.
    hbm_bandwidth: bytes/s.
    ici: bytes/s that leave a chip over all of its links.
    dcn: bytes/s between slices, a host's share.
    dims: of the torus.
    config: the compiler's name for how cores join.
    max_chips: of one slice.
    sizes: of slices in two dimensions; three dimensions go by `_valid`.
  """

  name: str
  devices_per_chip: int
  hbm_gib: float
  flops: float
  clock: tuple[float, float]
  hbm_bandwidth: float
  ici: float
  dcn: float
  dims: int
  config: str
  max_chips: int
  sizes: tuple[tuple[int, ...], ...] = ()


_FLAT = tuple((1 << i, 1 << j) for i in range(5) for j in (i, i + 1))
# 1x2 and 2x1 are no slices; the largest is a pod.
_FLAT_SIZES = tuple(s for s in _FLAT if s != (1, 2) and math.prod(s) <= 256)

# Peaks, links and bandwidths: docs.cloud.google.com TPU pages (v4's links are
# 6 x 45 GB/s). DCN: 25 GB/s for a host of 4 chips; TPU7x 100 Gb/s for a chip.
# Clocks: public peak over the width of the matrix units, and for v5p and TPU7x
# also what the compiler's own cost model implies.
GENERATIONS = {
  generation.name: generation
  for generation in (
    Generation(
      'v4', 1, 30.75, 275e12, (1.05e9, 1.05e9), 1200e9, 270e9, 6.25e9, 3,
      'megacore', 4096,
    ),
    Generation(
      'v5e', 1, 15.75, 197e12, (1.5e9, 1.5e9), 819e9, 200e9, 6.25e9, 2,
      'default', 256, _FLAT_SIZES,
    ),
    Generation(
      'v5p', 1, 95.73, 459e12, (1.5e9, 1.75e9), 2765e9, 600e9, 6.25e9, 3,
      'megacore', 6144,
    ),
    Generation(
      'v6e', 1, 31.24, 918e12, (1.75e9, 1.75e9), 1638e9, 400e9, 6.25e9, 2,
      'default', 256, _FLAT_SIZES,
    ),
    Generation(
      'tpu7x', 2, 94.74, 2307e12, (1.9e9, 2.2e9), 7380e9, 600e9, 12.5e9, 3,
      'default', 9216,
    ),
  )
}  # fmt: skip
# What people write for a generation. `v5` is the compiler's name for v5p.
_ALIASES = {'v5': 'v5p', 'v5litepod': 'v5e', 'v5lite': 'v5e', 'trillium': 'v6e'}
_ALIASES |= dict.fromkeys(('ironwood', 'v7x', 'v7', 'tpu7', '7x'), 'tpu7x')


@dataclasses.dataclass(frozen=True)
class Topology:
  """`slices` equal slices of one generation."""

  generation: Generation
  shape: tuple[int, ...]
  slices: int = 1

  @property
  def name(self) -> str:
    return f'{self.generation.name}:{"x".join(map(str, self.shape))}'

  @property
  def chips(self) -> int:
    return math.prod(self.shape) * self.slices

  @property
  def device_count(self) -> int:
    return self.chips * self.generation.devices_per_chip

  @property
  def hosts(self) -> tuple[int, int, int]:
    """Chips of one host along each dimension."""
    return (1, 1, 1) if math.prod(self.shape) == 1 else (2, 2, 1)

  @property
  def wrap(self) -> tuple[bool, bool, bool]:
    """Which dimensions close into rings.

    Cubes of multiples of four do, in all dimensions; a flat slice where it is
    16 long. Told nothing, the compiler assumes none, and wire doubles.
    """
    if self.generation.dims == 3:
      whole = all(size % 4 == 0 for size in self.shape)
      return whole, whole, whole
    return (self.shape[0] == 16, self.shape[1] == 16, False)

  @property
  def hbm(self) -> float:
    """Usable bytes of one device."""
    return self.generation.hbm_gib * GIB

  @property
  def flops(self) -> float:
    """Peak FLOP/s of one device."""
    return self.generation.flops / self.generation.devices_per_chip

  @property
  def ici(self) -> float:
    """Bytes/s of one device between chips of a slice."""
    return self.generation.ici / self.generation.devices_per_chip

  @property
  def dcn(self) -> float:
    """Bytes/s of one device between slices."""
    return self.generation.dcn / self.generation.devices_per_chip


def parse(text: str, slices: int = 1) -> Topology:
  """'v5p:4x4x4' -> Topology.

  Raises UserError, with near names, for a generation or a shape that does not
  exist.
  """
  name, colon, sizes = text.strip().lower().partition(':')
  name = _ALIASES.get(name, name)
  if name not in GENERATIONS:
    close = nearest(name, GENERATIONS)
    raise UserError(
      f'topology {text!r}: no TPU generation {name!r}{close} (known: '
      f'{", ".join(GENERATIONS)}; written v5p:4x4x4)'
    )
  generation = GENERATIONS[name]
  try:
    shape = tuple(int(size) for size in sizes.split('x'))
  except ValueError:
    shape = ()
  if not colon or not shape or min(shape) < 1:
    raise UserError(
      f'topology {text!r}: expected a generation and a shape, such as '
      f'{near(generation, (4,) * generation.dims)[0]}'
    )
  if shape not in _shapes(generation):
    raise UserError(
      f'topology {text!r} does not exist; near ones: '
      f'{", ".join(near(generation, shape))}'
    )
  if slices < 1:
    raise UserError(f'--slices={slices}: expected at least 1')
  return Topology(generation, shape, slices)


def near(generation: Generation, shape: tuple[int, ...]) -> list[str]:
  """Names of the four slices that are nearest to a shape, in chips."""
  wanted = math.prod(shape)

  def distance(size):
    # Of equally many chips, the one most like what was written.
    padded = itertools.zip_longest(sorted(size), sorted(shape), fillvalue=1)
    return (
      abs(math.log(math.prod(size) / wanted)),
      sum(abs(math.log(a / b)) for a, b in padded),
      size,
    )

  close = sorted(_shapes(generation), key=distance)[:4]
  return [Topology(generation, size).name for size in close]


def _shapes(generation: Generation) -> Iterable[tuple[int, ...]]:
  """Every slice that is offered, sides in order of size."""
  if generation.sizes:
    return generation.sizes
  # Below a cube of four, sides are 1, 2, 4; from there, multiples of four.
  small = [(2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4)]
  if generation.name == 'tpu7x':
    small.insert(0, (1, 1, 1))
  sides = range(4, 25, 4)
  cubes = itertools.combinations_with_replacement(sides, 3)
  return [
    *small,
    *(cube for cube in cubes if math.prod(cube) <= generation.max_chips),
  ]


def devices(topology: Topology) -> list[Any]:
  """The devices that the TPU compiler compiles for; needs libtpu.

  The environment must be `compile.ENVIRONMENT` before jax is imported.
  """
  import jax
  from jax.experimental import topologies

  try:
    found = topologies.get_topology_desc(
      platform='tpu',
      topology_name=topology.name,
      chip_config_name=topology.generation.config,
      chips_per_host_bounds=topology.hosts,
      num_slices=topology.slices,
      wrap=topology.wrap,
    )
  except (jax.errors.JaxRuntimeError, RuntimeError, ValueError) as error:
    first = (str(error).splitlines() or [type(error).__name__])[0]
    raise UserError(
      f'the TPU compiler of libtpu refuses {topology.name} under jax '
      f'{jax.__version__}: {first} (a libtpu of another age than jaxlib does '
      'this; `pip install --upgrade libtpu jax`)'
    ) from error
  return list(found.devices)
