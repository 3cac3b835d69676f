"""CPU-seconds of an online step against TRL's GRPO and RLOO trainers.

  python tests/bench/online.py --trl PYTHON --pairs 5

PYTHON is an interpreter that has trl with torch and transformers. Every
measurement is a process of its own on one core, sides take turns.

A step is 16 completions of at most 64 tokens (4 prompts of 32 tokens, 4
completions each), a reference model, a reward in Python that reads the text,
and one update. The model has the Gemma 2 shape with 0.39 M parameters; weights
are random, temperature 1. Ours is the whole loop of `alignjax.train`, metrics
written at each step; TRL logs and saves nothing. The first steps, with tracing
and compilation, are told apart. The parts of a step come from clocks around
them: rollout, reward (with decoding), reference (TRL: with the preparation of
the batch), update; overhead is what is left of the step.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import sides

SHAPE = dict(
  vocab_size=1024,
  width=96,
  hidden=160,
  layers=4,
  heads=4,
  kv_heads=2,
  head_dim=24,
  window=32,
)
PROMPTS, COUNT, NEW, PROMPT = 4, 4, 64, 32
METHODS = {'grpo': 0.04, 'rloo': 0.05}  # and their kl_coef
PARTS = ('rollout', 'reward', 'reference', 'update')
PAD, STOP, BOS = 0, 1, 2


def pieces() -> list[str]:
  """The text of every id: one to three letters, a blank now and then."""
  draw = random.Random(0)
  letters = 'abcdefghij ()=+:\n'
  found = {i: f'<{i}>' for i in range(3)}
  while len(found) < SHAPE['vocab_size']:
    text = ''.join(draw.choices(letters, k=draw.randint(2, 4)))
    if text not in found.values():
      found[len(found)] = text
  return list(found.values())


def judged(text: str) -> float:
  """The reward of both sides: letters that are not repeated, and brackets."""
  words = text.split()
  depth = worst = 0
  for letter in text:
    depth += (letter == '(') - (letter == ')')
    worst = min(worst, depth)
  fresh = len(set(words)) / max(1, len(words))
  return fresh - 0.1 * abs(depth) + 0.1 * worst


class Clock:
  """CPU and wall seconds by part of a step."""

  def __init__(self):
    self.parts, self.marks = {}, []

  def around(self, name, fn):
    def timed(*args, **kwargs):
      begin = sides.clock()
      out = fn(*args, **kwargs)
      self.add(name, begin)
      return out

    return timed

  def add(self, name, begin):
    taken = [b - a for a, b in zip(begin, sides.clock())]
    old = self.parts.get(name, [0.0, 0.0])
    self.parts[name] = [a + b for a, b in zip(old, taken)]

  def step(self):
    """At the begin of every step; parts so far are those before it."""
    self.marks.append((sides.clock(), {k: v[0] for k, v in self.parts.items()}))

  def result(self, warm: int) -> dict[str, float]:
    """Seconds per step after `warm` steps; the last mark is the end."""
    (begin, before), (end, after) = self.marks[warm], self.marks[-1]
    steps = len(self.marks) - 1 - warm
    cpu, wall = ((b - a) / steps for a, b in zip(begin, end))
    found = {'cpu_s': cpu, 'wall_s': wall}
    for part in PARTS:
      found[part] = (after.get(part, 0.0) - before.get(part, 0.0)) / steps
    found['overhead'] = cpu - sum(found[part] for part in PARTS)
    first = self.marks[warm][0][1] - self.marks[0][0][1]
    found['first_s'] = max(0.0, first - warm * wall)
    return found


def ours(method: str, steps: int, warm: int) -> dict[str, float]:
  import jax
  import numpy as np

  from alignjax import train
  from alignjax.data.sources import Rows
  from alignjax.models.config import Config
  from alignjax.policies import lm
  from alignjax.recipes.grpo import grpo
  from alignjax.recipes.reinforce import reinforce
  from alignjax.step import init_state
  from alignjax.system.optimizer import optimizer

  texts = pieces()

  class Tokens:
    size, pad, stop, illegal = len(texts), PAD, (STOP,), (PAD, BOS)

  config = Config(
    **SHAPE,
    pattern=('local', 'global'),
    attn_softcap=50.0,
    final_softcap=30.0,
    post_norm=True,
    init_std=0.02,
  )

  def reward(bundle, batch, key):
    scores = [
      [
        judged(''.join(texts[i] for i in ids[mask]))
        for ids, mask in zip(*responses)
      ]
      for responses in zip(batch['response'], batch['mask'])
    ]
    return np.asarray(scores, np.float32)[..., None]

  reward.host = True
  clock = Clock()

  class Marked(Rows):
    def batch(self, k):
      jax.block_until_ready(box[-1:])
      clock.step()
      return super().batch(k)

    @property
    def listens(self):  # so that no batch is drawn ahead of its step
      return True

  fn = {'grpo': grpo, 'rloo': reinforce}[method]
  recipe = fn(
    lm.model(config, Tokens()),
    reward,
    kl_coef=METHODS[method],
    response_count=COUNT,
    max_new_tokens=NEW,
  )
  names = ('rollout', 'reward', 'reference', 'update')
  box = []

  def blocking(name, stage):
    def run(*args):
      begin = sides.clock()
      out = jax.block_until_ready(stage(*args))
      clock.add(name, begin)
      return out

    return run

  # The stage that makes advantages is counted with the update.
  recipe = recipe._replace(
    stages=[blocking(*pair) for pair in zip(names, recipe.stages, strict=True)]
  )
  tx = optimizer(1000, lr=1e-5)
  state = init_state(recipe, tx, 0, start={'reference': '@policy'})
  prompts = np.asarray(sides.ids(256, PROMPT), np.int32) % SHAPE['vocab_size']
  source = Marked({'prompt': np.maximum(prompts, 3)}, [{}] * 256, PROMPTS, 0)
  compiled = train.compiled

  def timed(*args):
    step = compiled(*args)

    def run(*args):
      begin = sides.clock()
      out = jax.block_until_ready(step(*args))
      clock.add('update', begin)
      return out

    return run

  train.compiled = timed
  schedule = train.Schedule(steps=warm + steps + 1, save_every=10**9)
  with tempfile.TemporaryDirectory() as folder:
    train.train(recipe, tx, source, state, schedule, workdir=Path(folder))
  return clock.result(warm)


def trl(method: str, steps: int, warm: int) -> dict[str, float]:
  import torch
  import transformers
  from datasets import Dataset
  from tokenizers import Tokenizer, decoders, models, pre_tokenizers
  from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

  torch.set_num_threads(1)
  torch.manual_seed(0)
  texts = pieces()
  words = Tokenizer(
    models.WordLevel({text: i for i, text in enumerate(texts)}, texts[PAD])
  )
  words.pre_tokenizer = pre_tokenizers.Split('|', 'removed')
  words.decoder = decoders.Fuse()
  tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=words,
    pad_token=texts[PAD],
    eos_token=texts[STOP],
    bos_token=texts[BOS],
    padding_side='left',
  )
  model = transformers.Gemma2ForCausalLM(
    transformers.Gemma2Config(
      vocab_size=SHAPE['vocab_size'],
      hidden_size=SHAPE['width'],
      intermediate_size=SHAPE['hidden'],
      num_hidden_layers=SHAPE['layers'],
      num_attention_heads=SHAPE['heads'],
      num_key_value_heads=SHAPE['kv_heads'],
      head_dim=SHAPE['head_dim'],
      query_pre_attn_scalar=SHAPE['head_dim'],
      sliding_window=SHAPE['window'],
      pad_token_id=PAD,
      eos_token_id=STOP,
      bos_token_id=BOS,
    )
  )
  clock = Clock()

  def reward(completions, **_):
    return [judged(text) for text in completions]

  config, trainer = {
    'grpo': (GRPOConfig, GRPOTrainer),
    'rloo': (RLOOConfig, RLOOTrainer),
  }[method]
  draw = sides.ids(256, PROMPT)
  prompts = [
    '|'.join(texts[max(3, i % SHAPE['vocab_size'])] for i in row)
    for row in draw
  ]

  class Step(transformers.TrainerCallback):
    def on_step_begin(self, *args, **kwargs):
      clock.step()

    def on_train_end(self, *args, **kwargs):
      clock.step()

  with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)  # the reference is read from there
    model = transformers.Gemma2ForCausalLM.from_pretrained(folder)
    run = trainer(
      model=model,
      reward_funcs=reward,
      args=config(
        output_dir=folder,
        beta=METHODS[method],
        num_generations=COUNT,
        max_completion_length=NEW,
        per_device_train_batch_size=PROMPTS * COUNT,
        steps_per_generation=1,
        max_steps=warm + steps,
        learning_rate=1e-5,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        logging_strategy='no',
        save_strategy='no',
        report_to='none',
        disable_tqdm=True,
      ),
      train_dataset=Dataset.from_dict({'prompt': prompts}),
      processing_class=tokenizer,
      callbacks=[Step()],
    )
    _clocks(run, clock)
    run.train()
  return clock.result(warm)


def _clocks(trainer, clock: Clock) -> None:
  """Clocks around TRL's methods; what is inside another is counted once."""
  trainer._generate = clock.around('rollout', trainer._generate)
  trainer._calculate_rewards = clock.around(
    'reward', trainer._calculate_rewards
  )
  trainer._get_per_token_logps_and_entropies = _unless_training(
    trainer, clock, trainer._get_per_token_logps_and_entropies
  )
  prepare, step = trainer._prepare_inputs, trainer.training_step
  prepared = [0.0]

  def preparing(*args, **kwargs):
    begin = sides.clock()
    out = prepare(*args, **kwargs)
    prepared[0] += sides.clock()[0] - begin[0]
    return out

  def training(*args, **kwargs):
    begin, prepared[0] = sides.clock(), 0.0
    out = step(*args, **kwargs)
    clock.add('update', (begin[0] + prepared[0], begin[1]))
    return out

  trainer._prepare_inputs, trainer.training_step = preparing, training


def _unless_training(trainer, clock, fn):
  import torch

  timed = clock.around('reference', fn)
  return lambda *args, **kwargs: (
    fn(*args, **kwargs) if torch.is_grad_enabled() else timed(*args, **kwargs)
  )


def measured(side, method, python, args, cache):
  """One measurement in its own process, as JSON."""
  environment = os.environ | {
    'JAX_PLATFORMS': 'cpu',
    'JAX_COMPILATION_CACHE_DIR': cache,
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    'TOKENIZERS_PARALLELISM': 'false',
    'HF_HUB_OFFLINE': '1',
  }
  command = [python, __file__, '--run', side, method]
  command += ['--steps', str(args.steps), '--warm', str(args.warm)]
  done = subprocess.run(
    command, capture_output=True, text=True, env=environment
  )
  if done.returncode:
    sys.exit(f'{side} {method} failed:\n{done.stderr[-4000:]}')
  return json.loads(done.stdout.splitlines()[-1])


def report(results) -> None:
  print(f'\nmilliseconds of CPU per step; {PROMPTS * COUNT} completions')
  columns = ('cpu_s', *PARTS, 'overhead', 'wall_s', 'first_s')
  print(f'{"":12}' + ''.join(f'{name:>11}' for name in columns))
  for (side, method), runs in results.items():
    numbers = [statistics.median(run[name] for run in runs) for name in columns]
    cells = ''.join(f'{1000 * x:11.1f}' for x in numbers)
    print(f'{side} {method:7}{cells}')
  for method in METHODS:
    if ('trl', method) not in results:
      continue
    pairs = zip(results['ours', method], results['trl', method])
    ratios = [theirs['cpu_s'] / mine['cpu_s'] for mine, theirs in pairs]
    low, high = min(ratios), max(ratios)
    print(
      f'trl / ours, {method}: {statistics.median(ratios):.2f} '
      f'({low:.2f} to {high:.2f}), {len(ratios)} pairs; bar 2'
    )


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--trl', help='a Python that has trl')
  parser.add_argument('--pairs', type=int, default=3)
  parser.add_argument('--steps', type=int, default=20)
  parser.add_argument('--warm', type=int, default=3)
  parser.add_argument('--run', nargs=2, help=argparse.SUPPRESS)
  args = parser.parse_args()
  os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
  if args.run:
    side, method = args.run
    begun = time.perf_counter()
    found = {'ours': ours, 'trl': trl}[side](method, args.steps, args.warm)
    print(json.dumps(found | {'whole_s': time.perf_counter() - begun}))
    return
  pythons = {'ours': sys.executable, 'trl': args.trl}
  present = [side for side in pythons if pythons[side]]
  results = {}
  with tempfile.TemporaryDirectory() as cache:
    for pair in range(args.pairs):
      for method in METHODS:
        turn = pair % len(present)
        for side in present[turn:] + present[:turn]:
          found = measured(side, method, pythons[side], args, cache)
          results.setdefault((side, method), []).append(found)
          print(f'{pair + 1} {side} {method}: {found}', file=sys.stderr)
  report(results)


if __name__ == '__main__':
  main()
