"""Sums over cut-down output of the TPU compiler, against closed forms.

The fixtures are scheduled HLO of small programs (v5p:4x4x4 unless a test says
otherwise) without tables of frames and most of the backend's configs.
"""

import dataclasses
import json
from pathlib import Path

import pytest

from alignjax.plan import account, hlo, live, loops, wire

FIXTURES = Path(__file__).parent / 'hlo'
SQUARE = {'data': 4, 'fsdp': 16}


def parsed(name: str) -> hlo.Module:
  return hlo.parse((FIXTURES / f'{name}.txt').read_text())


def of(name: str, axes: dict[str, int], clock: float = 1e9) -> account.Account:
  return account.account(parsed(name), mesh_axes=axes, clock_hz=clock)


def wires(found: account.Account) -> dict[tuple[str, str], tuple[float, float]]:
  """(op, axis) -> (count, bytes)."""
  sums: dict = {}
  for c in found.collectives:
    count, sent = sums.get((c.op, c.axis), (0, 0))
    sums[c.op, c.axis] = count + c.count, sent + c.wire_bytes
  return sums


# Five layers of [1024, 2048] x [2048, 2048] on a chip, forward and both
# gradients; bfloat16 weights gathered over 16, gradients scattered.
LAYER = 2 * 1024 * 2048 * 2048
FULL = 2048 * 2048 * 2


def test_a_scan_of_matmuls_counts_every_layer():
  found = of('train', SQUARE)
  assert found.flops == 5 * 3 * LAYER
  assert found.unknown_loops == ()
  # The compiler's own estimate is close to the ideal of its matrix units.
  ideal = found.flops / 2**18
  assert ideal < found.cycles['matmul'] < 1.5 * ideal


def test_wire_of_a_two_axis_mesh():
  found = wires(of('train', SQUARE))
  assert found == {
    ('all-gather', 'fsdp'): (10, 10 * FULL * 15 / 16),
    # Written as a fusion `%all-reduce-scatter`.
    ('reduce-scatter', 'fsdp'): (5, 5 * FULL * 15 / 16),
    ('all-reduce', 'data'): (5, 5 * 2 * FULL / 16 * 3 / 4),
  }


def test_causes_name_the_pass_and_the_weight():
  found = {(c.op, c.cause) for c in of('train', SQUARE).collectives}
  assert ('all-gather', 'forward: w') in found
  assert ('all-gather', 'remat: w') in found
  assert ('reduce-scatter', 'backward: mlp/dot_general') in found


def test_seconds_follow_the_clock():
  slow, fast = of('train', SQUARE, 1e9), of('train', SQUARE, 2e9)
  assert slow.seconds == 2 * fast.seconds == sum(slow.cycles.values()) / 1e9


def test_everything_is_json():
  found = dataclasses.asdict(of('kernel', SQUARE))
  assert json.loads(json.dumps(found))['custom_calls'][0]['count'] == 3


def test_dcn_is_told_from_links():
  """Two slices: each sends a gradient that was scattered over 64 chips."""
  found = of('slices', {'slice': 2, **SQUARE})
  (dcn,) = [c for c in found.collectives if c.dcn]
  assert (dcn.op, dcn.axis) == ('send-recv', 'slice')
  assert dcn.wire_bytes == 2048 * 1024 * 2 / 64  # 2b(n-1)/n with n = 2
  assert found.wire_bytes == sum(
    c.wire_bytes for c in found.collectives if c is not dcn
  )


def test_an_overlapped_gather_in_several_fusions_counts_once():
  """v5e:16x16: one of the two weights of a layer is gathered in pieces."""
  found = of('overlap', {'data': 16, 'fsdp': 16})
  text = (FIXTURES / 'overlap.txt').read_text()
  assert text.count(' all-gather(') == 4  # one plain, one in three fusions
  sent = 4 * 2048 * 8192 * 2 * 15 / 16
  seen = [(c.asynchronous, c.count, c.wire_bytes) for c in found.collectives]
  assert sorted(seen) == [(False, 4, sent), (True, 4, sent)]


def test_a_windowed_einsum_is_a_loop_of_permutations():
  """v5p:2x2x2: a product in eight pieces, four to an iteration."""
  found = of('windowed', {'fsdp': 8})
  assert found.flops == 2 * 1024 * 8192 * 2048
  module = parsed('windowed')
  flow = loops.flow(module)
  assert max(v.weight for v in flow.visits) == 2
  assert {c.op for c in found.collectives} == {'collective-permute'}


def test_a_loop_that_may_stop_early_counts_to_its_bound():
  """24 tokens of 3 layers and a branch of 2 more: the dearer one counts."""
  found = of('decode', SQUARE)
  assert found.flops == 24 * 5 * 2 * 8 * 1024 * 1024
  assert found.unknown_loops == ()


def test_batched_matmuls_written_as_convolutions():
  """8 heads of [2048, 256] x [256, 2048] and back."""
  assert of('dense', SQUARE).flops == 2 * 2 * 8 * 2048 * 2048 * 256


@pytest.mark.parametrize(
  'window, out, expected',
  [
    ('size=3 pad=1_1', 8, 22),  # two of 24 taps fall on padding
    ('size=2 stride=2', 4, 8),
    ('size=8 stride=7 lhs_dilate=8', 8, 8),  # a batch of eight
    ('size=3 rhs_dilate=2', 4, 12),
  ],
)
def test_taps_of_a_convolution(window, out, expected):
  kernel = int(window.split()[0].removeprefix('size='))
  found = account.conv_flops(
    (8, 2, 5), (kernel, 5, 7), (out, 2, 7), ('0bf', '0io', '0bf'), window
  )
  assert found == 2 * 2 * 7 * 5 * expected


def loop(condition: str, step: str, start: int = 1) -> loops.Flow:
  """A loop over i with another number, 3, handed on unchanged."""
  return loops.flow(
    hlo.parse(f"""HloModule m, is_scheduled=true

%body (p: (s32[], s32[])) -> (s32[], s32[]) {{
  %p = (s32[], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] get-tuple-element(%p), index=1
  %two = s32[] constant(2)
  %next = s32[] {step}
  ROOT %out = (s32[], s32[]) tuple(%next, %n)
}}

%test (q: (s32[], s32[])) -> pred[] {{
  %q = (s32[], s32[]) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %m = s32[] get-tuple-element(%q), index=1
  %ten = s32[] constant(10)
  ROOT %less = pred[] {condition}
}}

ENTRY %e () -> s32[] {{
  %start = s32[] constant({start})
  %three = s32[] constant(3)
  %state = (s32[], s32[]) tuple(%start, %three)
  %loop = (s32[], s32[]) while(%state), condition=%test, body=%body
  ROOT %last = s32[] get-tuple-element(%loop), index=0
}}
""")
  )


@pytest.mark.parametrize(
  'condition, step, start, trips',
  [
    ('compare(%j, %ten), direction=LT', 'add(%i, %two)', 1, 5),
    ('compare(%j, %ten), direction=LE', 'add(%i, %two)', 2, 5),
    ('compare(%ten, %j), direction=GT', 'add(%two, %i)', 0, 5),
    ('compare(%j, %m), direction=LT', 'add(%i, %two)', 0, 2),
    ('compare(%j, %m), direction=GT', 'subtract(%i, %two)', 10, 4),
    ('compare(%j, %ten), direction=NE', 'add(%i, %two)', 2, 4),
    ('compare(%j, %ten), direction=LT', 'add(%i, %two)', 12, 0),
  ],
)
def test_trips_are_limit_less_start_over_step(condition, step, start, trips):
  flow = loop(condition, step, start)
  assert {v.weight for v in flow.visits if v.loops} == {trips}
  assert not flow.unknown


def test_a_loop_without_a_known_bound_is_named():
  flow = loop('compare(%j, %ten), direction=LT', 'multiply(%i, %two)')
  assert {v.weight for v in flow.visits} == {1} and flow.unknown == {'loop'}


@pytest.mark.parametrize(
  'op, factor',
  [
    ('all-gather', 7),
    ('all-reduce', 2 * 7 / 8),
    ('reduce-scatter', 7 / 8),
    ('all-to-all', 7 / 8),
    ('collective-permute', 1),
  ],
)
def test_wire_formulas(op, factor):
  """Of the operand's bytes: b/n, b, b, b and b."""
  assert wire.wire_bytes(op, 1000, 8) == 1000 * factor


# What `memory_analysis().peak_memory_in_bytes` said of the same programs.
@pytest.mark.parametrize(
  'name, peak',
  [
    ('decode', 6350336),
    ('dense', 109051904),
    ('invariant', 83890176),
    ('no_wrap', 57812480),
    ('regather', 28838400),
    ('slices', 7864320),
    ('train', 51385856),
    ('windowed', 41949184),
  ],
)
def test_live_ranges_give_the_compilers_peak(name, peak):
  found = live.peak(parsed(name))
  assert found.bytes == found.arguments + found.outputs + found.temporaries
  assert abs(found.bytes - peak) <= 0.002 * peak
  assert found.largest[0].bytes > 0 or not found.temporaries


def test_the_peak_names_what_it_holds():
  """The saved inputs of five layers are the largest, from the forward pass."""
  found = of('train', SQUARE).peak
  assert found.largest[0].shape == 'bf16[5,1024,2048]'
  assert found.largest[0].cause.startswith('forward')
  assert found.arguments == 5 * 128 * 2048 * 4 + 1024 * 2048 * 2
  assert found.outputs == 0  # written over the donated weights
