"""One run in several processes: how they meet, stop together, and part.

Plain multi-controller JAX: the same command on every host. What is added is
manners: a time limit for meeting, one sentence and an exit code when a process
of the run is gone, and one step after which all of them stop. It starts no
process, and it is no scheduler: whoever started the command starts it again.
"""

import contextlib
import ctypes
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax._src import distributed  # the coordination service has no other door
from jax._src.clusters import ClusterEnv
from jax.experimental import multihost_utils

from alignjax.core.errors import UserError

BAD_INPUT = 2
LOST = 75  # as after SIGTERM: the same command continues
# What a collective says when a process at its other end is gone.
_GONE = ('gloo', 'unavailable', 'coordination', 'connection', 'barrier')


class Hosts(NamedTuple):
  """How the processes of a run find each other.

  Attributes:
    coordinator: HOST:PORT of process 0, None: ask the cluster (TPU pods by
      queued resources or GKE, Slurm, Open MPI) or run alone.
    processes, process: how many there are, and which this one is.
    start_s: seconds after which those that have come give up the others.
    heartbeat_s: silence of a process, in seconds, that ends the others.
  """

  coordinator: str | None = None
  processes: int | None = None
  process: int | None = None
  start_s: int = 300
  heartbeat_s: int = 60


def first() -> bool:
  """Whether this process is the one that writes what is written once."""
  return jax.process_index() == 0


@contextlib.contextmanager
def session(hosts: Hosts) -> Iterator[None]:
  """Meets the other processes, and parts from them when the block ends.

  To be entered before any computation. A run of one process passes through.
  In a run of several an error ends the process here, with its exit code: the
  interpreter's own end would wait for the others, who do not come.

  Raises:
    UserError: flags that do not fit together.
  """
  check(hosts)
  if hosts.coordinator is None and not _cluster():
    yield
    return
  with _last_words() as say:
    _start(hosts, say)
    who = f'process {jax.process_index()} of {jax.process_count()}'
    say(LOST, _gone(who))
    try:
      yield
      meet('end')
    except BaseException as error:
      _leave(who, error)
    jax.distributed.shutdown()


def check(hosts: Hosts) -> None:
  """UserError unless the flags say all or nothing, and make sense."""
  told = hosts.coordinator, hosts.processes, hosts.process
  if any(x is None for x in told) and any(x is not None for x in told):
    raise UserError(
      '--coordinator, --processes and --process go together: found '
      f'{told[0]}, {told[1]} and {told[2]}'
    )
  for name in ('start_s', 'heartbeat_s'):
    if getattr(hosts, name) < 1:
      raise UserError(f'--{name}: found {getattr(hosts, name)}, expected >= 1')
  if hosts.coordinator is None:
    return
  name, _, port = hosts.coordinator.rpartition(':')
  if not name or not port.isdecimal() or not 0 < int(port) < 65536:
    raise UserError(
      f'--coordinator: found {hosts.coordinator!r}, expected HOST:PORT'
    )
  if not 0 <= (hosts.process or 0) < (hosts.processes or 1):
    raise UserError(
      f'--process = {hosts.process} is not one of 0 .. {hosts.processes} - 1'
    )


def _cluster() -> bool:
  """Whether JAX itself can tell who is who here, and others are meant."""
  # Kubernetes without TPUs is left out: any lone pod would look like a run.
  kinds = [
    kind
    for kind in ClusterEnv._cluster_types
    if not kind.opt_in_only_method and kind.name != 'k8s'
  ]
  return any(kind.is_env_present() for kind in kinds)


def _start(hosts: Hosts, say: Callable[[int, str], None]) -> None:
  """`jax.distributed.initialize`, whose failures end the process."""
  if hosts.process == 0 and not _free(str(hosts.coordinator)):
    raise UserError(
      f'--coordinator: the port of {hosts.coordinator} is taken on this host'
    )
  say(BAD_INPUT, f'{hosts.coordinator} would not have this process (see above)')
  # It would take SIGTERM for itself; `agreement` is ours.
  jax.config.update('jax_enable_preemption_service', False)
  patience = threading.Timer(
    hosts.start_s, lambda: _end(BAD_INPUT, _alone(hosts))
  )
  patience.daemon = True
  patience.start()
  jax.distributed.initialize(
    hosts.coordinator,
    hosts.processes,
    hosts.process,
    initialization_timeout=hosts.start_s + 60,  # ours speaks first
    heartbeat_timeout_seconds=hosts.heartbeat_s,
  )
  patience.cancel()


def _alone(hosts: Hosts) -> str:
  """What to say when time is up."""
  address = hosts.coordinator or distributed.global_state.coordinator_address
  who = f'the {hosts.processes} processes' if hosts.processes else 'processes'
  if hosts.process == 0 or (address and _answers(address)):
    found = f'not all of {who} came to {address}'
  else:
    found = f'the coordinator {address or "of the cluster"} does not answer'
  return (
    f'{found} within {hosts.start_s} s (--start_s); every process needs the '
    'same --coordinator and --processes, and a --process of its own'
  )


def _answers(address: str) -> bool:
  name, _, port = address.rpartition(':')
  try:
    socket.create_connection((name.strip('[]'), int(port)), 1).close()
  except OSError:
    return False
  return True


def _free(address: str) -> bool:
  port = int(address.rpartition(':')[2])
  with socket.socket() as one:
    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
      one.bind(('', port))
    except OSError:
      return False
  return True


@contextlib.contextmanager
def _last_words() -> Iterator[Callable[[int, str], None]]:
  """Yields say(exit code, sentence): what to end with when JAX gives up.

  The coordination service aborts the process, from a thread of its own, when
  it cannot start or another process is gone. There is a callback for that, but
  jaxlib cannot call one in Python; so SIGABRT is met in C. The aborting thread
  raised it itself and holds no lock of Python's.
  """
  words: list[Any] = [LOST, '']

  def say(code: int, sentence: str) -> None:
    words[:] = code, sentence

  handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda _: _end(*words))
  libc = ctypes.CDLL(None)
  libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
  libc.signal.restype = ctypes.c_void_p
  old = libc.signal(signal.SIGABRT, ctypes.cast(handler, ctypes.c_void_p))
  try:
    yield say
  finally:
    libc.signal(signal.SIGABRT, old)


def _end(code: int, sentence: str) -> None:
  """Ends the process from any thread, with one sentence."""
  os.write(2, f'\nalignjax train: {sentence}\n'.encode())
  os._exit(code)


def _leave(who: str, error: BaseException) -> None:
  """Ends this process because of `error`; the others notice."""
  sys.stdout.flush()
  code, text = 1, f'{who}:\n{"".join(traceback.format_exception(error))}'
  if lost(error):
    reason = (str(error).strip().splitlines() or ['no reason given'])[0]
    code, text = LOST, f'alignjax train: {_gone(who)} ({reason[:200]})'
  elif isinstance(error, UserError):
    code, text = BAD_INPUT, f'alignjax train: {who}: {error}'
  elif isinstance(error, SystemExit) and isinstance(error.code, int):
    code, text = error.code, ''
  print(text, file=sys.stderr, flush=True)
  os._exit(code)


def _gone(who: str) -> str:
  return (
    f'{who}: another process of this run has died or cannot be reached; the '
    'same command on every host continues from the last checkpoint'
  )


def lost(error: BaseException | None) -> bool:
  """Whether an error means that another process is gone."""
  if jax.process_count() == 1:
    return False
  while error is not None:
    text = str(error).lower()
    runtime = isinstance(error, (jax.errors.JaxRuntimeError, RuntimeError))
    if runtime and any(word in text for word in _GONE):
      return True
    # What copies a failed result to the host raises errors of other types.
    if 'gloo' in text and not isinstance(error, UserError):
      return True
    error = error.__cause__ or error.__context__
  return False


def meet(name: str, limit_s: int = 24 * 3600) -> None:
  """Waits until every process has come to this point, once per name.

  Heartbeats go on meanwhile: a process that dies ends the wait.
  """
  client = distributed.global_state.client
  if client is not None:
    client.wait_at_barrier(f'alignjax/{name}', limit_s * 1000)


def agreement() -> Callable[[int, bool], bool]:
  """agreed(step, wish): whether all stop after this step; the same for all.

  To be called by every process after each step it has dispatched. A process
  that waits for the numbers of a step before it dispatches the next but one is
  never more than a step ahead of another, so what is proposed for three steps
  later is read by all in time.
  """
  client = distributed.global_state.client
  if client is None:
    return lambda _, wish: wish
  mine = f'alignjax/stop/{jax.process_index()}'
  proposed = False

  def agreed(step: int, wish: bool) -> bool:
    nonlocal proposed
    if wish and not proposed:
      client.key_value_set(mine, str(step + 3))
      proposed = True
    found = client.key_value_dir_get('alignjax/stop/')
    return any(int(at) <= step for _, at in found)

  return agreed


def whole(leaf: Any) -> np.ndarray:
  """A leaf on this host; to be called by all processes, leaf by leaf."""
  if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
    return np.asarray(leaf)
  return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
