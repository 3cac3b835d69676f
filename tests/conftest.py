"""Test-wide settings: strict shapes, full float32, quiet fake devices."""

import os
from pathlib import Path

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault(
  'XLA_FLAGS',
  '--xla_force_host_platform_device_count=4 '
  # Programs of tests are small: compiling them is what takes time.
  '--xla_backend_optimization_level=0 '
  '--xla_cpu_collective_call_terminate_timeout_seconds=600',
)
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')

# Programs compiled once serve all tests, the commands that they start, and the
# next run of the tests.
CACHE = Path(__file__).parents[1] / '.pytest_cache' / 'jax'
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(CACHE))
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.2')
