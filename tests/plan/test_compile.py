"""Errors of the TPU compiler, read; a child that hangs or dies."""

import sys
import time

import pytest

from alignjax.core.errors import UserError
from alignjax.plan import compile as compiling

HBM = (
  'RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the '
  'total memory required for HLO temporaries (224.00G) exceeds available HBM '
  '(95.73G). HLO module: jit_step.\nSee https://openxla.org/xla/errors'
)
VMEM = (
  'RESOURCE_EXHAUSTED: E1001: CompileTimeScopedVmemOom: Ran out of memory in '
  'memory space vmem while allocating on stack for %splash_mha_dkv.3 = (f32[]) '
  'custom-call. Scoped allocation with size 20.50M and limit 16.00M exceeded'
)


def test_hbm_is_told_in_numbers():
  needs, has, problem = compiling.refusal(HBM)
  assert (needs, has) == (224 * 2**30, round(95.73 * 2**30))
  assert 'needs 224.00 GiB, has 95.73 GiB (128.27 GiB too much)' in problem


def test_vector_memory_names_the_kernel():
  needs, has, problem = compiling.refusal(VMEM)
  assert needs == has == 0
  assert 'splash_mha_dkv.3' in problem and '20.50M' in problem
  assert 'xla_tpu_scoped_vmem_limit_kib' in problem


def test_another_error_is_one_sentence():
  with pytest.raises(UserError, match='FAILED_PRECONDITION: Continuation'):
    compiling.refusal('FAILED_PRECONDITION: Continuation fusion\nmore\nmore')


@pytest.mark.parametrize(
  'text, size', [('512', 512), ('1.5K', 1536), ('2.00G', 2**31)]
)
def test_sizes(text, size):
  assert compiling.size(text) == size


def test_a_child_that_hangs_is_ended(capfd):
  began = time.monotonic()
  with pytest.raises(UserError, match='train: no result after 1 s'):
    compiling.in_child(
      ['-c', 'import time; time.sleep(60)'], label='train', limit=1
    )
  assert time.monotonic() - began < 20


def test_a_child_that_dies_leaves_its_last_words():
  with pytest.raises(UserError, match='ended with 3: lost'):
    compiling.in_child(
      ['-c', 'import sys; print("lost"); sys.exit(3)'], label='x', limit=60
    )


def test_a_child_shows_what_it_does(capfd):
  code = (
    'import sys, time; print("plan: compiling", file=sys.stderr, flush=True);'
    'time.sleep(1.2)'
  )
  compiling.in_child(['-c', code], label='train', limit=60)
  shown = capfd.readouterr()
  assert 'train: compiling' in shown.err and shown.out == ''


def test_a_child_does_not_look_for_a_tpu():
  code = (
    'import os, sys;'
    'sys.exit(os.environ["TPU_SKIP_MDS_QUERY"] != "1" or'
    ' os.environ["JAX_PLATFORMS"] != "cpu")'
  )
  compiling.in_child(['-c', code], label='x', limit=60)
  assert sys.executable
