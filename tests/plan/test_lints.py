"""Warnings on cut-down output of the TPU compiler: each sees its case only."""

from pathlib import Path

import pytest

from alignjax.plan import account, hlo, lints

FIXTURES = Path(__file__).parent / 'hlo'
SQUARE = {'data': 4, 'fsdp': 16}


def said(name: str, axes=SQUARE, **expected) -> list[str]:
  module = hlo.parse((FIXTURES / f'{name}.txt').read_text())
  found = account.account(module, mesh_axes=axes, clock_hz=1e9)
  return lints.lints(module, found, **expected)


def about(found: list[str], words: str) -> list[str]:
  return [sentence for sentence in found if words in sentence]


CASES = {
  'same bytes in every iteration': {'invariant'},
  'reduce-scatter would send half': {'no_wrap'},
  'became an all-reduce': {'no_wrap'},
  'times per step, 112 MiB: forward': {'regather'},
  'attention is dense': {'dense'},
  'depends on data': set(),
}


@pytest.mark.parametrize('words', CASES)
@pytest.mark.parametrize(
  'name',
  ['train', 'no_wrap', 'regather', 'invariant', 'dense', 'kernel', 'windowed'],
)
def test_each_warning_sees_its_case_and_no_other(words, name):
  axes = {'fsdp': {'no_wrap': 64, 'windowed': 8}.get(name, 16)}
  found = said(name, axes if name in ('no_wrap', 'windowed') else SQUARE)
  assert bool(about(found, words)) == (name in CASES[words])


def test_an_invariant_gather_says_what_and_how_much():
  (first, second) = (
    about(said('invariant'), words)[0] for words in ('same bytes', 'gathered')
  )
  assert 'all-gather over fsdp' in first
  # Eight iterations of [32768, 1024] in bfloat16, 15/16 of it from others.
  assert '8 times and 0.47 GiB' in first
  assert second.startswith('e gathered over fsdp 8.0 times')


def test_what_the_combiner_put_together_is_told_apart():
  """One all-reduce of a padded gather and of a gradient, without wrap."""
  found = said('no_wrap', {'fsdp': 64})
  (gradient,) = about(found, 'reduce-scatter')
  assert 'gradient all-reduce over fsdp (backward: mlp/dot_general)' in gradient
  # 5 x 2 x 8 MiB x 63/64, without the gather beside it.
  assert '5 times and 79 MiB' in gradient
  assert len(about(found, 'became an all-reduce')) == 2


def test_three_gathers_of_a_weight():
  (sentence,) = about(said('regather'), 'gathered')
  assert sentence.startswith('w gathered over fsdp 3.0 times')


def test_layout_copies_over_a_twentieth():
  """15375 cycles for each of [1024, 2048] that a loop keeps and overwrites."""
  (sentence,) = about(said('train'), 'copies take')
  assert 'bf16[1024,2048] same layout, forward' in sentence
  assert '14.7%' in sentence  # 152230 of 1038303 cycles
  (turned,) = about(said('dense'), 'copies take')
  assert 'bf16[1,2048,8,256] {1,3,2,0} to {3,2,1,0}' in turned
  assert not about(said('invariant'), 'copies take')


@pytest.mark.parametrize('length, seen', [(2048, True), (1024, False)])
def test_logits_of_a_known_length(length, seen):
  found = about(said('dense', length=length), 'attention is dense')
  assert bool(found) == seen
  assert not seen or 'bf16[8,2048,2048]' in found[0]


LOOP = """HloModule m, is_scheduled=true

%body (p: (s32[])) -> (s32[]) {
  %p = (s32[]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %next = s32[] multiply(%i, %i)
  ROOT %out = (s32[]) tuple(%next)
}

%test (q: (s32[])) -> pred[] {
  %q = (s32[]) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %ten = s32[] constant(10)
  ROOT %less = pred[] compare(%j, %ten), direction=LT
}

ENTRY %e () -> s32[] {
  %start = s32[] constant(2)
  %state = (s32[]) tuple(%start)
  %loop = (s32[]) while(%state), condition=%test, body=%body, NAME
  ROOT %last = s32[] get-tuple-element(%loop), index=0
}
"""


def test_loops_that_data_bounds_and_attention_without_a_kernel():
  name = 'metadata={op_name="jit(f)/Block/attn/while"}'
  module = hlo.parse(LOOP.replace('NAME', name))
  found = account.account(module, mesh_axes={'data': 1}, clock_hz=1e9)
  said = lints.lints(module, found)
  assert len(said) == 2
  assert 'attention is 1 while loops' in said[0]
  assert 'counted once' in said[1] and 'step: Block/attn' in said[1]


TWICE = """HloModule m, is_scheduled=true

%cast (p: f32[8,128,64]) -> bf16[8,128,64] {
  %p = f32[8,128,64] parameter(0)
  ROOT %c = bf16[8,128,64] convert(%p)
}

%layer (s: (s32[], bf16[8,512,64])) -> (s32[], bf16[8,512,64]) {
  %s = (s32[], bf16[8,512,64]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %stack = bf16[8,512,64] get-tuple-element(%s), index=1
  %one = s32[] constant(1)
  %zero = s32[] constant(0)
  %next = s32[] add(%i, %one)
  %w = bf16[1,512,64] dynamic-slice(%stack, %i, %zero, %zero)
  %full = bf16[1,8192,64] all-gather(%w), channel_id=2, dimensions={1}, AXES {'fsdp'}
  ROOT %out = (s32[], bf16[8,512,64]) tuple(%next, %stack)
}

%test (q: (s32[], bf16[8,512,64])) -> pred[] {
  %q = (s32[], bf16[8,512,64]) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %end = s32[] constant(TRIPS)
  ROOT %less = pred[] compare(%j, %end), direction=LT
}

ENTRY %e (w: f32[8,128,64]) -> s32[] {
  %w = f32[8,128,64] parameter(0), metadata={op_name="params['layers']['0']"}
  %half = bf16[8,128,64] fusion(%w), kind=kLoop, calls=%cast
  %part = bf16[8,512,64] all-gather(%half), channel_id=1, dimensions={1}, AXES {'data'}
  %start = s32[] constant(0)
  %state = (s32[], bf16[8,512,64]) tuple(%start, %part)
  %loop = (s32[], bf16[8,512,64]) while(%state), condition=%test, body=%layer
  ROOT %last = s32[] get-tuple-element(%loop), index=0
}
"""  # noqa: E501


@pytest.mark.parametrize('trips, seen', [(16, False), (24, True)])
def test_a_weight_gathered_on_two_axes_counts_for_each(trips, seen):
  """Once over data for the step, then a layer at a time over fsdp."""
  axes = "replica_groups=mesh['data'=4,'fsdp'=16]"
  text = TWICE.replace('AXES', axes).replace('TRIPS', str(trips))
  module = hlo.parse(text)
  found = account.account(module, mesh_axes=SQUARE, clock_hz=1e9)
  assert {(c.axis, c.count, c.cause) for c in found.collectives} == {
    ('data', 1, 'step: layers'),
    ('fsdp', trips, 'step: layers'),
  }
  sentences = about(lints.lints(module, found), 'gathered over')
  assert bool(sentences) == seen
  assert not seen or 'fsdp 3.0 times' in sentences[0]
