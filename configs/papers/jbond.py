"""J-BOND against REINFORCE under a grid of KL strengths (2407.14622, sec. 6).

COMMAND: alignjax run --config=configs/papers/jbond.py --workdir=runs/jbond
  --config.start.policy=MODEL --config.tokenizer=TOKENIZER

J-BOND with anchors that move by 0.02 and 0.05, with 0.05 and an extra pull to
the anchor of 1 and 2, and with an anchor that is replaced every 25 steps (of
more steps, 50 in the paper); REINFORCE with two responses to a prompt, a
leave-one-out baseline and a fixed reference, under kl_coef 0.001, 0.01, 0.1 and
1. Three seeds each.

Expected: J-BOND above REINFORCE at equal KL, whose KL grows steadily with its
steps; 0.05 faster than 0.02; a larger pull slower in KL and better in reward at
equal KL; a replaced anchor with the same reward and more KL. Rates, pulls and
grid are the paper's; learning rate and batch are those of a small model
(paper: 3e-6 and 128 for Gemma 7B). Twenty minutes on one core with the
model of the quickstart, and docs/papers.md tells what it gave; `:tiny` is the
same path in minutes, with one seed, and shows no paper's curve. `alignjax
train` with the same config is one run of J-BOND.
"""

from ml_collections import ConfigDict

from alignjax.core.lookup import defaults
from configs import base

VARIANTS = ('', 'tiny')


def get_config(variant: str = '') -> ConfigDict:
  tiny = variant == 'tiny'
  recipe = defaults('recipes', 'jbond', ema_rate=0.02, max_new_tokens=40)
  c = base.online(recipe, steps=4 if tiny else 100, lr=3e-4)
  return base.experiment(
    c,
    tiny=tiny,
    ema_rates=(0.02, 0.05),
    anchor_kl_coefs=(1.0,) if tiny else (1.0, 2.0),  # at the last ema_rate
    anchor_period=2 if tiny else 25,
    kl_coefs=(0.01, 1.0) if tiny else (0.001, 0.01, 0.1, 1.0),
    seeds=1 if tiny else 3,
  )


def jobs(c: ConfigDict):
  """The graph: what each command reads and writes."""
  recipe, last = c.recipe.to_dict(), c.graph.ema_rates[-1]

  def arm(series, named, **numbers):
    return base.Arm(series, named, {'recipe': recipe | numbers | named})

  arms = [arm('ema', {'ema_rate': rate}) for rate in c.graph.ema_rates]
  for pull in c.graph.anchor_kl_coefs:
    arms.append(arm('pull', {'anchor_kl_coef': pull}, ema_rate=last))
  period = c.graph.anchor_period
  arms.append(arm('replaced', {}, ema_rate=0.0, anchor_period=period))
  for kl_coef in c.graph.kl_coefs:
    rival = defaults(
      'recipes',
      'reinforce',
      kl_coef=kl_coef,
      response_count=2,
      max_new_tokens=c.recipe.max_new_tokens,
      temperature=c.recipe.temperature,
    )
    changes = {
      'recipe': rival.to_dict(),
      'start': {'policy': c.start.policy, 'reference': '@policy'},
    }
    arms.append(base.Arm('reinforce', {'kl_coef': kl_coef}, changes))
  yield from base.compared(c, arms)
