import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from alignjax.core import naming
from alignjax.interop import certificate, probe
from alignjax.interop.open import open as open_
from alignjax.models import decoder
from alignjax.models.config import to_json
from alignjax.system import model_dir
from tests.interop import trees

FAMILIES = ('gemma2', 'gemma3', 'griffin')


def write(path, config, leaves, extra=None):
  params = {'policy': leaves.items()}
  if extra:
    params['extra'] = extra.items()
  model_dir.write(path, config=to_json(config), params=params, provenance={})
  return open_(path)


def both(tmp_path, family='gemma2', **changed):
  """The same model twice, with other leaves on the second side."""
  config = dataclasses.replace(trees.CONFIGS[family], window=5)
  leaves = trees.leaves(config)
  return (
    write(tmp_path / 'a', config, leaves),
    write(tmp_path / 'b', config, {**leaves, **changed}),
  )


def test_the_same_model(tmp_path):
  a, b = both(tmp_path)
  seen = []
  found = certificate.compare(a, b, seen.append)
  assert found.same and found.verdict.startswith('identical')
  assert len(seen) == certificate.steps(a)
  assert found.facts['config'] == {}
  assert found.facts['probe']['max_abs_difference'] == 0
  assert found.facts['probe']['argmax_agreement'] == 1
  row = found.facts['leaves'][-1]
  assert row['leaf'] == 'layer_3/pre_ffw_norm'
  assert row['source'] == row['destination']
  assert row['source']['tensors'] == ['layer_3/pre_ffw_norm']
  sums = a.path / 'model.json'
  recorded = json.loads(sums.read_text())['checksums']['policy']
  for row in found.facts['leaves']:
    assert row['source']['crc32'] == recorded[row['leaf']]


@pytest.mark.parametrize('family', FAMILIES)
def test_logits_are_those_of_the_whole_model(tmp_path, monkeypatch, family):
  monkeypatch.setattr(probe, 'ROWS', 16)  # 40 rows: the last part is short
  a, _ = both(tmp_path, family)
  what = probe.probe(40)
  parts = list(probe.logits(a, what, 40))
  assert [x.shape[-1] for x in parts] == [16, 16, 8]
  params = naming.nested({name: jnp.asarray(a.load(name)) for name in a.leaves})
  expected = jax.jit(decoder.apply, static_argnums=0)(
    a.config,
    decoder.stacked(a.config, params),
    jnp.asarray(what.tokens),
    jnp.asarray(what.position),
    jnp.asarray(what.segment),
  )
  np.testing.assert_allclose(np.concatenate(parts, -1), expected, atol=2e-5)


def test_the_probe_is_fixed():
  what = probe.probe(40)
  assert what.tokens[:, :4].tolist() == [[2, 36, 28, 16], [2, 25, 25, 17]]
  assert what.tokens.shape == (2, 32) and what.tokens.max() < 40
  assert (what.tokens == 2).sum() == 3  # BOS: one for each document
  assert what.position[1, [0, 19, 20, 31]].tolist() == [0, 19, 0, 11]
  assert what.segment[:, [0, 19, 20, 31]].tolist() == [[1] * 4, [1, 1, 2, 2]]
  assert probe.probe(2).tokens.max() < 2


def test_one_flipped_bit(tmp_path):
  a, _ = both(tmp_path)
  leaf = a.load('layer_1/ffw/up').copy()
  leaf.view(np.uint8).reshape(-1)[3] ^= 1
  _, b = both(tmp_path / 'again', **{'layer_1/ffw/up': leaf})
  found = certificate.compare(a, b)
  assert not found.same
  assert found.verdict.startswith('DIFFERENT: 1 of')
  assert 'layer_1/ffw/up' in found.verdict
  wrong = [x for x in found.facts['leaves'] if x['result'] != 'identical']
  assert [x['leaf'] for x in wrong] == ['layer_1/ffw/up']
  crcs = {wrong[0][side]['crc32'] for side in ('source', 'destination')}
  assert len(crcs) == 2


def test_gate_and_up_exchanged(tmp_path):
  a, _ = both(tmp_path)
  gate, up = (a.load(f'layer_0/ffw/{x}') for x in ('gate', 'up'))
  _, b = both(
    tmp_path / 'again', **{'layer_0/ffw/gate': up, 'layer_0/ffw/up': gate}
  )
  found = certificate.compare(a, b)
  assert not found.same
  assert 'layer_0/ffw/gate, layer_0/ffw/up' in found.verdict
  assert found.facts['probe']['max_abs_difference'] > 1e-3
  # The logits alone tell, too.
  rows = [{'result': 'identical'}]
  verdict, same = certificate.judged([], {**found.facts, 'leaves': rows})
  assert not same and verdict.startswith('DIFFERENT: logits')


def test_a_cast_is_told_and_measured(tmp_path):
  config = trees.CONFIGS['gemma2']
  leaves = trees.leaves(config)
  a = write(tmp_path / 'a', config, leaves)
  rounded = {k: x.astype(ml_dtypes.bfloat16) for k, x in leaves.items()}
  b = write(tmp_path / 'b', config, rounded)
  found = certificate.compare(a, b)
  assert found.same and found.verdict.startswith('equal within ')
  assert 'cast to bfloat16' in found.verdict
  assert 1e-5 < found.facts['probe']['max_abs_difference'] < 1
  rounded['final_norm'] = rounded['final_norm'] + ml_dtypes.bfloat16(1)
  c = write(tmp_path / 'c', config, rounded)
  assert not certificate.compare(a, c).same


def test_rows_of_padding_are_told(tmp_path):
  config = trees.CONFIGS['gemma2']
  leaves = trees.leaves(config)
  a = write(tmp_path / 'a', config, leaves)
  fewer = {**leaves, 'embedding': leaves['embedding'][:37]}
  b = write(tmp_path / 'b', dataclasses.replace(config, vocab_size=37), fewer)
  for pair in ((a, b), (b, a)):
    found = certificate.compare(*pair)
    assert found.same and 'identical' in found.verdict
    assert '37 common rows' in found.verdict
    assert found.facts['probe']['shape'] == [2, 32, 37]


def test_numbers_of_the_config(tmp_path):
  a, b = both(tmp_path)
  b = b._replace(config=dataclasses.replace(b.config, final_softcap=29.0))
  found = certificate.compare(a, b)
  assert not found.same and 'config final_softcap' in found.verdict
  b = b._replace(config=dataclasses.replace(a.config, window_self=False))
  assert 'config window_self' in certificate.compare(a, b).verdict


def test_missing_leaves(tmp_path):
  a, b = both(tmp_path)
  gone = {k: x for k, x in b.leaves.items() if k != 'layer_3/attn/o'}
  found = certificate.compare(a, b._replace(leaves=gone))
  assert not found.same and 'layer_3/attn/o' in found.verdict
  assert found.facts['probe'] is None


def test_tensors_beyond_the_decoder(tmp_path):
  config = trees.CONFIGS['gemma2']
  leaves = trees.leaves(config)
  image = {'vision/a': np.ones(3, np.float32), 'vision/b': np.ones(2)}
  a = write(tmp_path / 'a', config, leaves, image)
  same = write(tmp_path / 'b', config, leaves, image)
  without = write(tmp_path / 'c', config, leaves)
  other = write(
    tmp_path / 'd', config, leaves, {**image, 'vision/b': np.zeros(2)}
  )
  assert certificate.compare(a, same).verdict == (
    'identical: every leaf and every logit of the probe'
  )
  assert 'extra tensors left out' in certificate.compare(a, without).verdict
  found = certificate.compare(a, other)
  assert not found.same and 'vision/b' in found.verdict


def test_both_files_are_written(tmp_path):
  a, b = both(tmp_path)
  found = certificate.compare(a, b)
  certificate.write(found, b.path)
  assert json.loads((b.path / 'certificate.json').read_text()) == found.facts
  lines = (b.path / 'certificate.txt').read_text().splitlines()
  assert lines[0] == found.verdict
  at = lines.index('layer_2/attn/q: identical')
  crc = found.facts['leaves'][0]['source']['crc32']
  assert any(crc in line for line in lines)
  assert 'float32 16 x 4 x 8  layer_2/attn/q' in lines[at + 1]
  assert [f for f in open_(b.path).files if 'certificate' in f.name] == []
