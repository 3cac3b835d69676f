"""Test-wide settings: quiet fake devices, programs that compile fast."""

import gc
import os
from pathlib import Path

import pytest

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# Most of the time of the tests is compiling: these programs are small and run
# a few times, so that what makes them fast is not worth its while.
FAST = (
  '--xla_backend_optimization_level=1 '
  '--xla_cpu_use_fusion_emitters=false '
  '--xla_cpu_parallel_codegen_split_count=1'
)
os.environ.setdefault(
  'XLA_FLAGS',
  '--xla_force_host_platform_device_count=4 '
  f'--xla_cpu_collective_call_terminate_timeout_seconds=600 {FAST}',
)
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')

# Programs compiled once serve all tests, the commands that they start, and the
# next run of the tests.
CACHE = Path(__file__).parents[1] / '.pytest_cache' / 'jax'
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(CACHE))
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.2')


@pytest.fixture(scope='module', autouse=True)
def settled():
  """What outlives a module is traced programs; the collector skips them."""
  yield
  gc.collect()
  gc.freeze()
