"""A made-up work directory with everything that a report can show."""

import json
import math
import random
from pathlib import Path


def bar(mean, half):
  return {'mean': mean, 'low': mean - half, 'high': mean + half}


def model(name, kind, reward, kl, rate=None, half=0.022):
  return {
    'name': name,
    'kind': kind,
    'liti_rate': rate,
    'reward': bar(reward, half),
    'kl': bar(kl, 0.05 * kl),
    'kl_sampled': bar(kl * 1.02, 0.09 * kl),
    'length': bar(48.0 - kl, 1.5),
    'entropy': bar(2.1 - 0.05 * kl, 0.04),
    'log_quantile': bar(-1.0 + reward, 0.05),
    'win_rate': bar(0.5 + (reward - 0.45) * 1.1, 0.03),
    'indicators': {
      'empty': 0.01,
      'comment_only': 0.004 * kl,
      'repeated_lines': 0.05,
    },
  }


def evaluation():
  rates = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
  models = [
    model('init', 'init', 0.45, 0.0),
    model('align_1', 'run', 0.698, 9.3),
    model('align_2', 'run', 0.704, 8.8),
    model('align_1_anchor', 'anchor', 0.672, 7.4),
    model('align_2_anchor', 'anchor', 0.676, 7.1),
    model('lerp', 'lerp', 0.701, 6.2),
    model('slerp', 'slerp', 0.715, 8.1),
  ]
  for rate in rates:
    reward = 0.45 + 0.265 * math.sin(rate * math.pi / 2)
    models.append(model(f'liti_{rate:g}', 'liti', reward, 8.1 * rate**2, rate))
  best_of_n = [
    {
      'n': n,
      'kl': math.log(n) - (n - 1) / n,
      'reward': bar(0.45 + 0.06 * math.log2(n), 0.02),
    }
    for n in (1, 2, 4, 8, 16)
  ]
  return {
    'format': 1,
    'reference': 'init',
    'prompts': 128,
    'responses': 4,
    'temperature': 1.0,
    'max_new_tokens': 64,
    'models': models,
    'best_of_n': best_of_n,
    'samples': [sample(i) for i in range(5)],
  }


def sample(i):
  good = (
    '    if not isinstance(value, int):\n'
    '      raise TypeError("expected an int <not a str> & more")\n'
    '    return self._table[value % len(self._table)]\n'
  )
  bad = (
    '    self._x = = value )\n        retur n\n  # see http://example.com/x\n'
  )
  texts = {
    'init': (bad * (1 + i), 0.31),
    'align_1': (good, 0.92),
    'align_2': (good, 0.9),
    'slerp': (good * 6, 0.97),
    'liti_0.8': ('' if i == 1 else good, 0.88),
    'liti_1': (good, 0.97),
  }
  return {
    'id': 40 + i,
    'prompt': 'class Table:\n  def lookup(self, value):\n    """<script>"""\n',
    'responses': {k: {'text': t, 'reward': r} for k, (t, r) in texts.items()},
  }


def write_run(folder: Path, steps: int, seed: int, keys, every: int = 1):
  """A run directory: noisy curves towards a target, timing, a config."""
  folder.mkdir(parents=True)
  rng = random.Random(seed)
  rows, timing = [], []
  for step in range(every, steps + 1, every):
    row = {'step': step}
    for key, (start, end, noise) in keys.items():
      done = 1 - math.exp(-4 * step / steps)
      row[key] = start + (end - start) * done + rng.gauss(0, noise)
    rows.append(row)
    speed = 21000 + rng.gauss(0, 700)
    timing.append(
      {'step': step, 'seconds': 0.4, 'tokens': 8192, 'tokens_per_s': speed}
      | {'spent': {'step': 0.3, 'rollout': 0.08, 'data': 0.02}}
    )
  timing[0]['spent'] |= {'startup': 3.0, 'compile': 9.0}
  for name, some in (('metrics', rows), ('timing', timing)):
    text = ''.join(json.dumps(r) + '\n' for r in some)
    (folder / f'{name}.jsonl').write_text(text)
  config = {'recipe': {'name': 'jbond', 'gamma': 0.25}, 'seed': seed}
  (folder / 'config.json').write_text(json.dumps(config))


SFT = {'loss': (7.2, 2.9, 0.08), 'grad_norm': (4.0, 0.7, 0.2)}
ALIGN = {
  'loss': (3.2, 2.6, 0.3),
  'reward': (0.45, 0.7, 0.03),
  'kl': (0.0, 9.0, 0.3),
  'log_quantile': (-1.0, -0.4, 0.06),
  'length': (48.0, 40.0, 2.0),
  'entropy': (2.1, 1.6, 0.05),
  'logprob_gap': (3e-6, 4e-6, 2e-7),
  'hack/comment_only': (0.01, 0.04, 0.005),
  'grad_norm': (1.0, 0.6, 0.1),
  'skipped': (0.0, 0.0, 0.0),
}


def workdir(root: Path) -> Path:
  """Pretraining, two aligned runs and an evaluation, as a job graph leaves."""
  work = root / 'quickstart'
  write_run(work / 'pretrain', 600, 0, SFT)
  write_run(work / 'align_1', 250, 1, ALIGN)
  write_run(work / 'align_2', 250, 2, ALIGN)
  write_evaluation(work, evaluation())
  return work


def write_evaluation(work: Path, data) -> None:
  (work / 'evaluate').mkdir(parents=True, exist_ok=True)
  (work / 'evaluate' / 'evaluation.json').write_text(json.dumps(data))
