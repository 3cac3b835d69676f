"""The runs of the planning configs, at two layers, through the TPU compiler."""

import collections
from importlib import metadata

import pytest

from tests.bench import pods

# Gemma 3 and RecurrentGemma at the depth that has all of their kinds of layer
# would compile for minutes; RecurrentGemma's attention is its third layer.
LAYERS = {'recurrentgemma_2b': 3}


def libtpu() -> bool:
  try:
    return bool(metadata.version('libtpu'))
  except metadata.PackageNotFoundError:
    return False


@pytest.mark.slow
@pytest.mark.skipif(not libtpu(), reason='needs libtpu')
@pytest.mark.parametrize('name', sorted(set(pods.ROWS) - {'9b_products'}))
def test_a_shallow_version_compiles_and_fits(name, tmp_path):
  (record,) = pods.records(name, tmp_path, LAYERS.get(name, 2))
  assert record['source'] == 'compiler' and record['fits']
  assert not record['problem'] and not record['unknown_loops']
  assert record['hbm']['peak'] > record['hbm']['parameters'] > 0
  assert record['flops']['matmul'] >= record['flops']['model'] * 0.9
  assert record['wire_bytes'] > 0
  if record['step'] == 'train':
    # Gradients are scattered where they are added (as permutations, on some
    # generations), and no weight is gathered more often than twice.
    ops = collections.Counter()
    for sent in record['wire']:
      ops[sent['op']] += sent['wire_bytes']
    scattered = ops['reduce-scatter'] + ops['collective-permute']
    assert scattered > ops['all-reduce']
    assert not any('need 2' in warning for warning in record['warnings'])
