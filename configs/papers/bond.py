"""BOND: the Jeffreys weight, and iterative against fixed n (2407.14622).

COMMAND: alignjax run --config=configs/papers/bond.py --workdir=runs/bond
  --config.start.policy=MODEL --config.tokenizer=TOKENIZER

Towards best-of-4: backward KL weighted 0, 0.5 and 1, and 0.5 with a learned
quantile instead of 8 counted draws. Then best of 2 and of 4 of an anchor that
the policy replaces, against a fixed n of 8 and 16. Three seeds each.

Expected: 0.5 has a log-quantile close to that of 1, and 0 lags; a fixed n
saturates, a smaller one sooner, while the iterative ones go on, n = 4 faster,
on about the same curve of reward against KL; learned and counted quantiles
agree. The paper replaces the anchor every 1,000 steps of a T5 on XSum. What it
gave is in docs/papers.md; half an hour on one core with the model of the
quickstart, as every step draws up to 25 responses a prompt. `:tiny` is the same
path in minutes, with one seed, and shows no paper's curve. `alignjax train`
with the same config is one run, iterative with n = 2.
"""

from ml_collections import ConfigDict

from alignjax.core.lookup import defaults
from configs import base

VARIANTS = ('', 'tiny')


def get_config(variant: str = '') -> ConfigDict:
  tiny = variant == 'tiny'
  period = 2 if tiny else 15
  recipe = defaults(
    'recipes',
    'bond',
    n=2,
    anchor_period=period,
    quantile_count=8,
    max_new_tokens=40,
  )
  c = base.online(recipe, steps=4 if tiny else 60, lr=3e-4)
  c.start.anchor = '@policy'
  return base.experiment(
    c,
    tiny=tiny,
    weights=(0.0, 0.5, 1.0),
    fixed=(8,) if tiny else (8, 16),
    iterated=(2, 4),
    seeds=1 if tiny else 3,
  )


def jobs(c: ConfigDict):
  """The graph: what each command reads and writes."""
  recipe, start = c.recipe.to_dict(), c.start.to_dict()

  def arm(series, named, more=(), **numbers):
    changes = {'recipe': recipe | numbers | named} | dict(more)
    return base.Arm(series, named, changes)

  arms = [
    arm('weight', {'jeffreys_weight': weight}, n=4, anchor_period=0)
    for weight in c.graph.weights
  ]
  learned = {'start': start | {'quantile': '@policy'}}
  numbers = {'n': 4, 'anchor_period': 0, 'quantile_count': 1}
  arms.append(arm('learned', {}, learned, quantile='learned', **numbers))
  arms += [arm('fixed', {'n': n}, anchor_period=0) for n in c.graph.fixed]
  arms += [arm('iterated', {'n': n}) for n in c.graph.iterated]
  yield from base.compared(c, arms)
