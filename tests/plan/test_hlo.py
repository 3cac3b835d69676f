"""The parser on dialects of HLO text and on cut-down compiler output."""

from pathlib import Path

import pytest

from alignjax.core.errors import UserError
from alignjax.plan import hlo, shapes

FIXTURES = Path(__file__).parent / 'hlo'


def module(lines: str) -> hlo.Module:
  return hlo.parse(
    f'HloModule m\n\nENTRY %e (p: f32[2]) -> f32[2] {{\n{lines}}}'
  )


def test_shapes_know_their_bytes_and_padding():
  kind = shapes.parse_type(
    '(bf16[6,100,8]{2,1,0:T(8,128)(2,1)S(1)}, /*index=1*/(f32[]{:T(128)},'
    ' s4[10]{0}), token[])'
  )
  first, scalar, small, token = shapes.leaves(kind)
  assert (first.dims, first.bytes, first.space) == ((6, 100, 8), 9600, 1)
  assert first.buffer_bytes == 6 * 104 * 128 * 2
  assert (scalar.bytes, scalar.buffer_bytes, small.bytes) == (4, 512, 5)
  assert token.bytes == 0
  with pytest.raises(UserError, match='not understood'):
    shapes.parse_type('?')


def test_a_transposed_layout_pads_its_own_minor_dims():
  (shape,) = shapes.leaves(shapes.parse_type('f32[130,8]{0,1:T(8,128)}'))
  assert shape.buffer_bytes == 256 * 8 * 4


@pytest.mark.parametrize(
  'text, groups',
  [
    ('{{0,2},{1,3}}', ((0, 2), (1, 3))),
    ('[2,2]<=[4]', ((0, 1), (2, 3))),
    ('[2,2]<=[2,2]T(1,0)', ((0, 2), (1, 3))),
    ("mesh['a'=2,'b'=2] {'a'}", ((0, 2), (1, 3))),
    ("mesh['a'=2,'b'=2] {'b'}", ((0, 1), (2, 3))),
    ("mesh['a'=4] {'a':(1)2}", ((0, 2), (1, 3))),
    ("mesh['a'=4] {'a':(2)2}", ((0, 1), (2, 3))),
    ("mesh['a'=2,'b'=2] {'a','b'}", ((0, 1, 2, 3),)),
    ('{}', ()),
  ],
)
def test_replica_groups_in_every_spelling(text, groups):
  assert hlo.replica_groups(f', replica_groups={text}, x=1') == groups


def test_instructions_with_and_without_types_of_operands():
  found = module(
    '  %p = f32[2]{0} parameter(0)\n'
    '  %t = (f32[2]{0}, s32[]) tuple(f32[2]{0} %p, s32[] %c), a=b\n'
    '  ROOT g = f32[2]{0} get-tuple-element(t), index=0\n'
  )
  p, t, g = found.computations['e'].instructions
  assert (t.operands, g.operands, g.index, g.root) == (('p', 'c'), ('t',), 0, 1)
  assert p.index == 0 and t.attribute('a') == 'b'
  assert found.computations['e'].users['p'] == [t]


def test_a_kernel_whose_metadata_runs_over_lines():
  text = (FIXTURES / 'kernel.txt').read_text()
  found = hlo.parse(text)
  assert '\n}}, metadata=' in text  # a line that starts with braces
  (kernel,) = [
    i
    for c in found.computations.values()
    for i in c.instructions
    if i.target == 'tpu_custom_call'
  ]
  assert kernel.op_name.endswith('pallas_call')
  assert [s.dims for s in shapes.leaves(kernel.type)] == [(8, 2048, 256)]
  assert len(kernel.operands) == 6


def test_aliases_cycles_and_donation():
  found = hlo.parse((FIXTURES / 'train.txt').read_text())
  assert found.donated == {0: 0} and found.partitions == 64
  assert found.scheduled
  root = found.computations[found.entry].root
  assert root.aliases == {0: 0} and root.estimated_cycles > 0


def test_text_that_is_no_module():
  with pytest.raises(UserError, match='no ENTRY computation'):
    hlo.parse('module @jit_f { }')
