"""Candidates, their order, and lines through two depths."""

import math

import pytest

from alignjax.core.errors import UserError
from alignjax.models.preset import SHAPES
from alignjax.plan import facts, search
from tests import tiny

CONFIG = SHAPES['gemma2-9b']


def test_candidates_fill_the_slice_and_divide_the_batch():
  found = list(search.candidates(CONFIG, 64, 64, ('full',)))
  assert len({(*c.mesh.values(), c.microbatches) for c in found}) == len(found)
  for c in found:
    assert math.prod(c.mesh.values()) == 64
    rows = c.mesh['data'] * c.mesh['fsdp']
    assert 64 % (rows * c.microbatches) == 0
    assert CONFIG.kv_heads % c.mesh['tensor'] == 0
  assert {'data': 4, 'fsdp': 16, 'tensor': 1} in [c.mesh for c in found]


def test_slices_are_on_data():
  for c in search.candidates(CONFIG, 128, 128, ('full',), slices=2):
    assert c.mesh['data'] % 2 == 0


def record(seconds, needs, source='compiler'):
  return {
    'source': source,
    'problem': '',
    'hbm': {'needs': needs, 'limit': 100},
    'seconds': {'high': seconds},
  }


def candidate(n):
  return search.Candidate({'data': n, 'fsdp': 1}, 1, 'full')


def test_the_fastest_that_fits_comes_first():
  facts_of = {1: record(3, 90), 2: record(2, 99), 3: record(1, 101)}
  found = [candidate(n) for n in facts_of]
  best = search.ranked(found, lambda c: facts_of[c.mesh['data']])
  assert [c.mesh['data'] for c, _ in best] == [2, 1]


def test_an_estimate_has_slack():
  best = search.ranked([candidate(1)], lambda c: record(1, 120, 'estimate'))
  assert len(best) == 1


def test_nothing_fits():
  def measure(c):
    if c.mesh['data'] == 2:
      raise UserError('heads do not divide')
    return record(1, 200)

  with pytest.raises(UserError, match='none of 2.*heads do not divide'):
    search.ranked([candidate(1), candidate(2)], measure)


def test_two_depths_keep_the_remainder():
  assert search.shallow(CONFIG) == (4, 8)
  assert search.shallow(SHAPES['gemma3-27b']) == (14, 26)
  assert search.shallow(tiny.config()) is None


def test_extrapolation_is_exact_for_a_line():
  def at(layers):
    wire = {'op': 'all-gather', 'axis': 'fsdp', 'cause': 'x', 'in_loop': True}
    wire |= {'dcn': False, 'asynchronous': False, 'count': 3.0 * layers}
    return {
      'hbm': {'limit': 100, 'needs': 7 + 2 * layers, 'resident': 5},
      'flops': {'matmul': 10.0 * layers + 1},
      'cycles': {'copy': 1.5 * layers},
      'wire': [wire | {'wire_bytes': 8.0 * layers}],
      'layers': layers,
      'notes': [],
      'fits': True,
    }

  found = facts.extrapolated(at(4), at(8), (4, 8, 42))
  expected = at(42)
  assert '42' in found['notes'][0]
  assert found | {'notes': []} == expected
