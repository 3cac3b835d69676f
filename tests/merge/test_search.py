"""The search for numbers: variables and rules, proposals, resume."""

import json
import re
import sys

import jax
import numpy as np
import pytest

from alignjax.core import naming, tree
from alignjax.core.errors import UserError
from alignjax.merge import driver, method, planning, rules, search
from alignjax.merge.memory import merge
from alignjax.models.config import to_json
from alignjax.models.gemma import gemma
from alignjax.models.shapes import shapes
from alignjax.system import model_dir

SLERP, TIES = method.method('slerp'), method.method('ties')


def space(how=SLERP, names=('t',), over=(), **changes):
  told = {'groups': 3, 'layers': 12, 'models': 2} | changes
  return search.space(how, names, over, **told)


def quadratic(optimum):
  """Objective 0 at the optimum, per name and group, less elsewhere."""

  def measure(numbers):
    far = [np.subtract(numbers[name], optimum[name]) for name in optimum]
    return {'objective': -float(sum((x**2).sum() for x in far))}

  return measure


def run(of, measure, file, trials, **more):
  return search.run(
    of, measure, file, trials=trials, population=8, seed=0, **more
  )


@pytest.mark.parametrize(
  ('of', 'optimum'),
  [
    (space(groups=1), {'t': [0.31]}),
    (space(groups=4), {'t': [0.15, 0.4, 0.65, 0.9]}),
    (
      space(TIES, ('density', 'weights'), ['weights=-1:2'], groups=2),
      {'density': [0.2, 0.7], 'weights': [[0.4, 1.5], [-0.5, 1.0]]},
    ),
  ],
)
def test_the_optimum_of_a_quadratic_is_found(tmp_path, of, optimum):
  trials = 100 * of.size if of.size > 1 else 60
  rows = run(of, quadratic(optimum), tmp_path / 'trials', trials)
  found = search.best(rows)['numbers']
  for name, expected in optimum.items():
    np.testing.assert_allclose(found[name], expected, atol=0.02)
  # The first trial is the middle of all intervals.
  for name, (low, high) in of.intervals.items():
    np.testing.assert_allclose(rows[0]['numbers'][name], (low + high) / 2)


def test_the_wrong_sign_is_far_from_the_optimum(tmp_path):
  of, optimum = space(groups=2), {'t': [0.4, 0.6]}

  def wrong(numbers):
    return {'objective': -quadratic(optimum)(numbers)['objective']}

  rows = run(of, wrong, tmp_path / 'trials', 80)
  assert np.abs(np.subtract(search.best(rows)['numbers']['t'], 0.5)).min() > 0.4


def test_proposals_lie_in_the_intervals():
  of = space(TIES, ('density', 'weights'), ['density=0.123456:0.2'])
  proposed = search.proposals(of, population=8, seed=1)
  numbers = next(proposed)
  for _ in range(40):
    assert all(0.123456 <= x <= 0.2 for x in numbers['density'])
    assert np.shape(numbers['weights']) == (3, 2)
    assert 0 <= np.min(numbers['weights']) <= np.max(numbers['weights']) <= 1
    # To the lower end, which rounding to four digits would leave.
    numbers = proposed.send(-sum(numbers['density']))


@pytest.mark.parametrize('layers', [1, 2, 5, 12])
@pytest.mark.parametrize('groups', [1, 2, 3, 5])
def test_rules_give_each_leaf_the_numbers_of_its_group(layers, groups):
  if groups > layers:
    with pytest.raises(UserError, match=f'expected 1 to {layers}'):
      space(layers=layers, groups=groups)
    return
  of = space(TIES, ('density', 'weights'), layers=layers, groups=groups)
  numbers = {
    'density': [(i + 1) / 7 for i in range(groups)],
    'weights': [[i + 0.25, 1e-05] for i in range(groups)],
  }
  texts = search.where(of, numbers)
  assert len(texts) == groups
  leaves = {f'layer_{i}/attn/q': i * groups // layers for i in range(layers)}
  leaves |= {'embedding': 0, 'final_norm': groups - 1}
  leaves |= {'unembedding': groups - 1}
  given = rules.parsed(texts, TIES, [{'scale': 2.0}], 2)
  rules.check(given, leaves)
  for leaf, group in leaves.items():
    found = rules.numbers(given, leaf, {'scale': 2.0}, layers)
    mine = {name: values[group] for name, values in numbers.items()}
    assert found == {'scale': 2.0, **mine}, leaf
  assert sorted(i for g in range(groups) for i in of.part(g)) == [
    *range(layers)
  ]
  sizes = [len(of.part(group)) for group in range(groups)]
  assert max(sizes) - min(sizes) <= 1


CONFIG = gemma(
  family='gemma2',
  vocab_size=300,
  width=4,
  hidden=6,
  layers=3,
  heads=2,
  kv_heads=1,
  head_dim=2,
  window=4,
)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize(
  ('name', 'numbers', 'fixed'),
  [
    ('slerp', {'t': [0.2, 0.7]}, {}),
    ('slerp', {'t': [0.2, 0.7]}, {'group': 'all'}),
    ('linear', {'weights': [[0.3, 0.9], [1.0, 0.0]]}, {}),
    (
      'ties',
      {'density': [0.3, 0.8], 'weights': [[1.0, 0.5], [0.2, 1.5]]},
      {'scale': 0.9},
    ),
    ('dare.linear', {'density': [0.3, 0.8]}, {'weights': [0.5, 0.5]}),
    ('della.linear', {'density': [0.3, 0.6]}, {'epsilon': 0.2}),
  ],
)
def test_rules_in_memory_are_those_of_the_stream(
  tmp_path, name, numbers, fixed, dtype
):
  trees = []
  for seed in range(3):
    draw = np.random.default_rng(seed).normal
    trees.append(
      jax.tree.map(
        lambda x, draw=draw: np.asarray(
          jax.numpy.asarray(draw(size=x.shape), dtype)
        ),
        naming.nested(shapes(CONFIG)),
      )
    )
    model_dir.write(
      tmp_path / str(seed),
      config=to_json(CONFIG),
      params={'policy': trees[-1]},
      provenance={},
    )
  of = space(method.method(name), list(numbers), groups=2, layers=3)
  where = search.where(of, numbers)
  what = planning.plan(
    name,
    base=tmp_path / '0',
    models=[tmp_path / '1', tmp_path / '2'],
    out=tmp_path / 'out',
    where=where,
    **fixed,
  )
  (path,) = driver.run(what)
  base, *models = trees
  found = merge(name, base=base, models=models, where=where, **fixed)
  plain = merge(name, base=base, models=models, **fixed)
  streamed = tree.named(model_dir.load(model_dir.read(path)))
  changed = 0
  for leaf, x in tree.named(found).items():
    y = np.asarray(streamed[leaf])
    assert x.dtype == y.dtype and x.tobytes() == y.tobytes(), leaf
    changed += x.tobytes() != tree.named(plain)[leaf].tobytes()
  assert changed > 5  # the rules did something


def test_rules_in_memory_are_checked():
  leaves = {'layer_0': {'w': np.ones(2, 'f4')}}
  for where, message in (
    ('nothing:t=0.5', 'matches no leaf'),
    ('.*:t=2', 't must be a number from 0 to 1'),
    ('.*:weights=[1]', 'a weight per model: 1 weights for 2 models'),
    ('.*:weights=0.5', 'weights must be a list'),
  ):
    with pytest.raises(UserError, match=re.escape(message)):
      merge('linear', models=[leaves, leaves], where=[where])


OPTIMUM = quadratic({'t': [0.2, 0.5, 0.9]})


@pytest.mark.parametrize('left', [0, 1, 8, 21])
@pytest.mark.parametrize('torn', ['', '{"trial": 99, "nu', '\0\0\0', '12\n'])
def test_a_killed_search_ends_as_one_that_was_not(tmp_path, left, torn):
  whole, file = tmp_path / 'whole', tmp_path / 'killed'
  rows = run(space(), OPTIMUM, whole, 30)
  lines = whole.read_text().splitlines(keepends=True)
  file.write_text(''.join(lines[:left]) + torn)
  measured = []
  again = run(space(), lambda n: measured.append(n) or OPTIMUM(n), file, 30)
  assert again == rows and file.read_text() == whole.read_text()
  assert len(measured) == 30 - left


def test_a_line_without_its_end_is_finished(tmp_path):
  run(space(), OPTIMUM, tmp_path / 'whole', 12)
  text = (tmp_path / 'whole').read_text()
  (tmp_path / 'cut').write_text(text[:-1])
  run(space(), OPTIMUM, tmp_path / 'cut', 12)
  assert (tmp_path / 'cut').read_text() == text


def test_more_trials_continue_and_fewer_are_refused(tmp_path):
  run(space(), OPTIMUM, tmp_path / 'long', 25)
  run(space(), OPTIMUM, tmp_path / 'short', 10)
  run(space(), OPTIMUM, tmp_path / 'short', 25)
  text = (tmp_path / 'long').read_text()
  assert (tmp_path / 'short').read_text() == text
  with pytest.raises(UserError, match='--trials 10: .* has 25 already'):
    run(space(), OPTIMUM, tmp_path / 'short', 10)
  assert (tmp_path / 'short').read_text() == text


def test_trials_of_another_search_are_refused(tmp_path):
  run(space(), OPTIMUM, tmp_path / 'trials', 12)
  lines = (tmp_path / 'trials').read_text().splitlines()
  row = json.loads(lines[4])
  row['numbers']['t'][1] += 0.01
  lines[4] = json.dumps(row)
  (tmp_path / 'trials').write_text('\n'.join(lines) + '\n')
  with pytest.raises(UserError, match='trial 5: the optimiser proposes'):
    run(space(), OPTIMUM, tmp_path / 'trials', 12)


def test_trials_that_cannot_be_used_are_the_worst(tmp_path):
  def measure(numbers):
    if numbers['t'][0] > 0.6:
      return {'objective': None, 'refused': 'too far'}
    return quadratic({'t': [0.9, 0.5, 0.5]})(numbers)

  rows = run(space(), measure, tmp_path / 'trials', 160)
  assert any(row['objective'] is None for row in rows)
  assert 0.55 < search.best(rows)['numbers']['t'][0] <= 0.6


def test_where_the_middle_cannot_be_used_nothing_is_tried(tmp_path):
  def measure(numbers):
    return {'objective': None, 'refused': 'opposite'}

  with pytest.raises(UserError, match='middle .* cannot be used: opposite'):
    run(space(), measure, tmp_path / 'trials', 160)
  assert not (tmp_path / 'trials').exists()


def test_an_objective_is_finite_or_none():
  ones = np.ones((3, 2), np.float32)
  row = search.measured(ones, 2 * ones, 0.25)
  assert row == {'reward': 1.0, 'kl': 2.0, 'objective': 0.5}
  row = search.measured(ones * np.nan, ones, 0.25)
  assert row['objective'] is None and 'not both finite' in row['refused']


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'names': ['tt']}, "'slerp' has no number 'tt'; did you mean 't'"),
    ({'names': ['weights']}, "no number 'weights'"),
    ({'names': []}, 'expected different names'),
    ({'names': ['t', 't']}, 'expected different names'),
    ({'how': 'dare.linear', 'names': ['seed']}, 'whole numbers are not'),
    ({'how': 'ties', 'names': ['scale']}, 'scale has no ends'),
    ({'over': ['t=0:1.5']}, r'--over: t must be .* from 0 to 1, found 1.5'),
    ({'over': ['t=0:inf']}, 'no ends'),
    ({'over': ['t=0.5:0.5']}, 'expected low < high'),
    ({'over': ['t=1:0']}, 'expected low < high'),
    ({'over': ['t=1']}, 'expected NAME=LOW:HIGH'),
    ({'over': ['t=a:b']}, 'expected NAME=LOW:HIGH'),
    ({'over': ['t=nan:1']}, 'expected numbers'),
    ({'over': ['s=0:1']}, '--over s: is not searched'),
    ({'groups': 0}, '--groups 0: expected 1 to 12'),
    ({'groups': 13}, '--groups 13: expected 1 to 12'),
  ],
)
def test_bad_input(changes, message):
  how = method.method(changes.pop('how', 'slerp'))
  with pytest.raises(UserError, match=message):
    space(how, **changes)


def test_defaults_and_extrapolation():
  assert space(groups=None).groups == 4
  assert space(groups=None, layers=3).groups == 3
  of = space(over=['t=-0.5:1.5'], extrapolate=True)
  assert of.intervals == {'t': (-0.5, 1.5)}
  with pytest.raises(UserError, match='extrapolate'):
    space(over=['t=-0.5:1.5'])


def test_without_the_library(monkeypatch):
  monkeypatch.setitem(sys.modules, 'cmaes', None)
  with pytest.raises(UserError, match=r"pip install 'alignjax\[search\]'"):
    search.check_installed()
