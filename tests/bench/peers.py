"""Tokens per CPU-second against transformers and Tunix: same shape and cores.

  python tests/bench/peers.py --transformers PYTHON --tunix PYTHON --pairs 5

PYTHON is an interpreter that has the peer: torch with transformers, or
google-tunix (Python 3.11 or later). A side without one is left out; ours needs
neither. Every measurement is a process of its own, sides take turns, and all
of a pair run on the same cores. What is compared is work per CPU-second (user
and system time of the process), which other load on the machine disturbs
least; wall-clock rates are printed beside it. The first call of everything,
compilation included, is timed apart. Generation counts new tokens over the
whole call, the reading of the prompt included.

The model has the Gemma 2 shape, caps and sandwich norms included, 54.5 M
parameters: 12 layers (6 local, 6 global), width 512, hidden 1536, 8 query and 4
key-value heads of 64, 32768 tokens; 16.8 M of them are the tied embedding, as
large vocabularies are this family's mark. All numbers are float32.
"""

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time

SHAPE = dict(
  vocab_size=32768,
  width=512,
  hidden=1536,
  layers=12,
  heads=8,
  kv_heads=4,
  head_dim=64,
  window=4096,
)
# 37.7 M in the layers, 16.8 M in the embedding, and the norms.
PARAMETERS = 12 * (512 * 64 * 24 + 3 * 512 * 1536 + 4 * 512) + 512 * 32769
SIDES = ('ours', 'transformers', 'tunix')


def clock() -> tuple[float, float]:
  """(CPU seconds of this process, wall seconds)."""
  used = resource.getrusage(resource.RUSAGE_SELF)
  return used.ru_utime + used.ru_stime, time.perf_counter()


def timed(call, repeats: int, tokens: int) -> dict[str, float]:
  """Rates of `call`, which must return when its work is done."""
  cpu, wall = clock()
  call()
  first = [b - a for a, b in zip((cpu, wall), clock())]
  cpu, wall = clock()
  for _ in range(repeats):
    call()
  cpu, wall = (b - a for a, b in zip((cpu, wall), clock()))
  return {
    'per_cpu_s': repeats * tokens / cpu,
    'per_s': repeats * tokens / wall,
    'first_s': first[1],
    'compile_s': max(0.0, first[1] - wall / repeats),
  }


def ids(rows: int, length: int) -> list[list[int]]:
  """The same random tokens on every side, begun by the BOS id."""
  draw = random.Random(0)
  return [
    [2, *(draw.randrange(4, 32000) for _ in range(length - 1))]
    for _ in range(rows)
  ]


def ours_model():
  from alignjax.models.config import Config
  from alignjax.policies import lm

  class Tokens:
    size, pad, stop, illegal = SHAPE['vocab_size'], 0, (), (0,)

  config = Config(
    **SHAPE,
    pattern=('local', 'global'),
    attn_softcap=50.0,
    final_softcap=30.0,
    post_norm=True,
    init_std=0.02,
  )
  return lm.model(config, Tokens)


def ours_train(args) -> dict[str, dict]:
  import jax
  import jax.numpy as jnp

  from alignjax import train
  from alignjax.recipes.sft import sft
  from alignjax.system.optimizer import optimizer

  recipe = sft(ours_model())
  tx = optimizer(1000, lr=1e-4, weight_decay=0.01)
  state = train.init_state(recipe, tx, 0)
  step = jax.jit(train.make_step(recipe, tx), donate_argnums=0)
  rows, length = args.rows, args.length
  batch = {
    'id': jnp.arange(rows),
    'tokens': jnp.asarray(ids(rows, length), jnp.int32),
    'loss_mask': jnp.ones((rows, length), bool),
    'segment': jnp.ones((rows, length), jnp.int32),
    'position': jnp.broadcast_to(jnp.arange(length), (rows, length)),
  }

  def call():
    nonlocal state
    state, metrics = step(state, batch)
    jax.block_until_ready((state, metrics))

  return {'train': timed(call, args.steps, rows * length)}


def ours_generate(args) -> dict[str, dict]:
  import jax
  import jax.numpy as jnp

  from alignjax.policies.sample import sample

  model = ours_model()
  policy = model.policy('policy')
  params = jax.jit(model.init)(jax.random.key(0))

  @jax.jit
  def draw(params, batch):
    weights = policy.view({'policy': params}, batch)
    key = jax.random.key(0)
    return sample(
      policy,
      weights,
      batch,
      key,
      count=1,
      max_new_tokens=args.new,
      greedy=True,
    )

  out = {}
  for rows in args.batches:
    batch = {
      'id': jnp.arange(rows),
      'prompt': jnp.asarray(ids(rows, args.prompt), jnp.int32),
    }

    def call(batch=batch):
      return jax.block_until_ready(draw(params, batch))

    out[f'generate {rows}'] = timed(call, args.repeats, rows * args.new)
    assert bool(call()['mask'].all())
  return out


def transformers_model():
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
    # sdpa has no soft cap and is refused for this family.
    attn_implementation='eager',
    pad_token_id=0,
    eos_token_id=None,
    bos_token_id=2,
  )
  return Gemma2ForCausalLM(config)


def transformers_train(args) -> dict[str, dict]:
  import torch

  model = transformers_model()
  # The fused update is torch's fastest on a CPU.
  optimizer = torch.optim.AdamW(
    model.parameters(), lr=1e-4, weight_decay=0.01, fused=True
  )
  tokens = torch.tensor(ids(args.rows, args.length))

  def call():
    loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()

  return {'train': timed(call, args.steps, args.rows * args.length)}


def transformers_generate(args) -> dict[str, dict]:
  import torch

  model = transformers_model().eval()
  out = {}
  for rows in args.batches:
    prompt = torch.tensor(ids(rows, args.prompt))

    def call(prompt=prompt):
      with torch.inference_mode():
        return model.generate(
          prompt,
          attention_mask=torch.ones_like(prompt),
          do_sample=False,
          use_cache=True,
          max_new_tokens=args.new,
          min_new_tokens=args.new,
        )

    out[f'generate {rows}'] = timed(call, args.repeats, rows * args.new)
    assert call().shape[1] == args.prompt + args.new
  return out


def tunix_model():
  from flax import nnx
  from tunix.models.gemma import model as gemma

  kinds = (gemma.AttentionType.LOCAL_SLIDING, gemma.AttentionType.GLOBAL)
  config = gemma.ModelConfig(
    num_layers=SHAPE['layers'],
    num_embed=SHAPE['vocab_size'],
    embed_dim=SHAPE['width'],
    hidden_dim=SHAPE['hidden'],
    num_heads=SHAPE['heads'],
    head_dim=SHAPE['head_dim'],
    num_kv_heads=SHAPE['kv_heads'],
    final_logit_softcap=30.0,
    use_post_attn_norm=True,
    use_post_ffw_norm=True,
    attention_types=kinds * (SHAPE['layers'] // 2),
    attn_logits_soft_cap=50.0,
    sliding_window_size=SHAPE['window'],
    remat_config=gemma.RematConfig.NONE,
  )
  return gemma.Gemma(config, rngs=nnx.Rngs(params=0)), config


def tunix_train(args) -> dict[str, dict]:
  import jax
  import jax.numpy as jnp
  import optax
  from flax import nnx
  from tunix.sft import utils
  from tunix.sft.peft_trainer import _default_loss_fn

  model, _ = tunix_model()
  tx = optax.chain(
    optax.clip_by_global_norm(1.0), optax.adamw(1e-4, weight_decay=0.01)
  )
  optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
  tokens = jnp.asarray(ids(args.rows, args.length), jnp.int32)
  mask = jnp.ones(tokens.shape, bool)
  positions = utils.build_positions_from_mask(mask)
  attention_mask = utils.make_causal_attn_mask(mask)

  def step(model, optimizer):
    loss, grads = nnx.value_and_grad(_default_loss_fn)(
      model, tokens, mask, positions, attention_mask
    )
    optimizer.update(model, grads)
    return loss

  # Its trainer's own way: donated, and the graph is looked at once.
  step = nnx.cached_partial(
    nnx.jit(step, donate_argnums=(0, 1)), model, optimizer
  )

  def call():
    loss = step()
    jax.block_until_ready((loss, nnx.state(model)))

  return {'train': timed(call, args.steps, args.rows * args.length)}


def tunix_generate(args) -> dict[str, dict]:
  from tunix.generate import sampler as sampling

  class Tokens:
    """A prompt's text is its row number."""

    rows = ids(max(args.batches), args.prompt)

    def encode(self, text):
      return self.rows[int(text)][1:]

    def decode(self, tokens):
      return str(len(tokens))

    def bos_id(self):
      return 2

    def eos_id(self):
      return -1  # never ends

    def pad_id(self):
      return 0

  model, config = tunix_model()
  sampler = sampling.Sampler(
    model,
    Tokens(),
    sampling.CacheConfig(
      cache_size=args.prompt + args.new,
      num_layers=config.num_layers,
      num_kv_heads=config.num_kv_heads,
      head_dim=config.head_dim,
    ),
  )
  out = {}
  for rows in args.batches:

    def call(rows=rows):
      return sampler(
        [str(i) for i in range(rows)],
        max_generation_steps=args.new,
        max_prompt_length=args.prompt,
      )

    out[f'generate {rows}'] = timed(call, args.repeats, rows * args.new)
    assert {len(tokens) for tokens in call().tokens} == {args.new}
  return out


def stream() -> float:
  """Bytes per second that one core reads from memory: the best of 7 sweeps."""
  import numpy as np

  x = np.ones(2**26, np.float32)  # 256 MB, far beyond any cache
  y = np.ones(2**26, np.float32)
  best = 0.0
  for _ in range(7):
    begun = time.perf_counter()
    np.dot(x, y)
    best = max(best, 2 * x.nbytes / (time.perf_counter() - begun))
  return best


def measured(side: str, what: str, pythons, args, cache: str):
  """One measurement in its own process, as JSON."""
  environment = os.environ | {
    'JAX_PLATFORMS': 'cpu',
    'JAX_COMPILATION_CACHE_DIR': f'{cache}/{side}',
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
  }
  if side == 'stream':
    environment |= {'OPENBLAS_NUM_THREADS': '1', 'OMP_NUM_THREADS': '1'}
  command = [pythons[side], __file__, '--side', side, '--what', what]
  for name in ('rows', 'length', 'steps', 'prompt', 'new', 'repeats', 'cores'):
    command += [f'--{name}', str(getattr(args, name))]
  command += ['--batches', *map(str, args.batches)]
  done = subprocess.run(
    command, capture_output=True, text=True, env=environment
  )
  if done.returncode:
    sys.exit(f'{side} {what} failed:\n{done.stderr[-4000:]}')
  return json.loads(done.stdout.splitlines()[-1])


def middle(values) -> str:
  """Median, and the range."""
  low, high = min(values), max(values)
  return f'{statistics.median(values):.1f} ({low:.1f} to {high:.1f})'


def report(results, bandwidths) -> None:
  """Prints a line per side and measurement, then our ratios."""
  names = list(dict.fromkeys(name for _, name in results))
  sides = [s for s in SIDES if any(s == side for side, _ in results)]
  for name in names:
    print(f'\n{name}')
    for side in sides:
      runs = results[side, name]
      rates = [r['per_cpu_s'] for r in runs]
      walls = statistics.median(r['per_s'] for r in runs)
      compiled = [r['compile_s'] for r in runs]
      line = (
        f'  {side:13} {middle(rates)} tokens per CPU-second; {walls:.1f} per'
        f' second; compile {compiled[0]:.1f} s'
      )
      if len(compiled) > 1 and side != 'transformers':
        line += f', from the cache {statistics.median(compiled[1:]):.1f} s'
      if name == 'generate 1' and bandwidths:
        share = 4 * PARAMETERS * statistics.median(rates)
        share /= statistics.median(bandwidths)
        line += f"; {share:.0%} of a core's memory bandwidth"
      print(line)
    for side in sides:
      if side == 'ours' or 'ours' not in sides:
        continue
      ratios = [
        a['per_cpu_s'] / b['per_cpu_s']
        for a, b in zip(results['ours', name], results[side, name])
      ]
      print(f'  ours / {side}: {middle(ratios)}, {len(ratios)} pairs')
  if bandwidths:
    giga = [x / 1e9 for x in bandwidths]
    print(f'\none core reads {middle(giga)} GB/s')


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--transformers', help='a Python that has transformers')
  parser.add_argument('--tunix', help='a Python that has google-tunix')
  parser.add_argument('--pairs', type=int, default=5)
  parser.add_argument('--sides', nargs='+', choices=SIDES, default=SIDES)
  parser.add_argument(
    '--what',
    nargs='+',
    choices=['train', 'generate', 'stream'],
    default=['train', 'generate'],
  )
  parser.add_argument('--rows', type=int, default=4, help='training batch')
  parser.add_argument('--length', type=int, default=256)
  parser.add_argument('--steps', type=int, default=10)
  parser.add_argument('--batches', type=int, nargs='+', default=[1, 8, 32])
  parser.add_argument('--prompt', type=int, default=64)
  parser.add_argument('--new', type=int, default=128)
  parser.add_argument('--repeats', type=int, default=3)
  parser.add_argument('--cores', type=int, default=0, help='0: all')
  parser.add_argument('--json', help='file for every number')
  parser.add_argument('--side', help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.cores:
    allowed = sorted(os.sched_getaffinity(0))[: args.cores]
    os.sched_setaffinity(0, allowed)
  if args.side == 'stream':
    print(json.dumps(stream()))
    return
  if args.side:
    side = globals()[f'{args.side}_{args.what[0]}']
    print(json.dumps(side(args)))
    return

  pythons = {
    'ours': sys.executable,
    'stream': sys.executable,
    'transformers': args.transformers,
    'tunix': args.tunix,
  }
  sides = [side for side in args.sides if pythons[side]]
  results, bandwidths = {}, []
  with tempfile.TemporaryDirectory() as cache:
    for pair in range(args.pairs):
      if 'generate' in args.what and 1 in args.batches:
        bandwidths.append(measured('stream', 'stream', pythons, args, cache))
      for what in args.what:
        # Who goes first changes, so that a drift of the machine favours none.
        turn = pair % len(sides)
        for side in sides[turn:] + sides[:turn]:
          found = measured(side, what, pythons, args, cache)
          for name, rates in found.items():
            results.setdefault((side, name), []).append(rates)
            print(f'{pair + 1} {side} {name}: {rates}', file=sys.stderr)
  report(results, bandwidths)
  if args.json:
    numbers = {f'{side}/{name}': runs for (side, name), runs in results.items()}
    with open(args.json, 'w') as file:
      json.dump(numbers | {'stream': bandwidths}, file, indent=1)


if __name__ == '__main__':
  main()
