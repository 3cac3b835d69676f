"""Distillation: targets with their stated biases, and optima in closed form.

Tables of the algorithm notes, section 6.1: the gradient is P_S - P_T; counts of
draws are unbiased, the distinct set and the top k are biased as stated.
"""

import itertools
import math
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.core.errors import UserError
from alignjax.losses import teacher as teachers
from alignjax.losses.divergence import kl
from alignjax.models.tabular import tabular
from alignjax.policies.combine import on_logits
from alignjax.recipes import distill as file
from alignjax.recipes.distill import distill, recorded
from alignjax.step import init_state, make_step
from alignjax.system.optimizer import optimizer
from tests import tiny
from tests.oracles import bandit
from tests.test_train import text_source

# The table's teacher, and others, to which the same closed forms belong.
P = np.array([0.6, 0.25, 0.1, 0.05])
OTHERS = [np.array([0.05, 0.5, 0.3, 0.15]), np.array([0.31, 0.29, 0.22, 0.18])]
TABLE = {
  2: [0.73, 0.207, 0.048, 0.015],
  8: [0.675, 0.245, 0.062, 0.019],
}


def batch():
  return jax.tree.map(jnp.asarray, text_source(batch_size=4).batch(0))


def multisets(p, k):
  """(sorted draws [n, k], their probabilities): all outcomes of k draws."""
  outcomes = list(itertools.combinations_with_replacement(range(len(p)), k))
  orders = [
    math.factorial(k) / math.prod(map(math.factorial, Counter(o).values()))
    for o in outcomes
  ]
  ids = np.array(outcomes, np.int32)
  return ids, np.array(orders) * np.prod(p[ids], axis=1)


def distinct(p, k):
  """E[target] of the distinct draws, by enumeration in float64."""
  total = np.zeros_like(p)
  for ids, chance in zip(*multisets(p, k)):
    inside = np.isin(np.arange(len(p)), ids) * p
    total += chance * inside / inside.sum()
  return total


def head(p, k):
  """The k likeliest, renormalised."""
  kept = np.where(p >= np.sort(p)[-k], p, 0)
  return kept / kept.sum()


def responses(rows, **fields):
  return {
    'id': jnp.arange(rows, dtype=jnp.int32),
    'prompt': jnp.zeros((rows, 1), jnp.int32),
    'response': jnp.zeros((rows, 1, 1), jnp.int32),
    'mask': jnp.ones((rows, 1, 1), bool),
  } | fields


def optimum(recipe, rows, tx, steps, start=None):
  state = init_state(recipe, tx, 0, start=start)
  step = jax.jit(make_step(recipe, tx))
  for _ in range(steps):
    state, metrics = step(state, rows)
  return bandit.probabilities(state.params['policy']), metrics


def one_step(recipe, rows, *, start=None, microbatches=1):
  """The gradient of one step, through a plain optimizer of rate 1."""
  tx = optimizer(1, algorithm='sgd', lr=1.0, clip_norm=0.0)
  state = init_state(recipe, tx, 0, start=start)
  step = jax.jit(make_step(recipe, tx, microbatches=microbatches))
  after, metrics = step(state, rows)
  return (
    jax.tree.map(
      lambda a, b: np.asarray(a - b),
      state.params['policy'],
      after.params['policy'],
    ),
    metrics,
    (state, after),
  )


def student(q=None):
  return tabular(np.zeros((1, 4)) if q is None else np.log(q)[None])


def test_the_loss_is_the_dense_kl_under_the_mask(monkeypatch):
  model = tiny.model()
  bundle, rows = tiny.bundle(model, 'policy', 'teacher'), batch()
  rows['loss_mask'] = rows['loss_mask'].at[1::2, 5:].set(False)
  logp = []
  for role in ('teacher', 'policy'):
    policy = model.policy(role)
    weights = policy.view(bundle, rows)
    logits = policy.head(weights, policy.features(weights, rows)[0])
    logp.append(np.asarray(jax.nn.log_softmax(logits), np.float64))
  dense = np.sum(np.exp(logp[0]) * (logp[0] - logp[1]), axis=-1)
  inside = rows['segment'][:, 1:] == rows['segment'][:, :-1]
  mask = np.asarray(rows['loss_mask'][:, 1:] & inside)
  over_tokens = file.over_tokens
  for chunk in (256, 7):
    monkeypatch.setattr(
      file,
      'over_tokens',
      lambda *args, chunk=chunk: over_tokens(*args, chunk=chunk),
    )
    loss, metrics = distill(model, model).objective(bundle, rows, None)
    mean = loss['kl'][1]
    assert float(mean.weight) == mask.sum()
    assert float(mean.value) == pytest.approx(dense[mask].mean(), rel=1e-5)
    # Every id among the k: the sparse targets are the whole distribution.
    top = distill(model, model, targets='top_k', k=272)
    loss, _ = top.objective(bundle, rows, None)
    assert float(loss['kl'][1].value) == pytest.approx(
      dense[mask].mean(), rel=1e-5
    )
  own = np.take_along_axis(
    logp[1], np.asarray(rows['tokens'])[:, 1:, None], axis=-1
  )
  nll = -own[..., 0][mask].mean()
  assert float(metrics['nll'].value) == pytest.approx(nll, rel=1e-5)


def test_a_policy_that_is_its_teacher_has_nothing_to_learn():
  recipe = distill(tiny.model(), tiny.model())
  grads, metrics, (state, after) = one_step(
    recipe, batch(), start={'teacher': '@policy'}
  )
  assert abs(metrics['loss/kl'].number) < 1e-6
  assert metrics['agreement'].number == 1
  assert max(np.abs(g).max() for g in jax.tree.leaves(grads)) < 1e-6
  jax.tree.map(np.testing.assert_array_equal, state.frozen, after.frozen)


def test_the_optimum_is_the_teacher():
  target = np.array([[0.5, 0.3, 0.15, 0.05], [0.1, 0.2, 0.3, 0.4]])
  recipe = distill(tabular(np.zeros((2, 4))), tabular(np.log(target)))
  tx = optimizer(300, algorithm='sgd', lr=4.0, clip_norm=0.0)
  state = init_state(recipe, tx, 0)
  step = jax.jit(make_step(recipe, tx, microbatches=2))
  rows = responses(4, prompt=jnp.array([[0], [1], [1], [0]]))
  for _ in range(300):
    state, metrics = step(state, rows)
  found = jax.nn.softmax(state.params['policy']['logits'])
  np.testing.assert_allclose(found, target, atol=1e-5)
  assert metrics['loss/kl'].number < 1e-6


@pytest.mark.parametrize('p', [P, *OTHERS])
def test_the_entropy_floor(p):
  # Cross-entropy of text from the teacher ends at the teacher's entropy.
  rows = responses(
    4,
    response=jnp.arange(4)[:, None, None],
    weight=jnp.asarray(p, jnp.float32)[:, None],
  )
  found, metrics = optimum(
    distill(student(), student(p)), rows, bandit.natural_gradient(0.5), 60
  )
  np.testing.assert_allclose(found, p, atol=1e-5)
  entropy = -(p * np.log(p)).sum()
  assert metrics['nll'].number == pytest.approx(entropy, abs=1e-5)


@pytest.mark.parametrize('p', [P, *OTHERS])
def test_the_gradient_is_student_minus_teacher(p):
  q = np.array([0.2, 0.1, 0.4, 0.3])
  recipe = distill(student(q), student(p))
  grads, _, _ = one_step(recipe, responses(4))
  np.testing.assert_allclose(grads['logits'][0], q - p, atol=1e-6)


def test_the_table_of_biases():
  for k, golden in TABLE.items():
    np.testing.assert_allclose(distinct(P, k), golden, atol=6e-4)


def enumerated(p, k, kind):
  """Rows of every outcome of k draws, as records, with their chances."""
  ids, chance = multisets(p, k)
  logits = jnp.broadcast_to(jnp.log(jnp.asarray(p, jnp.float32)), (len(ids), 4))
  target = teachers.from_draws(logits, jnp.asarray(ids), kind)
  return responses(
    len(ids),
    teacher_ids=target.ids[:, None, None],
    teacher_probs=jnp.exp(target.logits)[:, None, None],
    weight=jnp.asarray(chance, jnp.float32)[:, None],
  )


@pytest.mark.parametrize('k', [1, 2, 3, 8])
@pytest.mark.parametrize('p', [P, *OTHERS])
def test_exact_optimum_of_draws(p, k):
  recipe = recorded(student())
  for kind, target in (('counts', p), ('distinct', distinct(p, k))):
    found, _ = optimum(
      recipe, enumerated(p, k, kind), bandit.natural_gradient(0.5), 80
    )
    np.testing.assert_allclose(found, target, atol=1e-5, err_msg=kind)
    if kind == 'distinct' and k in TABLE and p is P:
      np.testing.assert_allclose(found, TABLE[k], atol=6e-4)


def test_the_bias_of_distinct_draws_goes_and_that_of_top_k_stays():
  far = [np.abs(distinct(P, k) - P).max() for k in (4, 8, 16, 32)]
  assert far == sorted(far, reverse=True) and far[-1] < 0.02
  assert np.abs(head(P, 3) - P).max() > 0.03
  # A single draw has mass 1 either way, and so no bias.
  np.testing.assert_allclose(distinct(P, 1), P)


@pytest.mark.parametrize('k', [1, 2, 3, 4])
@pytest.mark.parametrize('p', [P, *OTHERS])
def test_exact_optimum_of_top_k(p, k):
  recipe = distill(student(), student(p), targets='top_k', k=k)
  found, metrics = optimum(
    recipe, responses(2), bandit.natural_gradient(0.5), 80
  )
  np.testing.assert_allclose(found, head(p, k), atol=1e-5)
  assert metrics['loss/kl'].number == pytest.approx(0, abs=1e-5)


def test_the_ids_as_normaliser_identify_ratios_only():
  q = np.array([0.1, 0.2, 0.3, 0.4])
  recipe = distill(
    student(q), student(P), targets='top_k', k=2, normaliser='ids'
  )
  tx = optimizer(400, algorithm='sgd', lr=2.0, clip_norm=0.0)
  found, _ = optimum(recipe, responses(2), tx, 400)
  np.testing.assert_allclose(found[:2] / found[:2].sum(), head(P, 2)[:2], 1e-5)
  # Ids outside have no gradient: their ratio is what it was.
  np.testing.assert_allclose(found[2] / found[3], q[2] / q[3], rtol=1e-5)
  assert found[2:].sum() > 0.5


@pytest.mark.parametrize('seed', [0, 1, 2])
@pytest.mark.parametrize('kind', ['counts', 'distinct'])
def test_sampled_form(kind, seed):
  rows, k = 200_000, 2
  q = np.full(4, 0.25)
  recipe = distill(student(q), student(P), targets=kind, k=k, draw_seed=seed)
  grads, _, _ = one_step(recipe, responses(rows))
  mean = q - grads['logits'][0]
  target = P if kind == 'counts' else distinct(P, k)
  np.testing.assert_allclose(mean, target, atol=5e-3)
  # Far enough from the other variant to tell them apart.
  other = distinct(P, k) if kind == 'counts' else P
  assert np.abs(mean - other).max() > 0.1


def test_counts_add_up_and_repeat_no_id():
  logits = jnp.log(jnp.asarray(P, jnp.float32))[None]
  for ids in ([0, 0, 1, 3], [2, 2, 2, 2], [0, 1, 2, 3]):
    target = teachers.from_draws(logits, jnp.array([ids]), 'counts')
    found = np.zeros(4)
    np.add.at(found, np.asarray(target.ids)[0], np.exp(target.logits[0]))
    np.testing.assert_allclose(found, np.bincount(ids, minlength=4) / 4)
    used = np.asarray(target.logits[0]) > -1e8
    assert used.sum() == len(set(ids))


def test_draws_belong_to_the_row():
  recipe = distill(student(), student(P), targets='counts', k=1)
  rows = responses(8)
  whole, _, _ = one_step(recipe, rows)
  turned = {name: x[::-1] for name, x in rows.items()}
  np.testing.assert_allclose(
    one_step(recipe, turned)[0]['logits'], whole['logits'], atol=1e-7
  )
  seeds = [
    distill(student(), student(P), targets='counts', k=1, draw_seed=i)
    for i in range(4)
  ]
  found = {one_step(r, rows)[0]['logits'].tobytes() for r in seeds}
  assert len(found) > 1


def test_positions_of_a_row_draw_apart():
  p = np.full(64, 1 / 64)
  tokens = jnp.zeros((1, 1, 32), jnp.int32)
  rows = responses(1, response=tokens, mask=tokens == 0)
  said = teachers.writer(
    tabular(np.log(p)[None]).policy('teacher'),
    kind='counts',
    k=4,
    draw_seed=0,
  )
  ids, _ = said({'teacher': {'logits': jnp.log(p)[None]}}, rows)
  assert len({tuple(row) for row in np.asarray(ids[0, 0])}) > 28


# What a wrong line would do, so that the tests above are known to see it.


def test_a_swapped_direction_is_seen(monkeypatch):
  q = np.array([0.2, 0.1, 0.4, 0.3])
  monkeypatch.setattr(file.divergences, 'kl', lambda p, q: kl(q, p))
  grads, _, _ = one_step(distill(student(q), student(P)), responses(4))
  assert np.abs(grads['logits'][0] - (q - P)).max() > 5e-3


def test_a_missing_renormalisation_is_seen(monkeypatch):
  def plain(p, q):
    return jnp.sum(jnp.exp(p) * (p - q), axis=-1)

  def unnormalised(logits, k):
    logits, ids = jax.lax.top_k(jax.nn.log_softmax(logits), k)
    return teachers.Target(ids, logits)

  q = np.array([0.2, 0.1, 0.4, 0.3])
  recipe = distill(student(q), student(P), targets='top_k', k=2)
  right, metrics, _ = one_step(recipe, responses(4))
  np.testing.assert_allclose(right['logits'][0], q - head(P, 2), atol=1e-6)
  assert metrics['loss/kl'].number > 0
  monkeypatch.setattr(file.divergences, 'kl', plain)
  np.testing.assert_allclose(
    one_step(
      distill(student(q), student(P), targets='top_k', k=2), responses(4)
    )[0]['logits'],
    right['logits'],
    atol=1e-6,
  )
  monkeypatch.setattr(teachers, 'top_k', unnormalised)
  recipe = distill(student(q), student(P), targets='top_k', k=2)
  wrong, _, _ = one_step(recipe, responses(4))
  assert np.abs(wrong['logits'] - right['logits']).max() > 5e-3


def sharpened(model):
  """A teacher made of the policy's own weights, at half its temperature."""

  def policy(role):
    del role
    return on_logits(model.policy('policy'), lambda logits: 2 * logits)

  return model._replace(policy=policy)


def test_nothing_flows_into_the_teacher(monkeypatch):
  # Co-distillation: without the stop the gradient would be another.
  q = np.array([0.2, 0.1, 0.4, 0.3])
  p = q**2 / (q**2).sum()
  recipe = distill(student(q), sharpened(student(q)))
  grads, _, _ = one_step(recipe, responses(4))
  np.testing.assert_allclose(grads['logits'][0], q - p, atol=1e-6)
  monkeypatch.setattr(teachers.jax.lax, 'stop_gradient', lambda x: x)
  recipe = distill(student(q), sharpened(student(q)))
  wrong, _, _ = one_step(recipe, responses(4))
  assert np.abs(wrong['logits'][0] - (q - p)).max() > 5e-3


# On a decoder.

KINDS = [
  {},
  {'targets': 'top_k', 'k': 8},
  {'targets': 'counts', 'k': 16},
  {'targets': 'distinct', 'k': 16},
  {'targets': 'top_k', 'k': 8, 'normaliser': 'ids', 'divergence': 'reverse'},
  {'targets': 'counts', 'k': 16, 'divergence': 'jensen_shannon', 'mix': 0.3},
]


@pytest.mark.parametrize('numbers', [KINDS[0], KINDS[-1]], ids=str)
def test_microbatches_change_nothing(numbers):
  rows = batch()
  rows['loss_mask'] = rows['loss_mask'].at[1::2, 5:].set(False)
  model = tiny.model(layers=1)
  recipe = distill(model, model, **numbers)
  whole, first, _ = one_step(recipe, rows)
  split, then, _ = one_step(recipe, rows, microbatches=4)
  for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(split)):
    np.testing.assert_allclose(a, b, atol=4e-6)
  term = next(name for name in first if name.startswith('loss/'))
  assert first[term].number == pytest.approx(then[term].number, rel=1e-5)


@pytest.mark.parametrize('numbers', KINDS[:4], ids=str)
def test_rows_beyond_the_tokenizer_change_nothing(numbers):
  # A wider teacher with 262 rows, and the same with more than there are tokens.
  plain = tiny.model(width=48, vocab_size=262, layers=1)
  more = tiny.model(width=48, vocab_size=288, layers=1)
  small, large = (tiny.model(vocab_size=n, layers=1) for n in (262, 272))
  policy = small.init(jax.random.key(7))
  teacher = plain.init(jax.random.key(5))
  losses = []
  for own, given in ((small, plain), (small, more), (large, plain)):
    bundle = {}
    for role, model, weights in (
      ('policy', own, policy),
      ('teacher', given, teacher),
    ):
      rest = 100 * model.init(jax.random.key(8))['embedding'][262:]
      table = jnp.concatenate([weights['embedding'], rest])
      bundle[role] = weights | {'embedding': table}
    recipe = distill(own, given, **numbers)
    loss, _ = jax.jit(recipe.objective)(bundle, batch(), jax.random.key(0))
    losses.append(float(loss['kl'][1].value))
  np.testing.assert_allclose(losses, losses[0], rtol=1e-6)


def said_twice(numbers, draw_seed):
  """The means of an online step and of one from records, {name: (a, b)}."""
  model, other = tiny.model(layers=1), tiny.model(width=48, layers=1)
  bundle = {
    'policy': model.init(jax.random.key(0)),
    'teacher': other.init(jax.random.key(1)),
  }
  said = teachers.writer(
    other.policy('teacher'),
    kind=numbers['targets'],
    k=numbers['k'],
    draw_seed=draw_seed,
  )
  rows = batch()
  # Written in another order and in other batches than it is read.
  turned = {name: x[::-1] for name, x in rows.items()}
  parts = [
    said(bundle, {name: x[i : i + 2] for name, x in turned.items()})
    for i in (0, 2)
  ]
  ids, probs = (jnp.concatenate(x)[::-1] for x in zip(*parts))
  rest = {k: v for k, v in numbers.items() if k not in ('targets', 'k')}
  terms, metrics = distill(
    model, other, draw_seed=draw_seed, **numbers
  ).objective(bundle, rows, None)
  terms_read, metrics_read = recorded(model, **rest).objective(
    {'policy': bundle['policy']},
    rows | {'teacher_ids': ids, 'teacher_probs': probs},
    None,
  )
  means = {k: (x.value, metrics_read[k].value) for k, x in metrics.items()}
  for name, (_, mean) in terms.items():
    means[f'loss/{name}'] = mean.value, terms_read[name][1].value
  return means


@pytest.mark.parametrize('numbers', KINDS[1:], ids=str)
def test_offline_is_online(numbers):
  gaps = []
  for draw_seed in (3, 4, 5):
    pairs = list(said_twice(numbers, draw_seed).values())
    online, offline = np.transpose(pairs)
    gaps.append(np.max(np.abs(online / offline - 1)))
  # A batch of another size rounds otherwise, and a draw of the 2000 of a seed
  # that lies within rounding of two ids falls to the other.
  assert np.median(gaps) < 1e-6 and np.max(gaps) < 1e-3


@pytest.mark.parametrize(
  'numbers, message',
  [
    ({'targets': 'topk'}, "recipe.targets: found 'topk'"),
    ({'normaliser': 'all'}, "recipe.normaliser: found 'all'"),
    ({'divergence': 'kl'}, "recipe.divergence: found 'kl'"),
    ({'targets': 'top_k', 'k': 0}, 'recipe.k: found 0'),
    ({'targets': 'top_k', 'divergence': 'reverse'}, 'infinite'),
  ],
)
def test_bad_numbers(numbers, message):
  with pytest.raises(UserError, match=message):
    distill(student(), student(P), **numbers)


def test_more_ids_than_there_are():
  recipe = distill(student(), student(P), targets='top_k', k=5)
  with pytest.raises(UserError, match='recipe.k = 5 is more than the 4 ids'):
    one_step(recipe, responses(2))


def test_records_that_are_not_there():
  with pytest.raises(UserError, match='needs a source with'):
    one_step(recorded(student()), responses(2))
