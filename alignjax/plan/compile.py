"""Compiling for a TPU that is not here, and what the compiler then says.

A compile runs in a process of its own, with a time limit, because two of them
abort each other and one can take minutes. Memory is the compiler's own answer;
its split by kind of argument is exact from shapes. Refuses to run anything,
and to keep an executable.
"""

import contextlib
import dataclasses
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from alignjax.core.errors import UserError
from alignjax.plan.programs import Program, using

# Before jax is imported: no look-out for a TPU of this machine, no noise.
ENVIRONMENT = {
  'JAX_PLATFORMS': 'cpu',
  'TPU_SKIP_MDS_QUERY': '1',
  'TPU_ACCELERATOR_TYPE': 'v5p-8',
  'TPU_WORKER_HOSTNAMES': 'localhost',
  'TPU_WORKER_ID': '0',
  'TF_CPP_MIN_LOG_LEVEL': '3',
  'TPU_MIN_LOG_LEVEL': '4',
  'TPU_STDERR_LOG_LEVEL': '4',
  'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
}
_UNITS = {'': 1, 'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}
_HBM = re.compile(
  r'E1000.*?\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)',
  re.DOTALL,
)
_VMEM = re.compile(
  r'E1001.*?memory space vmem(?: while allocating on stack for %?([\w.-]+))?',
  re.DOTALL,
)
_SIZES = re.compile(
  r'size ([\d.]+[KMGT]?)\w* and limit ([\d.]+[KMGT]?)', re.DOTALL
)


@dataclasses.dataclass(frozen=True)
class Memory:
  """HBM of one device, in bytes.

  Attributes:
    peak: the compiler's own peak; what must fit, beside `resident`.
    arguments, outputs, aliased, temporaries: as the compiler counts them.
    kinds: arguments by kind, from their shapes; 'padding' is the rest.
    cache: key-value caches, a part of the temporaries.
    resident: what else the run keeps on the device meanwhile.
    limit: usable bytes.
  """

  peak: int
  arguments: int
  outputs: int
  aliased: int
  temporaries: int
  kinds: dict[str, int]
  cache: int
  resident: dict[str, int]
  limit: int

  @property
  def needs(self) -> int:
    """Everything that is in memory at the worst moment."""
    return self.peak + sum(self.resident.values())

  @property
  def fits(self) -> bool:
    return self.needs <= self.limit


@dataclasses.dataclass(frozen=True)
class Compiled:
  """What the compiler said of a program.

  Attributes:
    memory: None where it did not fit; then `problem` says by how much.
    needs, has: bytes of HBM, where the compiler ran out.
    problem: why there is no executable; '' where there is one.
    text: the scheduled HLO; '' where it cannot be had.
    seconds: of tracing and of compiling.
  """

  memory: Memory | None
  needs: int
  has: int
  problem: str
  text: str
  seconds: tuple[float, float]


def available() -> str | None:
  """The version of libtpu, or None without it."""
  try:
    return metadata.version('libtpu')
  except metadata.PackageNotFoundError:
    return None


def compiled(
  program: Program,
  mesh: jax.sharding.Mesh,
  limit: int,
  *,
  options: Mapping[str, Any] | None = None,
  dump: Path | None = None,
) -> Compiled:
  """Lowers and compiles a program for the devices of its mesh.

  Args:
    limit: usable HBM of a device, in bytes.
    options: of the compiler, such as xla_tpu_scoped_vmem_limit_kib.
    dump: where libtpu was told to write its HLO, if it was; read where the
      executable does not give its own.

  Raises:
    UserError: the compiler refuses for another reason than memory.
  """
  began = time.monotonic()
  with using(mesh):
    say(f'tracing {program.name}')
    lowered = program.fn.lower(*program.args)
    traced = time.monotonic() - began
    say(f'compiling {program.name}')
    try:
      executable = lowered.compile(compiler_options=dict(options or {}))
    except jax.errors.JaxRuntimeError as error:
      seconds = traced, time.monotonic() - began - traced
      needs, has, problem = refusal(str(error))
      return Compiled(None, needs, has, problem, '', seconds)
  seconds = traced, time.monotonic() - began - traced
  memory = _memory(executable.memory_analysis(), program, limit)
  return Compiled(memory, 0, 0, '', _text(executable, dump), seconds)


def refusal(message: str) -> tuple[int, int, str]:
  """(bytes needed, bytes there are, sentence) of a compiler's error.

  Raises UserError for an error that is not about memory.
  """
  if match := _HBM.search(message):
    needs, has = size(match[1] + match[2]), size(match[3] + match[4])
    gib = 2**30
    return (
      needs,
      has,
      (
        f'HBM: needs {needs / gib:.2f} GiB, has {has / gib:.2f} GiB '
        f'({(needs - has) / gib:.2f} GiB too much)'
      ),
    )
  if match := _VMEM.search(message):
    kernel = f' of kernel {match[1]}' if match[1] else ''
    sizes = _SIZES.search(message)
    more = (
      f': needs {sizes[1]}iB, has {sizes[2]}iB' if sizes else ' does not fit'
    )
    return (
      0,
      0,
      (
        f'vector memory{kernel}{more}; smaller blocks or '
        '--option xla_tpu_scoped_vmem_limit_kib=65536'
      ),
    )
  first = (message.strip().splitlines() or ['no reason given'])[0]
  raise UserError(f'the TPU compiler refuses the program: {first[:500]}')


def size(text: str) -> int:
  """Bytes of '95.73G'."""
  unit = text[-1] if text[-1] in _UNITS else ''
  return round(float(text.removesuffix(unit)) * _UNITS[unit])


def _memory(found, program: Program, limit: int) -> Memory:
  arguments = found.argument_size_in_bytes
  known = sum(program.arguments.values())
  parts = (
    found.output_size_in_bytes,
    found.alias_size_in_bytes,
    found.temp_size_in_bytes,
  )
  peak = getattr(found, 'peak_memory_in_bytes', 0)
  return Memory(
    # Temporaries may reuse what is aliased: the sum is only a bound.
    peak=peak or arguments + parts[0] - parts[1] + parts[2],
    arguments=arguments,
    outputs=parts[0],
    aliased=parts[1],
    temporaries=parts[2],
    kinds={**program.arguments, 'padding': arguments - known},
    cache=program.cache,
    resident=program.resident,
    limit=limit,
  )


def _text(executable, dump: Path | None) -> str:
  """Scheduled HLO, from the executable or else from a dump; '' without."""
  try:
    return executable.as_text() or ''
  except Exception as error:  # an older jaxlib cannot read a newer libtpu's
    if dump is None:
      return ''
    say(f'the executable does not print ({type(error).__name__})')
  files = sorted(dump.rglob('*TLP-hlo.txt'), key=lambda f: f.stat().st_size)
  return files[-1].read_text('utf-8', 'replace') if files else ''


def say(text: str) -> None:
  """One line for the process that waits for this one."""
  print(f'{_MARK}{text}', file=sys.stderr, flush=True)


_MARK = 'plan: '


def in_child(
  argv: Sequence[str], *, label: str, limit: float, dump: Path | None = None
) -> None:
  """Runs this Python with `argv` for at most `limit` seconds, showing life.

  Raises UserError if it takes longer, or with its last words if it fails; its
  own UserErrors arrive through what it writes, not from here.
  """
  environment = os.environ | ENVIRONMENT
  if dump is not None:
    environment['LIBTPU_INIT_ARGS'] = (
      f'{environment.get("LIBTPU_INIT_ARGS", "")} --xla_jf_dump_to={dump}'
      ' --xla_jf_dump_hlo_text=true'
    ).strip()
  began = time.monotonic()
  with tempfile.TemporaryFile('w+', encoding='utf-8') as log:
    child = subprocess.Popen(
      [sys.executable, *argv], stdout=log, stderr=log, env=environment
    )
    try:
      with _spinner(label) as show:
        while child.poll() is None:
          passed = time.monotonic() - began
          if passed > limit:
            raise UserError(
              f'{label}: no result after {limit:.0f} s (--time_limit); ragged '
              'shards compile slowly, --layers and --fast compile less'
            )
          show(_phase(log), passed)
          with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(0.5)
    finally:
      if child.poll() is None:
        child.kill()
        child.wait()
    if child.returncode:
      log.seek(0)
      words = log.read().strip()[-2000:]
      raise UserError(
        f'{label}: the compiling process ended with {child.returncode}: {words}'
      )


def _phase(log) -> str:
  log.seek(0)
  said = [line for line in log.read().splitlines() if line.startswith(_MARK)]
  return said[-1].removeprefix(_MARK) if said else 'starting'


@contextlib.contextmanager
def _spinner(label: str) -> Iterator[Any]:
  """Yields show(phase, seconds): live on a terminal, else a line at times."""
  if sys.stderr.isatty():
    from rich.console import Console

    with Console(stderr=True).status(label) as status:
      yield lambda phase, s: status.update(f'{label}: {phase}, {s:.0f} s')
    return
  last = ['', 0.0]

  def show(phase: str, passed: float) -> None:
    if phase != last[0] or passed - last[1] >= 30:
      last[:] = [phase, passed]
      text = f'{label}: {phase}, {passed:.0f} s'
      print(text, file=sys.stderr, flush=True)

  yield show
