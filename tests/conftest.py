"""Test-wide settings: strict shapes, full float32, quiet fake devices."""

import os

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault(
  'XLA_FLAGS',
  '--xla_force_host_platform_device_count=4 '
  '--xla_cpu_collective_call_terminate_timeout_seconds=600',
)
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
