"""One record of a program on a topology: memory, work, wire, time.

Joins what the compiler said, what its HLO adds up to and arithmetic into plain
JSON values, so that a record can be printed, kept, compared and, at two
depths, extrapolated. Numbers are those of one device where not said otherwise.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from alignjax.models.config import Config
from alignjax.plan import account, analytic, hlo, lints
from alignjax.plan.compile import Compiled
from alignjax.plan.programs import Program
from alignjax.plan.topology import GIB, Topology

Record = dict[str, Any]
NEVER_RAN = (
  'nothing ran on a TPU: memory, FLOPs and bytes are the compiler’s, times '
  'are arithmetic on its cycle model and carry 20-30%'
)
NO_COMPILER = (
  'ESTIMATE without the TPU compiler: memory and wire are a formula that knows '
  'no layouts and no fusion; `pip install alignjax[plan]` asks the compiler'
)


def compiled(
  found: Compiled,
  program: Program,
  config: Config,
  topology: Topology,
  sizes: Mapping[str, int],
) -> Record:
  """The record of a program that went to the compiler.

  `sizes` are the axes of the mesh. Where the compiler ran out of memory the
  record holds what it needs and has, and no time.
  """
  record = _about(program, config, topology, sizes)
  record['source'] = 'compiler'
  record['compile_seconds'] = [round(s, 1) for s in found.seconds]
  if found.memory is None:
    limit = found.has or int(topology.hbm)
    resident = sum(program.resident.values())
    needs = found.needs + resident if found.needs else 0
    record['hbm'] = {'limit': limit, 'needs': needs, **program.arguments}
    return record | {'problem': found.problem}
  record['hbm'] = _memory(found.memory)
  if not found.text:
    record['notes'] = [
      'the executable does not print its HLO with this jaxlib and libtpu: no '
      'bytes on the wire, no cycles; time is a rough estimate'
    ]
    return record | {'wire': []}
  module = hlo.parse(found.text)
  clock = sum(topology.generation.clock) / 2
  summary = account.account(module, mesh_axes=dict(sizes), clock_hz=clock)
  kept = dataclasses.asdict(summary)
  calls: dict[str, float] = {}
  for call in kept['custom_calls']:
    calls[call['name']] = calls.get(call['name'], 0) + call['count']
  record['cycles'] = kept['cycles']
  record['flops']['matmul'] = kept['flops']
  record['flops']['kernels'] = analytic.kernel_flops(
    config, program, calls, topology.device_count
  )
  record['wire'] = kept['collectives']
  record['calls'] = calls
  record['copies'] = kept['copies']
  record['unknown_loops'] = kept['unknown_loops']
  record['warnings'] = lints.lints(module, summary, length=program.length)
  return record


def estimated(
  program: Program,
  config: Config,
  topology: Topology,
  sizes: Mapping[str, int],
  microbatches: int,
) -> Record:
  """The record of a program that no compiler has seen."""
  record = _about(program, config, topology, sizes)
  record['source'] = 'estimate'
  parts = analytic.temporaries(config, program, sizes, microbatches)
  arguments = sum(program.arguments.values())
  resident = sum(program.resident.values())
  temporaries = sum(parts.values()) - program.cache
  peak = arguments + sum(parts.values())
  record['hbm'] = {
    'limit': int(topology.hbm),
    'needs': peak + resident,
    'peak': peak,
    **program.arguments,
    'padding': 0,
    'cache': program.cache,
    'temporaries': temporaries,
    'resident': resident,
  }
  record['temporaries'] = parts
  sent = analytic.wire(config, program, sizes, microbatches)
  record['wire'] = [
    {'op': 'all', 'axis': 'all', 'cause': 'weights, gradients, activations'}
    | {'count': 0, 'wire_bytes': sent, 'dcn': False}
  ]
  return record


def _about(program, config, topology, sizes) -> Record:
  work = analytic.work(config, program)
  devices = topology.device_count
  return {
    'step': program.name,
    'topology': topology.name,
    'slices': topology.slices,
    'chips': topology.chips,
    'devices': devices,
    'mesh': dict(sizes),
    'layers': config.layers,
    'remat': config.remat,
    'rows': program.rows,
    'count': program.count,
    'tokens': program.rows * (program.new or program.length),
    'flops': {
      'model': work.model / devices,
      'matmul': work.matmul / devices,
      'kernels': work.attention / devices,
    },
    'problem': '',
    'notes': [],
    'warnings': [],
  }


def _memory(memory) -> dict[str, int]:
  left = max(memory.outputs - memory.aliased, 0)
  kinds = dict(memory.kinds)
  # Temporaries may live where an argument was: what the peak has of them.
  rest = memory.peak - memory.arguments - left - memory.cache
  return {
    'limit': memory.limit,
    'needs': memory.needs,
    'peak': memory.peak,
    **kinds,
    'outputs': left,
    'cache': memory.cache,
    'temporaries': max(rest, 0),
    'resident': sum(memory.resident.values()),
  }


def finished(record: Record, topology: Topology, steps: int) -> Record:
  """The record with what follows from it: fit, time, MFU, tokens/s, chip-hours.

  `steps` are those of the configured run.
  """
  record = dict(record)
  hbm = record['hbm']
  record['fits'] = not record['problem'] and hbm['needs'] <= hbm['limit']
  if record['problem']:
    return record
  flops = record['flops']
  wire = sum(w['wire_bytes'] for w in record['wire'] if not w['dcn'])
  dcn = sum(w['wire_bytes'] for w in record['wire'] if w['dcn'])
  cycles = sum(record.get('cycles', {}).values())
  if cycles:
    seconds = analytic.seconds(
      topology,
      cycles=cycles,
      kernel_flops=flops['kernels'],
      wire=wire,
      dcn=dcn,
    )
  else:
    work = analytic.Work(
      *(flops[k] * record['devices'] for k in ('model', 'matmul', 'kernels'))
    )
    moved = hbm['cache'] + hbm['parameters'] if record['step'] != 'train' else 0
    seconds = analytic.rough_seconds(topology, work, wire, moved)
  low, high = seconds.low, seconds.high
  record['wire_bytes'], record['dcn_bytes'] = wire, dcn
  record['seconds'] = dataclasses.asdict(seconds)
  record['mfu'] = [flops['model'] / topology.flops / s for s in (high, low)]
  record['tokens_per_s'] = [record['tokens'] / s for s in (high, low)]
  record['chip_hours'] = [
    steps * record['count'] * s * record['chips'] / 3600 for s in (low, high)
  ]
  return record


def assumptions(record: Record, topology: Topology) -> list[str]:
  """What the numbers rest on, one sentence each."""
  slow, fast = (hz / 1e9 for hz in topology.generation.clock)
  clock = f'{fast:g} GHz' if slow == fast else f'{slow:g}-{fast:g} GHz'
  out = [NEVER_RAN if record['source'] == 'compiler' else NO_COMPILER]
  share = analytic.KERNEL_SHARE[0]
  if record.get('cycles'):
    out.append(
      f'time: cycles at {clock}, attention kernels at {share:.0%} of '
      f'{topology.flops / 1e12:.0f} TFLOP/s, wire at {topology.ici / 1e9:.0f} '
      'GB/s per device; the lower end hides all communication, the upper '
      'end none'
    )
  else:
    low, high = analytic.MATMUL_SHARE
    out.append(
      f'time: FLOPs at {low:.0%}-{high:.0%} of {topology.flops / 1e12:.0f} '
      f'TFLOP/s, wire at {topology.ici / 1e9:.0f} GB/s per device'
    )
  if topology.slices > 1:
    out.append(
      f'between slices {topology.dcn / 1e9:g} GB/s per device (a host’s share)'
    )
  return out


def extrapolated(
  shallow: Record, deep: Record, layers: tuple[int, int, int]
) -> Record:
  """The record at `layers[2]` from those at `layers[0]` and `layers[1]`.

  Bytes, FLOPs, cycles and wire are linear in depth.
  """
  first, second, wanted = layers
  t = (wanted - first) / (second - first)

  def line(a, b):
    if isinstance(a, bool) or isinstance(b, bool | str) or a is None:
      return b
    if isinstance(b, Mapping):
      return {k: line(a.get(k, 0), b[k]) for k in b}
    if isinstance(b, int | float):
      x = a + t * (b - a)
      return max(round(x) if isinstance(b, int) else x, 0)
    return b

  out = dict(deep)
  for part in ('hbm', 'flops', 'cycles', 'calls'):
    if part in deep:
      out[part] = line(shallow.get(part, {}), deep[part])
  limit = deep['hbm']['limit']
  out['hbm'] = {**out['hbm'], 'limit': limit}
  before = {_key(w): w for w in shallow.get('wire', ())}
  out['wire'] = [line(before.get(_key(w), {}), w) for w in deep.get('wire', ())]
  out['layers'] = wanted
  out['notes'] = [
    *deep['notes'],
    f'extrapolated in depth from {first} and {second} layers to {wanted}',
  ]
  return out


def _key(w: Mapping[str, Any]) -> tuple[Any, ...]:
  return w['op'], w['axis'], w['cause'], w.get('in_loop'), w['dcn']


def wire_table(
  record: Mapping[str, Any], top: int = 8
) -> Sequence[tuple[str, str, str, float, float]]:
  """(axis, op, cause, count, bytes), most bytes first, the tail in one row."""
  sums: dict[tuple[str, str, str], list[float]] = {}
  for w in record.get('wire', ()):
    axis = f'{w["axis"]} (DCN)' if w['dcn'] else w['axis']
    total = sums.setdefault((axis, w['op'], w['cause']), [0.0, 0.0])
    total[0] += w['count']
    total[1] += w['wire_bytes']
  rows = sorted(
    ((*key, count, size) for key, (count, size) in sums.items()),
    key=lambda row: -row[-1],
  )
  if len(rows) > top:
    rest = rows[top:]
    counts, sizes = sum(row[3] for row in rest), sum(row[4] for row in rest)
    rows = [*rows[:top], ('', '', f'{len(rest)} more', counts, sizes)]
  return rows


def gib(size: float) -> str:
  """Bytes as GiB."""
  return f'{size / GIB:.2f}'
