"""Makes the golden file of GRPO and RLOO: TRL's advantages, losses, gradients.

  python tests/golden/make_trl.py

Needs torch and trl with what it imports (made with trl 1.16.0, torch 2.13.0,
CPU); reading the file needs neither. TRL's own methods run on small float64
arrays: the trainer that they are methods of is a stand-in without a model, from
which they get log-probabilities, rewards and settings.
"""

import contextlib
import json
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import trl
from trl.trainer import grpo_trainer, rloo_trainer

HERE = Path(__file__).parent
PROMPTS, COUNT, LENGTH = 3, 4, 7
# TRL's name of the mean; ours is in tests/parity/test_trl.py.
GRPO = {
  'grpo': dict(loss_type='grpo', beta=0.04),
  'bnpo': dict(loss_type='bnpo', beta=0.04),
  'dapo': dict(loss_type='dapo', beta=0.0, epsilon_high=0.28),
  'dr_grpo': dict(loss_type='dr_grpo', beta=0.1, scale_rewards='none'),
  'gspo': dict(
    loss_type='grpo', beta=0.0, importance_sampling_level='sequence'
  ),
}
RLOO = {'rloo': dict(beta=0.05), 'rloo_free': dict(beta=0.0)}


def arrays():
  """Responses of several lengths; ratios on both sides of the clip bounds."""
  rng = np.random.default_rng(0)
  shape = (PROMPTS, COUNT, LENGTH)
  length = rng.integers(1, LENGTH + 1, shape[:2])
  length[0, 0] = LENGTH
  mask = np.arange(LENGTH) < length[..., None]
  sample_logp = -1.2 - rng.exponential(1.0, shape)
  reward = rng.normal(size=shape[:2]).round(2)
  reward[1] = 0.3  # a group with nothing to compare
  return {
    'mask': mask,
    'reward': reward,
    'sample_logp': sample_logp * mask,
    'ref_logp': (sample_logp + rng.normal(0, 0.3, shape)) * mask,
    'logp': (sample_logp + rng.normal(0, 0.25, shape)) * mask,
  }


def rows(x):
  """[B, N, ...] -> torch [B * N, ...]."""
  return torch.tensor(x.reshape(-1, *x.shape[2:]))


class Base:
  """What TRL's methods find in `self`, but for the settings."""

  def __init__(self, x, **settings):
    self.x = x
    self.accelerator = mock.MagicMock()
    self.accelerator.device, self.accelerator.num_processes = 'cpu', 1
    self.accelerator.process_index = 0
    self.accelerator.gather = lambda y: y
    self.accelerator.reduce = lambda y, **_: y
    self.model = self.ref_model = mock.MagicMock()
    self.model.training = False  # no gradient accumulation
    self.args = mock.MagicMock(
      delta=None,
      use_bias_correction_kl=False,
      gradient_accumulation_steps=1,
      steps_per_generation=1,
    )
    self._metrics = {'eval': mock.MagicMock()}
    self._logs = mock.MagicMock()
    self._tokenizer = mock.MagicMock(pad_token_id=0)
    self.reward_func_names = ['reward']
    self.reward_funcs = [None]
    self.reward_weights = torch.ones(1, dtype=torch.float64)
    self.num_generations = self.num_generations_eval = COUNT
    self.max_completion_length = LENGTH
    self.multi_objective_aggregation = 'sum_then_normalize'
    self.importance_sampling_level = 'token'
    self.scale_rewards = 'group'
    self.epsilon_low = self.epsilon_high = 0.2
    self.top_entropy_quantile = 1.0
    self.num_iterations = self.current_gradient_accumulation_steps = 1
    self._pending_extra_logs, self._pending_metrics = {}, {}
    for name in (
      'off_policy_mask_threshold environment_factories tools environments'
      ' pad_to_multiple_of reward_clip_range'
    ).split():
      setattr(self, name, None)
    for name in (
      'use_vllm aux_loss_enabled _entropy_bonus_enabled normalize_advantages'
      ' mask_truncated_completions vllm_importance_sampling_correction'
      ' log_completions log_multimodal _is_vlm'
    ).split():
      setattr(self, name, False)
    for name, value in settings.items():
      setattr(self, name, value)
    self.scored = []

  def _calculate_rewards(self, *_):
    return rows(self.x['reward'])[:, None]

  def _get_per_token_logps_and_entropies(self, model, *_, **__):
    found = self.scored.pop(0)
    return found, torch.zeros_like(found), None


def generated(x):
  """(prompts, completions) as lists of ids; only lengths matter."""
  lengths = x['mask'].sum(-1).ravel()
  return [[5]] * len(lengths), [[7] * int(n) for n in lengths]


def result(stand_in, trainer, module, x, old):
  """TRL's advantages, then its loss and gradient on `logp`."""
  given = [{'prompt': 'p'}] * (PROMPTS * COUNT)
  with mock.patch.object(
    module,
    'disable_gradient_checkpointing',
    lambda *_: contextlib.nullcontext(),
  ):
    out = trainer._generate_and_score_completions(stand_in, given)
  logp = rows(x['logp']).requires_grad_()
  stand_in.scored = [logp]
  inputs = dict(out) | old
  loss = trainer._compute_loss(stand_in, stand_in.model, inputs)
  loss.backward()
  shape = x['logp'].shape
  return {
    'advantage': out['advantages'].numpy().reshape(shape[:2]),
    'loss': loss.detach().numpy(),
    'grad': logp.grad.numpy().reshape(shape),
  }


def main():
  x = arrays()
  saved = dict(x)
  prompts, completions = generated(x)
  for name, settings in GRPO.items():
    stand_in = Base(x, **settings)
    stand_in._generate = lambda _: (
      *(prompts, completions, None, [None] * len(prompts), None),
      *({}, None, None),
    )
    stand_in.scored = [rows(x['ref_logp'])] if settings['beta'] else []
    # The sampler's log-probabilities, as in a second update of one rollout.
    old = {'old_per_token_logps': rows(x['sample_logp'])}
    found = result(stand_in, grpo_trainer.GRPOTrainer, grpo_trainer, x, old)
    saved |= {f'{name}/{field}': value for field, value in found.items()}
  for name, settings in RLOO.items():
    stand_in = Base(x, **settings)
    stand_in._generate = lambda _: (prompts, completions, None)
    stand_in.scored = [rows(x['sample_logp'])]
    if settings['beta']:
      stand_in.scored.append(rows(x['ref_logp']))
    found = result(stand_in, rloo_trainer.RLOOTrainer, rloo_trainer, x, {})
    saved |= {f'{name}/{field}': value for field, value in found.items()}
  np.savez_compressed(HERE / 'trl.npz', **saved)
  facts = {'trl': trl.__version__, 'torch': torch.__version__} | GRPO | RLOO
  (HERE / 'trl.json').write_text(json.dumps(facts, indent=2) + '\n')


if __name__ == '__main__':
  main()
