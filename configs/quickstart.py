"""WARP with J-BOND on Python's own standard library: the whole path in minutes.

COMMAND: alignjax run --config=configs/quickstart.py --workdir=runs/quickstart

Tokenizer -> pretraining of a small Gemma-2-shaped model -> two J-BOND runs
that differ in their prompts' order -> angles and norms of their task vectors
-> SLERP of the two -> LITI back to the start -> evaluation of everything ->
report.html. The reward is how far Python's own parser accepts the completion.

Use other text with --config.source.path= (a directory, a text file or JSONL);
the variant `:tiny` does the same path in about a minute.
"""

from ml_collections import ConfigDict

from alignjax.cloud.jobs import Job
from alignjax.core.lookup import defaults

VARIANTS = {'': 1.0, 'tiny': 0.1}


def get_config(variant: str = '') -> ConfigDict:
  tiny = variant == 'tiny'
  c = ConfigDict()
  c.seed = 0
  # What is read. '' is the standard library of this Python.
  c.source = ConfigDict(
    dict(path='', field='text', pattern='*.py', max_bytes=6_000_000)
  )
  c.vocab_size = 1536
  c.model = defaults(
    'models',
    'gemma',
    family='gemma2',
    vocab_size=c.vocab_size,
    width=128 if tiny else 160,
    hidden=256 if tiny else 384,
    layers=2 if tiny else 4,
    heads=4,
    kv_heads=2,
    head_dim=32 if tiny else 40,
    window=32,
    init_std=0.02,
    unroll=2,
  )

  # The start: next-token prediction until it writes recognisable Python.
  c.pretrain = run(steps=100 if tiny else 1000, batch_size=8)
  c.pretrain.save_every = 50 if tiny else 200
  c.pretrain.length = 128
  c.pretrain.recipe = defaults('recipes', 'sft')
  c.pretrain.optimizer = defaults(
    'system',
    'optimizer',
    lr=3e-3,
    schedule='cosine',
    warmup_steps=50,
    final_lr=3e-4,
    weight_decay=0.05,
  )

  # Alignment: M runs from one start.
  c.runs = 2
  c.align = run(steps=8 if tiny else 100, batch_size=16 if tiny else 32)
  c.align.save_every = 4 if tiny else 20
  c.align.log_every = 1
  c.align.prompt_tokens = 32
  c.align.recipe = defaults(
    'recipes',
    'jbond',
    ema_rate=0.05,
    temperature=0.8,
    max_new_tokens=24 if tiny else 40,
  )
  c.align.reward = defaults('rewards', 'verify.python_code')
  c.align.optimizer = defaults(
    'system',
    'optimizer',
    lr=1e-3,
    schedule='linear',
    final_lr=1e-4,
    warmup_steps=2 if tiny else 10,
  )

  c.liti_rates = (0.1, 0.2, 0.3, 0.5, 0.7, 0.85, 1.0)
  c.evaluate = ConfigDict(
    dict(
      prompts=32 if tiny else 128,
      responses=4,
      reference_responses=8,
      batch_size=32,
      temperature=c.align.recipe.temperature,
      max_new_tokens=c.align.recipe.max_new_tokens,
      samples=4 if tiny else 8,
    )
  )
  return c


def run(steps: int, batch_size: int) -> ConfigDict:
  """The numbers of one training run."""
  return ConfigDict(
    dict(
      steps=steps,
      batch_size=batch_size,
      microbatches=1,
      log_every=10,
      save_every=100,
      keep=2,
      max_bad_steps=5,
      verify_every=0,
    )
  )


def jobs(c: ConfigDict):
  """The graph: what each command reads and writes."""
  source = c.source.to_dict()
  yield Job(
    'tokenizer', 'tokenizer', {'source': source, 'vocab_size': c.vocab_size}
  )
  shared = {
    'tokenizer': '@tokenizer/tokenizer.model',
    'model': c.model.to_dict(),
    'mesh': {'data': -1},
  }

  pretrain = c.pretrain.to_dict()
  length = pretrain.pop('length')
  yield Job(
    'pretrain',
    'train',
    shared
    | pretrain
    | {
      'seed': c.seed,
      'source': {'name': 'sources.text', 'length': length, **source},
      'start': {},
    },
    needs=('tokenizer',),
  )

  align = c.align.to_dict()
  prompts = {
    'name': 'sources.prompts',
    'prompt_tokens': align.pop('prompt_tokens'),
    **source,
  }
  runs = [f'align_{m}' for m in range(1, c.runs + 1)]
  for m, name in enumerate(runs, start=1):
    yield Job(
      name,
      'train',
      shared
      | align
      | {
        'seed': c.seed + m,
        'source': prompts,
        'start': {'policy': '@pretrain/model'},
      },
      needs=('tokenizer', 'pretrain'),
    )

  models = [f'@{name}/model' for name in runs]
  base = {'base': '@pretrain/model'}
  yield Job(
    'geometry',
    'inspect',
    base | {'models': models},
    needs=('pretrain', *runs),
  )
  yield Job(
    'slerp',
    'merge',
    base | {'method': 'slerp', 'models': models, 't': 0.5},
    needs=('pretrain', *runs),
  )
  yield Job(
    'lerp',
    'merge',
    base | {'method': 'linear', 'models': models},
    needs=('pretrain', *runs),
  )
  yield Job(
    'liti',
    'merge',
    base
    | {
      'method': 'liti',
      'models': ['@slerp/model'],
      'liti_rate': list(c.liti_rates[:-1]),
    },
    needs=('pretrain', 'slerp'),
  )

  compared = [{'name': 'init', 'kind': 'init', 'path': '@pretrain/model'}]
  for name in runs:
    compared += [
      {'name': name, 'kind': 'run', 'path': f'@{name}/model'},
      {
        'name': f'{name} anchor',
        'kind': 'anchor',
        'path': f'@{name}/model_anchor',
      },
    ]
  compared += [
    {'name': 'slerp', 'kind': 'slerp', 'path': '@slerp/model'},
    {'name': 'lerp', 'kind': 'lerp', 'path': '@lerp/model'},
  ]
  for rate in c.liti_rates:
    last = rate == 1.0
    compared.append(
      {
        'name': f'liti {rate:g}',
        'kind': 'liti',
        'liti_rate': rate,
        'path': '@slerp/model' if last else f'@liti/liti_{rate:.2f}',
      }
    )
  yield Job(
    'evaluate',
    'evaluate',
    shared
    | c.evaluate.to_dict()
    | {
      'seed': c.seed,
      'source': prompts | {'part': 'held_out'},
      'reward': align['reward'],
      'models': compared,
      'reference': 'init',
    },
    needs=('tokenizer', 'pretrain', *runs, 'slerp', 'lerp', 'liti'),
  )
  yield Job(
    'report',
    'report',
    {},
    needs=('evaluate', 'geometry', 'pretrain', *runs),
  )
