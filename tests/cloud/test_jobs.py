from pathlib import Path

import pytest

from alignjax.cloud import jobs
from alignjax.cloud.jobs import Job
from alignjax.core.errors import UserError


def job(name, *needs, **fields):
  return Job(name, 'train', fields, needs)


def names(ordered):
  return [job.name for job in ordered]


def test_order_puts_needs_first_and_otherwise_keeps_the_order():
  graph = [job('z', 'm'), job('m', 'b', 'a'), job('b'), job('a')]
  assert names(jobs.order(graph)) == ['b', 'a', 'm', 'z']
  free = [job('c'), job('a'), job('b')]
  assert names(jobs.order(free)) == ['c', 'a', 'b']
  assert jobs.order([]) == []


def test_order_follows_a_new_chain_before_later_jobs():
  graph = [job('a'), job('x'), job('a2', 'a')]
  assert names(jobs.order(graph)) == ['a', 'x', 'a2']


@pytest.mark.parametrize(
  'graph, sentence',
  [
    ([job('a'), job('a')], "two jobs are named 'a'"),
    ([job('../a')], 'a name is letters'),
    ([job('.a')], 'a name is letters'),
    ([job('')], 'a name is letters'),
    (
      [job('pretrain'), job('b', 'pretrian')],
      "job 'b' needs 'pretrian', which is no job; did you mean 'pretrain'?",
    ),
    ([job('a', 'a')], 'a -> a'),
    ([job('x', 'a'), job('a', 'b'), job('b', 'c'), job('c', 'a')], 'a -> b'),
    ([job('a'), job('b', x='@a/model')], "'@a/model' but does not need 'a'"),
    (
      [job('a'), Job('b', 'merge', {}, (), ('@a/model',))],
      "'@a/model' but does not need 'a'",
    ),
  ],
)
def test_order_refuses(graph, sentence):
  with pytest.raises(UserError) as error:
    jobs.order(graph)
  assert sentence in str(error.value)


def test_an_output_may_come_from_a_need_of_a_need():
  graph = [job('a'), job('b', 'a'), job('c', 'b', x={'y': ['@a/model']})]
  assert names(jobs.order(graph)) == ['a', 'b', 'c']


def test_other_at_strings_are_no_outputs():
  graph = [job('a'), job('b', start={'anchor': '@policy', 'mail': 'x@a'})]
  assert len(jobs.order(graph)) == 2


def test_resolved(tmp_path, monkeypatch):
  value = {
    'a': ['@pre/model', '@pre'],
    'b': '@policy',
    'c': '@pretty/x',
    'e': '--in=@pre/x',
    'd': 1,
  }
  monkeypatch.chdir(tmp_path)
  assert jobs.resolved(value, ['pre'], Path('w')) == {
    'a': [f'{tmp_path}/w/pre/model', f'{tmp_path}/w/pre'],
    'b': '@policy',
    'c': '@pretty/x',
    'e': f'--in={tmp_path}/w/pre/x',
    'd': 1,
  }


def test_dependants_are_transitive():
  graph = jobs.order(
    [job('a'), job('b', 'a'), job('c', 'b'), job('d'), job('e', 'd', 'c')]
  )
  assert jobs.dependants(graph, ['b']) == {'b', 'c', 'e'}
  assert jobs.dependants(graph, ['d']) == {'d', 'e'}
  assert jobs.dependants(graph, []) == set()


def test_facts_change_with_the_job_and_all_above_it():
  def hashes(graph):
    return {name: fact['hash'] for name, fact in jobs.facts(graph).items()}

  graph = [job('a', lr=0.1), job('b', 'a'), job('c')]
  first = hashes(graph)
  assert hashes(graph) == first
  changed = hashes([job('a', lr=0.2), *graph[1:]])
  assert changed['a'] != first['a'] and changed['b'] != first['b']
  assert changed['c'] == first['c']
  for other in [
    graph[2]._replace(verb='evaluate'),
    graph[2]._replace(arguments=('--n=3',)),
    graph[2]._replace(config={'x': 1}),
  ]:
    assert hashes([*graph[:2], other])['c'] != first['c']
