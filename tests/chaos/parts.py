"""A source and a reward that leave traces, for runs that are killed.

They write into the folder $CHAOS_TRACE: which rows each step was told of, and
when the host is between a rollout and its update. They slow a run a little, so
that it can be hit.
"""

import json
import os
import time
from pathlib import Path

from alignjax.data import sources
from alignjax.rewards import verify


def _trace(name, row):
  with open(Path(os.environ['CHAOS_TRACE']) / name, 'a') as file:
    file.write(json.dumps(row) + '\n')


class Traced(sources.Rows):
  """Rows; notes where a process begins and the rows of every finished step."""

  def batches(self, start):
    _trace(self.file, {'begin': start})
    return super().batches(start)

  def tell(self, batch):
    _trace(self.file, {'ids': batch['id'].tolist()})
    time.sleep(0.02)

  @property
  def file(self):
    """One per job of a graph: they differ in data or seed."""
    return f'order_{min(set(self.fields) - {"id"})}_{self.seed}.jsonl'


def _traced(rows):
  return Traced(rows.fields, rows.facts, rows.batch_size, rows.seed)


def text(tokens, batch_size, seed, *, path: str = '', length: int = 64):
  return _traced(
    sources.text(tokens, batch_size, seed, path=path, length=length)
  )


def prompts(
  tokens, batch_size, seed, *, path: str = '', prompt_tokens: int = 48
):
  return _traced(
    sources.prompts(
      tokens, batch_size, seed, path=path, prompt_tokens=prompt_tokens
    )
  )


def reward(tokens):
  inner = verify.python_code(tokens)

  def traced(bundle, batch, key):
    _trace('reward.jsonl', 'begin')
    time.sleep(0.02)
    scores = inner(bundle, batch, key)
    _trace('reward.jsonl', 'end')
    return scores

  traced.names = inner.names
  traced.host = True
  return traced


def order(trace):
  """(job, step) -> rows, over all lives; a step made twice saw the same."""
  found, k = {}, 0
  for file in sorted(trace.glob('order_*.jsonl')):
    for line in file.read_text().splitlines():
      row = json.loads(line)
      if 'begin' in row:
        k = row['begin']
        continue
      k += 1
      step = file.name, k
      assert found.setdefault(step, row['ids']) == row['ids'], step
  return found
