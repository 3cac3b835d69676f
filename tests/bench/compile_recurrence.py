"""What the TPU compiler makes of the recurrence, without a TPU.

  python tests/bench/compile_recurrence.py [--chips v5e v5p v6e]

Needs libtpu. Compiles forward and gradient ahead of time for one chip of each
generation, in float32 and with bfloat16 inputs, and prints the bytes that the
compiled program allocates beyond its arguments and results, with those of
'associative' beside them. Only compiler facts: nothing runs.
"""

import argparse
import os
import time

# Before jax: no metadata server, no log lines, and no quarrel with another
# process that has libtpu loaded.
os.environ.update(
  JAX_PLATFORMS='cpu',
  ALLOW_MULTIPLE_LIBTPU_LOAD='1',
  TPU_SKIP_MDS_QUERY='1',
  TPU_ACCELERATOR_TYPE='v5p-8',
  TPU_WORKER_HOSTNAMES='localhost',
  TPU_WORKER_ID='0',
  TF_CPP_MIN_LOG_LEVEL='3',
  TPU_MIN_LOG_LEVEL='4',
  TPU_STDERR_LOG_LEVEL='4',
)

CHIPS = {'v5e': 'v5e:2x2', 'v5p': 'v5p:2x2x1', 'v6e': 'v6e:2x2'}
SHAPES = ((2, 2048, 2560), (1, 4096, 4096))
DTYPES = ('float32', 'bfloat16')
IMPLEMENTATIONS = ('auto', 'associative')


def programs(implementation):
  """Name -> function of (x, a, h0)."""
  import jax
  import jax.numpy as jnp

  from alignjax.kernels.linear_recurrence import linear_recurrence

  def forward(x, a, h0):
    return linear_recurrence(x, a, h0, implementation=implementation)

  def loss(*arrays):
    h, last = forward(*arrays)
    return jnp.mean(jnp.square(h)) + jnp.mean(last)

  return {'forward': forward, 'gradient': jax.grad(loss, (0, 1, 2))}


def compiled(function, device, shape, dtype):
  """-> (compiled program, seconds)."""
  import jax
  from jax.sharding import SingleDeviceSharding

  def struct(shape, dtype):
    sharding = SingleDeviceSharding(device)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

  start = time.perf_counter()
  out = (
    jax.jit(function)
    .lower(
      struct(shape, dtype),
      struct(shape, dtype),
      struct((shape[0], shape[2]), 'float32'),
    )
    .compile()
  )
  return out, time.perf_counter() - start


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--chips', nargs='+', choices=CHIPS, default=list(CHIPS))
  args = parser.parse_args()
  from jax.experimental import topologies

  print('chip  shape            inputs    program   temporaries, MiB         s')
  print('                                           kernel  associative')
  for chip in args.chips:
    topology = topologies.get_topology_desc(
      platform='tpu', topology_name=CHIPS[chip]
    )
    for shape in SHAPES:
      for dtype in DTYPES:
        for name in ('forward', 'gradient'):
          cells, seconds = [], 0.0
          for implementation in IMPLEMENTATIONS:
            function = programs(implementation)[name]
            program, spent = compiled(
              function, topology.devices[0], shape, dtype
            )
            memory = program.memory_analysis()
            cells.append(memory.temp_size_in_bytes / 2**20)
            seconds += spent
            calls = program.as_text().count('tpu_custom_call')
            if (calls > 0) != (implementation == 'auto'):
              raise SystemExit(f'{implementation}: {calls} kernel calls')
          print(
            f'{chip:5} {shape!s:16} {dtype:9} {name:9}'
            f' {cells[0]:7.1f}  {cells[1]:11.1f}  {seconds:8.1f}',
            flush=True,
          )


if __name__ == '__main__':
  main()
