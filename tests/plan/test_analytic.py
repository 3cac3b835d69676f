"""Arithmetic against counts made another way, and published totals."""

import dataclasses

import numpy as np
import pytest

from alignjax.models.preset import SHAPES
from alignjax.plan import analytic, topology
from alignjax.plan.programs import Program
from tests import tiny


def program(rows, length, name='train', new=0):
  arguments = dict(parameters=4096, frozen=0, optimizer=8192, batch=64)
  return Program(
    name, None, (), arguments, {}, 0, rows=rows, length=length, new=new
  )


@pytest.mark.parametrize('length', [1, 7, 64])
@pytest.mark.parametrize('span', [None, 1, 5, 64, 100])
def test_pairs_are_those_of_the_mask(length, span):
  i, j = np.indices((length, length))
  seen = (j <= i) & (i - j < (span or length))
  assert analytic.pairs(length, span) == seen.sum()
  assert analytic.pairs(length, span, length // 2) == seen[length // 2 :].sum()


@pytest.mark.parametrize('span', [None, 513, 512, 1024, 600])
def test_blocks_hold_every_visible_pair(span):
  length, size = 2048, 512
  i, j = np.indices((length, length))
  seen = (j <= i) & (i - j < (span or length))
  blocks = seen.reshape(4, size, 4, size).any(axis=(1, 3)).sum()
  assert analytic._block_pairs(length, span) == blocks * size * size


# 6 N T + causal attention, one row of 4096 tokens: arXiv 2408.00118, 2503.19786
# shapes, worked by hand.
@pytest.mark.parametrize(
  'shape, flops', [('gemma2-9b', 2.444e14), ('gemma3-27b', 6.773e14)]
)
def test_model_flops_of_released_models(shape, flops):
  work = analytic.work(SHAPES[shape], program(1, 4096))
  np.testing.assert_allclose(work.model, flops, rtol=2e-3)


def test_recomputation_costs_a_forward_pass():
  config = SHAPES['gemma2-9b']
  layers, embedding = analytic.linear_size(config)
  kept = analytic.work(config, program(1, 4096))
  full = dataclasses.replace(config, remat='full')
  again = analytic.work(full, program(1, 4096))
  assert again.model == kept.model
  assert again.matmul - kept.matmul == 2.0 * layers * 4096
  np.testing.assert_allclose(again.matmul, 8 * (layers + embedding) * 4096)
  np.testing.assert_allclose(again.attention / kept.attention, 5.5 / 4.5)


def test_a_recurrent_layer_has_no_attention():
  config = SHAPES['recurrentgemma-2b']
  work = analytic.work(config, program(1, 4096))
  local = config.count('local')
  assert local == 8
  pairs = analytic.pairs(4096, config.span)
  layers, embedding = analytic.linear_size(config)
  np.testing.assert_allclose(
    work.model,
    6 * (layers + embedding) * 4096
    + 12 * config.heads * config.head_dim * local * pairs,
  )


def test_a_rollout_reads_each_new_token_once():
  config = tiny.config()
  layers, embedding = analytic.linear_size(config)
  work = analytic.work(config, program(3, 10, 'rollout', new=6))
  assert work.matmul == 2 * (layers + embedding) * 3 * 6


def test_kernels_are_counted_from_the_calls():
  config = dataclasses.replace(SHAPES['gemma2-9b'], layers=4, remat='full')
  calls = {'splash_mha_fwd': 8, 'splash_mha_dq': 4, 'splash_mha_dkv': 4}
  step = program(64, 4096)
  found = analytic.kernel_flops(config, step, calls, 64)
  expected = analytic.work(config, step).attention / 64
  np.testing.assert_allclose(found, expected)
  assert analytic.kernel_flops(config, step, {}, 64) == 0


def test_time_is_an_interval():
  v5p = topology.parse('v5p:4x4x4')
  found = analytic.seconds(
    v5p, cycles=1.75e9, kernel_flops=0, wire=2 * v5p.ici, dcn=0
  )
  assert found.compute[0] == 1
  assert found.low == 2  # the wire hides the compute
  np.testing.assert_allclose(found.high, 1.75 / 1.5 + 2)


def test_memory_falls_where_it_should():
  config = dataclasses.replace(SHAPES['gemma2-9b'], dtype='bfloat16')
  sizes = {'data': 4, 'fsdp': 16, 'tensor': 1}

  def total(remat, microbatches=1, rows=256):
    changed = dataclasses.replace(config, remat=remat)
    parts = analytic.temporaries(
      changed, program(rows, 4096), sizes, microbatches
    )
    assert min(parts.values()) >= 0
    return sum(parts.values())

  kinds = ('full', 'outputs', 'products', 'none')
  sizes_of = [total(kind) for kind in kinds]
  assert sizes_of == sorted(set(sizes_of))
  assert total('full', 4) < total('full', 2) < total('full')


# Peak of HBM per chip that the compiler found (libtpu 0.0.52), in GiB, of one
# row of 4096 tokens per chip on v5p:4x4x4, data 4 x fsdp 16, full remat.
@pytest.mark.parametrize('shape, layers, peak', [('gemma2-9b', 2, 2.21)])
def test_memory_is_near_the_compilers(shape, layers, peak):
  config = dataclasses.replace(
    SHAPES[shape], layers=layers, dtype='bfloat16', remat='full'
  )
  size = sum(analytic.linear_size(config)) * 4 // 64
  arguments = dict(parameters=size, optimizer=2 * size)
  step = program(64, 4096)._replace(arguments=arguments)
  sizes = {'data': 4, 'fsdp': 16, 'tensor': 1}
  found = sum(analytic.temporaries(config, step, sizes).values()) + 3 * size
  np.testing.assert_allclose(found / 2**30, peak, rtol=0.25)


def test_one_device_sends_nothing():
  sizes = {'data': 1, 'fsdp': 1, 'tensor': 1}
  assert analytic.wire(tiny.config(), program(4, 16), sizes) == 0
  assert analytic.wire(tiny.config(), program(4, 16), {'fsdp': 4}) > 0
