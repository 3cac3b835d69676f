"""The sides of `peers.py`: the same work done by us, transformers and Tunix.

A side is run by its own interpreter and imports only its own library, inside
the function that needs it. Prompts, batches, shape and optimizer are the same.
"""

import os
import random
import resource
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

  from alignjax.recipes.sft import sft
  from alignjax.step import init_state, make_step
  from alignjax.system.optimizer import optimizer

  recipe = sft(ours_model())
  tx = optimizer(1000, lr=1e-4, weight_decay=0.01)
  state = init_state(recipe, tx, 0)
  step = jax.jit(make_step(recipe, tx), donate_argnums=0)
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
  # Weights are laid out for decoding when a model is loaded, as `sample --chat`
  # does it; peers load into their own layouts as well.
  weights = jax.block_until_ready(
    jax.jit(lambda params: policy.view({'policy': params}, {}))(params)
  )

  @jax.jit
  def draw(weights, batch):
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
      return jax.block_until_ready(draw(weights, batch))

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


def ours_stream(args) -> float:
  """Bytes per second that one core reads from memory: the best of 7 sweeps."""
  del args
  import numpy as np

  x = np.ones(2**26, np.float32)  # 256 MB, far beyond any cache
  y = np.ones(2**26, np.float32)
  best = 0.0
  for _ in range(7):
    begun = time.perf_counter()
    np.dot(x, y)
    best = max(best, 2 * x.nbytes / (time.perf_counter() - begun))
  return best
