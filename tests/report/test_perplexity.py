"""The chart of perplexities: arms, sizes, seeds, and what is said of them."""

import json

import pytest

from alignjax.core.errors import UserError
from alignjax.report import report
from alignjax.report.perplexity import arms, perplexity_lines, short
from alignjax.report.read import perplexity


def model(name, series, size, value):
  row = {'mean': value, 'low': 0.9 * value, 'high': 1.1 * value}
  facts = {'name': name, 'kind': 'run', 'series': series, 'parameters': size}
  return facts | dict.fromkeys(('nll', 'gain', 'perplexity'), row)


def document(*models):
  rows = {'format': 1, 'rows': 90, 'tokens': 12345, 'reference': 'teacher'}
  return rows | {'models': [model('teacher', '', 5_000_000, 9.0), *models]}


SEEDS = [
  model(f'{arm}_{seed}', arm, 84_000, value + seed / 10)
  for arm, value in (('scratch', 20.0), ('distilled', 18.0))
  for seed in (1, 2)
]


def test_arms_are_compared_by_their_seeds():
  found = arms(document(*SEEDS))
  assert list(found) == ['teacher', 'scratch', 'distilled']
  assert found['scratch'][0].values == [20.1, 20.2]
  small, large = perplexity_lines(document(*SEEDS))
  assert small == (
    '84 k parameters: perplexity distilled 18.15 (2 seeds, 18.1 to 18.2),'
    ' scratch 20.15 (2 seeds, 20.1 to 20.2); every seed of distilled is below'
    ' every other model.'
  )
  assert large == '5 M parameters: perplexity teacher 9.'
  mixed = [*SEEDS, model('distilled_3', 'distilled', 84_000, 20.15)]
  assert 'best two overlap' in perplexity_lines(document(*mixed))[0]
  alone = [m for m in SEEDS if m['name'].endswith('1')]
  assert 'one seed tells no' in perplexity_lines(document(*alone))[0]
  assert [short(n) for n in (999, 1_240_000, 27_200_000_000)] == [
    '999',
    '1.24 M',
    '27.2 B',
  ]


def test_the_page_draws_it(tmp_path):
  (tmp_path / 'perplexity').mkdir()
  file = tmp_path / 'perplexity' / 'perplexity.json'
  file.write_text(json.dumps(document(*SEEDS)))
  lines = report([tmp_path], tmp_path / 'report.html')
  assert lines == perplexity_lines(document(*SEEDS))
  page = (tmp_path / 'report.html').read_text()
  assert 'Perplexity on held-out text' in page and 'distilled_2' in page
  assert '12,345 tokens of 90 rows' in page and '<script' not in page


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'format': 2}, 'found format 2'),
    ({'models': []}, 'expected "models", each with a "name"'),
    ({'models': [{'name': 3}]}, 'expected "models", each with a "name"'),
    ({'models': [{'name': 'a'}]}, '"perplexity" of model \'a\' must have'),
    ({'models': [model('a', '', 0, 1.0)]}, '"parameters" of model \'a\''),
  ],
)
def test_a_malformed_file_is_told(tmp_path, changes, message):
  file = tmp_path / 'perplexity.json'
  file.write_text(json.dumps(document() | changes))
  with pytest.raises(UserError, match=message):
    perplexity(file)
