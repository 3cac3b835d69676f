"""The ledger adds up to the wall clock and puts seconds where they belong."""

import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from alignjax import train
from alignjax.core.types import Mean, Recipe
from alignjax.data.sources import Rows
from alignjax.step import init_state
from alignjax.system import ledger, metrics


class Clock:
  now = 10.0

  def __call__(self):
    return self.now


def test_the_device_comes_first_then_compiling_then_the_host():
  device = [(1.0, 3.0, 'step')]
  compiled = [(2.0, 5.0, 'compile'), (4.0, 5.0, 'compile')]  # nested
  host = [(0.0, 4.0, 'data'), (4.0, 7.0, 'checkpoint')]
  spent = ledger.charge(0.0, 10.0, (device, compiled, host))
  assert spent == {
    'step': 2.0,
    'compile': 2.0,
    'data': 1.0,
    'checkpoint': 2.0,
    'other': 3.0,
  }
  clipped = ledger.charge(2.5, 6.0, (device, compiled, host))
  assert clipped == {'step': 0.5, 'compile': 2.0, 'checkpoint': 1.0}


def test_phases_nest_and_nothing_is_counted_twice():
  clock = Clock()
  with ledger.keep(since=8.0, clock=clock) as book:
    clock.now = 11.0  # started 3 s ago
    book.turn('other')
    with ledger.phase('checkpoint'):
      clock.now = 12.0
      with ledger.phase('data'):
        clock.now = 14.0
      clock.now = 14.5
    book.fold()
    clock.now = 15.0
    assert book.take() == {
      'startup': 3.0,
      'checkpoint': 1.5,
      'data': 2.0,
      'other': 0.5,
    }
    assert sum(book.take().values()) == 0


class Coming:
  """An array that the device is still computing."""

  def __init__(self):
    self.ready = threading.Event()

  def block_until_ready(self):
    assert self.ready.wait(10)


def test_a_device_that_is_busy_hides_the_host():
  clock, out, later = Clock(), Coming(), Coming()
  with ledger.keep(clock=clock) as book:
    book.turn('other')
    ledger.watch('rollout', out)
    ledger.watch('step', later)  # waits for the rollout
    with ledger.phase('data'):
      clock.now += 2
    assert book.take() == {'rollout': 2}
    clock.now += 3
    out.ready.set()
    while len(book._flight) > 1:
      time.sleep(0.001)
    with ledger.phase('checkpoint'):
      clock.now += 4
    assert book.take() == {'rollout': 3, 'step': 4}
    later.ready.set()
    while book._flight:
      time.sleep(0.001)
    with ledger.phase('data'):
      clock.now += 5
    assert book.take() == {'data': 5}


def test_compilation_is_told_apart():
  with ledger.keep() as book, ledger.phase('step'):
    jax.block_until_ready(jax.jit(lambda x: jnp.tanh(x) * 3.125)(jnp.ones(7)))
    spent = book.take()
  assert spent['compile'] > spent.get('step', 0.0) > 0


def test_without_a_ledger_nothing_happens():
  with ledger.phase('data'):
    ledger.watch('step', jnp.ones(2))


def test_lost_work_is_counted_once(tmp_path):
  file = tmp_path / 'timing.jsonl'

  def row(at, **spent):
    metrics.append(file, {'step': at, 'spent': spent})

  def resume(step):
    metrics.cut(file, step, ledger.lost)
    return ledger.added(metrics.read(file))

  row(10, startup=5.0, compile=7.0, step=10.0)
  row(20, step=9.0, data=1.0)
  row(30, step=9.0, checkpoint=2.0)
  spent = {'startup': 5.0, 'compile': 7.0, 'step': 10.0, 'lost': 21.0}
  assert resume(10) == spent
  assert resume(10) == spent  # killed before it wrote anything
  row(20, startup=4.0, step=8.0)
  # Its checkpoint is damaged: even the first ten steps are done again.
  spent = {'startup': 9.0, 'compile': 7.0, 'lost': 39.0}
  assert resume(0) == spent
  total = ledger.closing(metrics.read(file), 20, {'step': 55.0})['total']
  assert total['lost_steps'] == 20 + 20
  assert total['spent'] == spent | {'step': 55.0}
  assert total['goodput'] == pytest.approx(0.5)


def test_a_run_accounts_for_its_wall_clock(tmp_path):
  def objective(bundle, batch, key):
    loss = Mean.of(bundle['policy']['x'] * batch['id'], jnp.ones(2))
    return {'x': (1.0, loss)}, {}

  def grade(bundle, batch, key):
    time.sleep(0.03)  # on the host, nothing hides it
    return batch | {'weight': np.ones(2, np.float32)}

  recipe = Recipe(
    objective, {'policy': lambda key: {'x': jnp.zeros(())}}, stages=(grade,)
  )
  fields = {'tokens': np.zeros((8, 3), np.int32)}
  tx, rows = optax.sgd(1.0), []

  def go(steps):
    begun = time.monotonic()
    train.train(
      recipe,
      tx,
      Rows(fields, [{}] * 8, 2, 0),
      init_state(recipe, tx, 0),
      train.Schedule(steps=steps, log_every=2, save_every=100),
      workdir=tmp_path,
      started=begun,
    )
    rows[:] = metrics.read(tmp_path / 'timing.jsonl')
    return time.monotonic() - begun

  wall = go(5)
  assert [row['step'] for row in rows] == [2, 4, 5, 5]
  spent = ledger.added(rows)
  assert sum(spent.values()) == pytest.approx(wall, rel=0.1)
  assert rows[-1]['total']['spent'] == spent
  assert spent['stages'] >= 5 * 0.03
  assert spent['startup'] > 0 and spent['compile'] > 0
  assert spent['checkpoint'] > 0
  assert rows[1]['seconds'] == pytest.approx(sum(rows[1]['spent'].values()))
  # The same command on a finished run adds nothing to the account.
  before = rows[:]
  go(5)
  assert rows == before
