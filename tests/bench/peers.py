"""Tokens per second against `transformers`: same shape, batch and cores.

  python tests/bench/peers.py --peer-python /path/to/python-with-transformers

Runs the two sides in turn, each in its own process on the same cores, and
prints medians and ratios. Compilation is timed apart. The peer's Python needs
torch and transformers; ours needs neither.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

SHAPE = dict(
  vocab_size=1536,
  width=160,
  hidden=384,
  layers=4,
  heads=4,
  kv_heads=2,
  head_dim=40,
  window=32,
)
TRAIN = dict(batch=8, length=128, steps=20)
SAMPLE = dict(batch=96, prompt=32, new=40, repeats=5)


def ours():
  import jax
  import jax.numpy as jnp

  from alignjax import train
  from alignjax.models.gemma import gemma
  from alignjax.policies import lm
  from alignjax.policies.sample import sample
  from alignjax.recipes.sft import sft
  from alignjax.system.optimizer import optimizer

  class Tokens:
    size, pad, stop, illegal = SHAPE['vocab_size'], 0, (), (0,)

  model = lm.model(gemma(**SHAPE, unroll=2), Tokens)
  recipe, tx = sft(model), optimizer(1000)
  state = train.init_state(recipe, tx, 0)
  step = jax.jit(train.make_step(recipe, tx), donate_argnums=0)
  rows, length = TRAIN['batch'], TRAIN['length']
  tokens = jax.random.randint(jax.random.key(0), (rows, length), 4, 1500)
  batch = {
    'id': jnp.arange(rows),
    'tokens': tokens,
    'loss_mask': jnp.ones((rows, length), bool),
    'segment': jnp.ones((rows, length), jnp.int32),
    'position': jnp.broadcast_to(jnp.arange(length), (rows, length)),
  }
  begun = time.perf_counter()
  state, metrics = jax.block_until_ready(step(state, batch))
  compiled = time.perf_counter() - begun
  begun = time.perf_counter()
  for _ in range(TRAIN['steps']):
    state, metrics = step(state, batch)
  jax.block_until_ready(state)
  trained = rows * length * TRAIN['steps'] / (time.perf_counter() - begun)

  policy = model.policy('policy')
  prompts = jax.random.randint(
    jax.random.key(1), (SAMPLE['batch'], SAMPLE['prompt']), 4, 1500
  )
  batch = {'id': jnp.arange(SAMPLE['batch']), 'prompt': prompts}

  @jax.jit
  def draw(params, key):
    weights = policy.view({'policy': params}, batch)
    return sample(
      policy, weights, batch, key, count=1, max_new_tokens=SAMPLE['new']
    )

  params = state.params['policy']
  jax.block_until_ready(draw(params, jax.random.key(0)))
  begun = time.perf_counter()
  for i in range(SAMPLE['repeats']):
    jax.block_until_ready(draw(params, jax.random.key(i)))
  seconds = (time.perf_counter() - begun) / SAMPLE['repeats']
  sampled = SAMPLE['batch'] * SAMPLE['new'] / seconds
  return {'train': trained, 'sample': sampled, 'compile_s': compiled}


def peer():
  import torch
  from transformers import Gemma2Config, Gemma2ForCausalLM

  torch.set_num_threads(len(os.sched_getaffinity(0)))
  config = Gemma2Config(
    vocab_size=SHAPE['vocab_size'],
    hidden_size=SHAPE['width'],
    intermediate_size=SHAPE['hidden'],
    num_hidden_layers=SHAPE['layers'],
    num_attention_heads=SHAPE['heads'],
    num_key_value_heads=SHAPE['kv_heads'],
    head_dim=SHAPE['head_dim'],
    query_pre_attn_scalar=SHAPE['head_dim'],
    sliding_window=SHAPE['window'],
    attn_implementation='eager',  # what it defaults to, for the soft cap
    pad_token_id=0,
    eos_token_id=None,
    bos_token_id=2,
  )
  model = Gemma2ForCausalLM(config)
  optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
  rows, length = TRAIN['batch'], TRAIN['length']
  tokens = torch.randint(4, 1500, (rows, length))

  def step():
    loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()

  for _ in range(3):
    step()
  begun = time.perf_counter()
  for _ in range(TRAIN['steps']):
    step()
  trained = rows * length * TRAIN['steps'] / (time.perf_counter() - begun)

  prompts = torch.randint(4, 1500, (SAMPLE['batch'], SAMPLE['prompt']))

  def draw():
    with torch.no_grad():
      return model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=True,
        top_k=0,
        max_new_tokens=SAMPLE['new'],
        min_new_tokens=SAMPLE['new'],
      )

  assert draw().shape[1] == SAMPLE['prompt'] + SAMPLE['new']
  begun = time.perf_counter()
  for _ in range(SAMPLE['repeats']):
    draw()
  seconds = (time.perf_counter() - begun) / SAMPLE['repeats']
  sampled = SAMPLE['batch'] * SAMPLE['new'] / seconds
  return {'train': trained, 'sample': sampled}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--peer-python')
  parser.add_argument('--side', choices=['ours', 'peer'])
  parser.add_argument('--pairs', type=int, default=5)
  args = parser.parse_args()
  if args.side:
    print(json.dumps({'ours': ours, 'peer': peer}[args.side]()))
    return
  if not args.peer_python:
    parser.error('--peer-python is needed')
  results = {'ours': [], 'peer': []}
  for _ in range(args.pairs):
    for side, python in (('ours', sys.executable), ('peer', args.peer_python)):
      command = [python, __file__, '--side', side]
      out = subprocess.run(command, capture_output=True, text=True, check=True)
      results[side].append(json.loads(out.stdout.splitlines()[-1]))
  for what in ('train', 'sample'):
    mine, theirs = ([r[what] for r in results[s]] for s in ('ours', 'peer'))
    ratios = [a / b for a, b in zip(mine, theirs)]
    print(
      f'{what}: {statistics.median(mine):,.0f} tokens/s against '
      f'{statistics.median(theirs):,.0f}; ratio {statistics.median(ratios):.2f}'
      f' ({min(ratios):.2f} to {max(ratios):.2f}), {args.pairs} pairs'
    )
  compiled = statistics.median(r['compile_s'] for r in results['ours'])
  print(f'compilation of our training step: {compiled:.1f} s')


if __name__ == '__main__':
  main()
