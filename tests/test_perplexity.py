"""Perplexity against sums written out, over rows and over models."""

import jax
import numpy as np
import pytest

from alignjax import perplexity
from alignjax.data.pack import pack
from alignjax.data.sources import Rows
from alignjax.models import decoder
from tests import tiny


def source(batch_size, documents=11, length=12):
  rng = np.random.default_rng(0)
  some = [
    ([tiny.TOKENS.bos, *rng.integers(6, 262, 2 + i % 7)], [True] * (3 + i % 7))
    for i in range(documents)
  ]
  fields = pack(some, length)
  rows = len(fields['tokens'])
  return Rows(fields, [{}] * rows, batch_size, 0)


def test_every_row_is_read_once_and_as_written_out():
  config = tiny.config(layers=1, dtype='float32')
  params = decoder.init(config, jax.random.key(0))
  read = perplexity.reader(tiny.model(layers=1, dtype='float32'))
  told = []
  # Seven rows or so in batches of three: the last one is filled up.
  text = source(3)
  assert len(text) % 3
  found = perplexity.everything(
    lambda batch: read(params, batch), text, lambda done, _: told.append(done)
  )
  assert told[-1] == len(text)
  rows = text.rows(np.arange(len(text)))
  logits = decoder.apply(
    config,
    params,
    rows['tokens'],
    position=rows['position'],
    segment=rows['segment'],
  )
  logits = np.asarray(logits, np.float64)[..., : tiny.TOKENS.size]
  logits[..., list(tiny.TOKENS.illegal)] = -np.inf  # as in training
  logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  for row in range(len(text)):
    tokens, segment = rows['tokens'][row], rows['segment'][row]
    inside = [
      i
      for i in range(1, len(tokens))
      if rows['loss_mask'][row, i] and segment[i] == segment[i - 1]
    ]
    said = -sum(logp[row, i - 1, tokens[i]] for i in inside)
    assert found.tokens[row] == len(inside)
    np.testing.assert_allclose(found.nll[row], said, rtol=2e-5)


def test_interval_is_that_of_a_mean_where_rows_are_alike():
  values = np.random.default_rng(1).normal(2, 0.5, 400)
  tokens = np.full(400, 7)
  found = perplexity.interval(values * 7, tokens)
  half = 1.96 * values.std(ddof=1) / 20
  assert found['mean'] == pytest.approx(values.mean())
  assert found['high'] - found['mean'] == pytest.approx(half)
  assert found['mean'] - found['low'] == pytest.approx(half)


def test_interval_covers_a_ratio_of_uneven_rows():
  rng, hits = np.random.default_rng(2), 0
  for _ in range(300):
    tokens = rng.integers(5, 50, 150)
    # Long rows are harder: a mean over rows would be another number.
    nll = tokens * (1 + tokens / 50) + rng.normal(0, 3, 150)
    found = perplexity.interval(nll, tokens)
    sizes = np.arange(5, 50)
    truth = (sizes * (1 + sizes / 50)).mean() / sizes.mean()
    hits += found['low'] < truth < found['high']
  assert 0.91 <= hits / 300 <= 0.985


def test_gain_is_paired():
  rng = np.random.default_rng(3)
  tokens = rng.integers(5, 50, 200)
  hard = tokens * rng.gamma(4, 0.5, 200)
  one = perplexity.Read(hard, tokens)
  other = perplexity.Read(hard - 0.1 * tokens, tokens)
  row = perplexity.compare(other, one)
  assert row['gain']['mean'] == pytest.approx(0.1)
  assert row['gain']['high'] - row['gain']['low'] < 1e-9
  assert row['nll']['high'] - row['nll']['low'] > 0.1
  assert row['perplexity']['mean'] == pytest.approx(np.exp(row['nll']['mean']))
  assert perplexity.compare(one, one)['gain']['mean'] == 0
