"""Names of slices: what exists, what is near, how it wraps."""

import pytest

from alignjax.core.errors import UserError
from alignjax.plan import topology


@pytest.mark.parametrize(
  'name, chips, devices, wrap, hosts',
  [
    ('v5p:4x4x4', 64, 64, (True, True, True), (2, 2, 1)),
    ('v5p:2x2x4', 16, 16, (False, False, False), (2, 2, 1)),
    ('v5e:16x16', 256, 256, (True, True, False), (2, 2, 1)),
    ('v5e:8x16', 128, 128, (False, True, False), (2, 2, 1)),
    ('v6e:1x1', 1, 1, (False, False, False), (1, 1, 1)),
    ('tpu7x:4x4x8', 128, 256, (True, True, True), (2, 2, 1)),
    ('v5p:16x16x24', 6144, 6144, (True, True, True), (2, 2, 1)),
  ],
)
def test_what_a_name_says(name, chips, devices, wrap, hosts):
  found = topology.parse(name)
  assert found.name == name
  assert (found.chips, found.device_count) == (chips, devices)
  assert (found.wrap, found.hosts) == (wrap, hosts)


def test_slices_multiply_chips_and_not_the_torus():
  one, two = topology.parse('v5e:4x4'), topology.parse('v5e:4x4', 2)
  assert two.chips == 2 * one.chips and two.wrap == one.wrap


def test_a_device_of_two_has_half_of_the_chip():
  found = topology.parse('tpu7x:2x2x1')
  assert found.flops == found.generation.flops / 2
  assert found.ici == found.generation.ici / 2
  # Memory is told per device already.
  assert found.hbm == 94.74 * 2**30


def test_other_names_of_a_generation():
  assert topology.parse('V5:4x4x4').name == 'v5p:4x4x4'
  assert topology.parse('ironwood:2x2x1').name == 'tpu7x:2x2x1'


@pytest.mark.parametrize(
  'name, words',
  [
    ('v5p:3x3x3', ["'v5p:3x3x3'", 'v5p:2x4x4', 'v5p:2x2x4']),
    ('v5p:4x4', ['does not exist', 'v5p:2x2x4']),
    ('v5e:4x4x4', ['does not exist', 'v5e:8x8']),
    ('v5e:32x32', ['v5e:16x16']),
    ('v5x:4x4', ["'v5x'", 'did you mean', 'v4, v5e, v5p, v6e, tpu7x']),
    ('v5p', ['such as v5p:4x4x4']),
    ('v5e:axb', ['such as v5e:4x4']),
    ('v5e:0x4', ['such as v5e:4x4']),
  ],
)
def test_what_does_not_exist_names_what_is_near(name, words):
  with pytest.raises(UserError) as error:
    topology.parse(name)
  for word in words:
    assert word in str(error.value)
  assert '\n' not in str(error.value)


def test_no_slices():
  with pytest.raises(UserError, match='--slices=0'):
    topology.parse('v5e:4x4', 0)


def test_every_offered_slice_has_its_own_name():
  for generation in topology.GENERATIONS.values():
    for shape in topology._shapes(generation):
      found = topology.Topology(generation, shape)
      assert topology.parse(found.name).shape == shape
      assert found.chips <= generation.max_chips
