"""One batch ahead, and nothing that was saved knows of it."""

import threading

import numpy as np
import pytest

from alignjax.core.errors import UserError
from alignjax.system import prefetch


class Counting:
  """Batch k is k; its state counts what was drawn and told."""

  def __init__(self, listens, fails_at=None):
    self.listens, self.fails_at = listens, fails_at
    self.drawn, self.told, self.threads = [], [], set()
    self.asked = threading.Event()

  def batches(self, start):
    k = start
    while True:
      if k == self.fails_at:
        raise UserError(f'row {k} is malformed')
      self.drawn.append(k)
      self.threads.add(threading.current_thread())
      if len(self.drawn) > 1:
        self.asked.set()
      yield {'id': np.array([k])}
      k += 1

  def state(self):
    return {'drawn': len(self.drawn), 'told': list(self.told)}

  def tell(self, batch):
    self.told.append(int(batch['id'][0]))


def place(batch):
  return batch | {'placed': True}


def test_the_next_batch_is_drawn_while_this_one_is_used():
  source = Counting(listens=False)
  feed = prefetch.ahead(source, 3, 6, place)
  batch, _ = next(feed)
  assert batch['id'] == 3 and batch['placed']
  assert source.asked.wait(10)  # nobody asked for batch 4
  assert [int(b['id'][0]) for b, _ in feed] == [4, 5]
  assert source.drawn == [3, 4, 5]  # and none beyond the end
  assert threading.current_thread() not in source.threads


def test_the_state_is_that_of_the_step():
  source = Counting(listens=False)
  for number, (_, state) in enumerate(prefetch.ahead(source, 0, 4, place)):
    if number < 3:
      while len(source.drawn) < number + 2:
        assert source.asked.wait(10)
    assert state()['drawn'] == number + 1


@pytest.mark.parametrize('says', [True, False])
def test_a_source_that_listens_is_not_drawn_ahead(says):
  source = Counting(listens=True)
  if not says:  # it might
    del source.listens
  for k, (batch, state) in enumerate(prefetch.ahead(source, 0, 3, place)):
    assert source.drawn == list(range(k + 1))
    source.tell(batch)
    assert state() == {'drawn': k + 1, 'told': list(range(k + 1))}
  assert source.threads == {threading.current_thread()}


def test_an_error_belongs_to_its_own_batch():
  feed = prefetch.ahead(Counting(False, fails_at=2), 0, 5, place)
  assert [next(feed)[0]['id'][0] for _ in range(2)] == [0, 1]
  with pytest.raises(UserError, match='row 2'):
    next(feed)


def test_stopping_early_ends_the_thread():
  before = threading.active_count()
  feed = prefetch.ahead(Counting(False), 0, 100, place)
  next(feed)
  feed.close()
  assert threading.active_count() == before
