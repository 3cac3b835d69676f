"""What the attention kernels cost, without a TPU at hand.

  python tests/bench/compile_kernels.py tpu   # ahead-of-time compiles; libtpu
  python tests/bench/compile_kernels.py cpu   # chunked against plain

`tpu` compiles splash and what 'auto' makes of it, forward and gradient, for
each generation and prints temporary bytes: compiler output, nothing runs. It
needs `pip install libtpu`. `cpu` runs, and prints seconds of process time,
which other programs on the machine disturb less than the clock.
"""

import argparse
import os
import time
import warnings

# Before jax: quiet libtpu, and several processes may compile at once.
os.environ.update(
  JAX_PLATFORMS='cpu',
  TPU_SKIP_MDS_QUERY='1',
  TPU_ACCELERATOR_TYPE='v5p-8',
  TPU_WORKER_HOSTNAMES='localhost',
  TPU_WORKER_ID='0',
  TF_CPP_MIN_LOG_LEVEL='3',
  TPU_MIN_LOG_LEVEL='4',
  TPU_STDERR_LOG_LEVEL='4',
  ALLOW_MULTIPLE_LIBTPU_LOAD='1',
)

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.experimental import topologies  # noqa: E402

from alignjax.kernels.attention import attention  # noqa: E402

MIB = 2**20
TOPOLOGIES = {'v5e': 'v5e:2x2', 'v5p': 'v5p:2x2x1', 'v6e': 'v6e:2x2'}
# Name -> (B, T, H, K, h), window, softcap, implementation, layers.
TPU_CASES = {
  'gemma2 9b local': ((1, 8192, 16, 8, 256), 4096, 50.0, 'splash', 1),
  'gemma2 9b global': ((1, 8192, 16, 8, 256), None, 50.0, 'splash', 1),
  'gemma2 27b local': ((1, 8192, 32, 16, 128), 4096, 50.0, 'splash', 1),
  'gemma3 12b local': ((1, 4096, 16, 8, 256), 1024, None, 'splash', 1),
  'recurrentgemma 9b': ((1, 4096, 16, 1, 256), 2049, None, 'splash', 1),
  'gemma3 1b, odd T': ((1, 3968, 4, 1, 256), 512, None, 'splash', 1),
  '6 layers splash': ((1, 4096, 8, 4, 128), 512, 50.0, 'splash', 6),
  '6 layers auto': ((1, 4096, 8, 4, 128), 512, 50.0, 'auto', 6),
  '6 layers chunked': ((1, 4096, 8, 4, 128), 512, 50.0, 'chunked', 6),
  '6 layers plain': ((1, 4096, 8, 4, 128), 512, 50.0, 'plain', 6),
}
CPU_CASES = tuple(
  ((1, length, 4, 2, 64), window, softcap)
  for length in (1024, 4096)
  for window, softcap in ((None, 50.0), (512, 50.0), (512, None))
)


def program(shape, window, softcap, implementation, layers=1, dtype='bfloat16'):
  """(function of q, k, v, position, segment; its argument shapes)."""
  batch, length, heads, kv_heads, dim = shape

  def run(q, k, v, position, segment):
    def layer(q, _):
      out = attention(
        q,
        k,
        v,
        q_position=position,
        k_position=position,
        q_segment=segment,
        k_segment=segment,
        window=window,
        softcap=softcap,
        aligned=True,
        implementation=implementation,
      )
      return out, None

    return jax.lax.scan(layer, q, length=layers)[0]

  def arg(*dims, dtype=dtype):
    return jax.ShapeDtypeStruct((batch, length, *dims), dtype)

  kv, ids = arg(kv_heads, dim), arg(dtype='int32')
  return run, (arg(heads, dim), kv, kv, ids, ids)


def gradient(run):
  """Value and gradients of q, k, v for a cotangent of the value's size."""

  def call(q, k, v, position, segment):
    out, pull = jax.vjp(lambda *x: run(*x, position, segment), q, k, v)
    return out, *pull(out)

  return call


def tpu():
  names = tuple(TOPOLOGIES)
  print(f'{"":34}' + ''.join(f'{name:>22}' for name in names))
  devices = {
    name: topologies.get_topology_desc(
      platform='tpu', topology_name=topology
    ).devices[0]
    for name, topology in TOPOLOGIES.items()
  }
  for name, (shape, *rest) in TPU_CASES.items():
    run, args = program(shape, *rest)
    for what, function in (('forward', run), ('gradient', gradient(run))):
      cells = []
      for device in devices.values():
        here = jax.sharding.SingleDeviceSharding(device)
        at = [
          jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here) for x in args
        ]
        begun = time.perf_counter()
        try:
          compiled = jax.jit(function).lower(*at).compile()
        except Exception as error:  # noqa: BLE001
          cells.append(str(error).strip().splitlines()[0][:60])
          continue
        temp = compiled.memory_analysis().temp_size_in_bytes / MIB
        took = time.perf_counter() - begun
        cells.append(f'OK {temp:.1f} MiB {took:.0f} s')
      row = ''.join(f'{cell:>22}' for cell in cells)
      print(f'{name:24}{what:10}{row}', flush=True)


def measure(function, arrays):
  """(process seconds of the fastest of three calls, temporary bytes)."""
  compiled = jax.jit(function).lower(*arrays).compile()
  jax.block_until_ready(compiled(*arrays))
  best = float('inf')
  for _ in range(3):
    begun = time.process_time()
    jax.block_until_ready(compiled(*arrays))
    best = min(best, time.process_time() - begun)
  return best, compiled.memory_analysis().temp_size_in_bytes


def cpu():
  print(f'{"":44}{"plain":>24}{"auto (chunked)":>24}{"faster":>8}')
  for shape, window, softcap in CPU_CASES:
    batch, length = shape[:2]
    position = jnp.broadcast_to(jnp.arange(length), (batch, length))
    for what in ('forward', 'gradient'):
      found = []
      for implementation in ('plain', 'auto'):
        run, args = program(
          shape, window, softcap, implementation, dtype='float32'
        )
        keys = jax.random.split(jax.random.key(0), 3)
        arrays = [
          jax.random.normal(*x) for x in zip(keys, (a.shape for a in args))
        ]
        arrays += [position, jnp.ones_like(position)]
        function = gradient(run) if what == 'gradient' else run
        found.append(measure(function, arrays))
      cells = (f'{s:.3f} s {b / MIB:.1f} MiB' for s, b in found)
      row = ''.join(f'{cell:>24}' for cell in cells)
      label = f'T {length} window {window} cap {softcap}'
      ratio = found[0][0] / found[1][0]
      print(f'{label:34}{what:10}{row}{ratio:>7.1f}x', flush=True)


if __name__ == '__main__':
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('what', choices=('tpu', 'cpu'))
  warnings.filterwarnings('ignore')
  {'tpu': tpu, 'cpu': cpu}[parser.parse_args().what]()
