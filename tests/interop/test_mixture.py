"""Conditioned model directories: opened at weights, sampled, refused."""

import jax
import numpy as np
import pytest

from alignjax import api
from alignjax.cli import facts
from alignjax.cli import sample as cli
from alignjax.core import tree
from alignjax.core.errors import UserError
from alignjax.interop.open import open as open_model
from alignjax.merge import planning
from alignjax.models import decoder
from alignjax.models.config import to_json
from alignjax.policies import conditioned
from alignjax.system import model_dir
from tests import tiny


def write(path, copied):
  """A conditioned model of two random copies; its plain ends."""
  config = tiny.config()
  first, second = (
    tiny.bundle(tiny.model(), 'a', seed=seed)['a'] for seed in (0, 1)
  )
  role = conditioned.split(first, 2, copied)
  role['copies']['1'] = conditioned.split(second, 1, copied)['copies']['0']
  model_dir.write(
    path,
    config=to_json(config),
    params=conditioned.roles(role, decoder.canonical),
    provenance={'condition': ['even', 'small']},
    view='conditioned',
    head='untied' if copied == 'logits' else 'tied',
  )
  return role


@pytest.mark.parametrize('copied', ['full', 'attention', 'logits'])
def test_mixed_as_in_training(tmp_path, copied):
  role = write(tmp_path / 'm', copied)
  for weights in ((1.0, 0.0), (0.0, 1.0), (0.25, 0.75)):
    found = api.load(tmp_path / 'm', weights=weights)
    expected = tree.named(decoder.canonical(conditioned.mix(role, weights)))
    assert set(tree.named(found.params)) == set(expected)
    for name, x in tree.named(found.params).items():
      np.testing.assert_allclose(x, expected[name], rtol=2e-7, atol=1e-8)
  tokens = np.ones((1, 4), np.int32)
  assert np.isfinite(np.asarray(api.apply(found, tokens))).all()


@pytest.mark.parametrize(
  'weights, message',
  [
    (None, r"conditioned on \['even', 'small'\], so it needs 2 weights"),
    ((0.5, 0.25, 0.25), 'found 3, expected 2'),
    ((0.5, 0.6), 'outside the simplex'),
    ((1.5, -0.5), 'outside the simplex'),
    ((float('nan'), 0.5), 'outside the simplex'),
  ],
)
def test_bad_weights(tmp_path, weights, message):
  write(tmp_path / 'm', 'attention')
  with pytest.raises(UserError, match=message):
    open_model(tmp_path / 'm', weights=weights)


def test_what_others_say(tmp_path):
  write(tmp_path / 'm', 'attention')
  with pytest.raises(UserError, match='outside the simplex'):
    cli.main([str(tmp_path / 'm'), '--prompt', 'x', '--weights', '0.5,0.7'])
  with pytest.raises(UserError, match='--weights=a,b: expected numbers'):
    cli.main([str(tmp_path / 'm'), '--prompt', 'x', '--weights', 'a,b'])
  known = facts.model(str(tmp_path / 'm'), lengths=(64,))
  assert set(known['roles']) == {'shared', 'copy_0', 'copy_1'}
  assert known['provenance']['condition'] == ['even', 'small']
  with pytest.raises(UserError, match='merge of a conditioned model'):
    planning.plan(
      'linear',
      base=tmp_path / 'm',
      models=[tmp_path / 'm'],
      out=tmp_path / 'out',
    )
  mixed = api.load(tmp_path / 'm', weights=(0.5, 0.5))
  api.save(mixed, tmp_path / 'plain')
  assert model_dir.read(tmp_path / 'plain').view == 'plain'
  with pytest.raises(UserError, match='a plain model: it takes no weights'):
    open_model(tmp_path / 'plain', weights=(0.5, 0.5))
  again = tree.named(api.load(tmp_path / 'plain').params)
  jax.tree.map(np.testing.assert_array_equal, tree.named(mixed.params), again)
