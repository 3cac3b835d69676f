"""Guidance distilled, with a reward for diversity, and LERP (2410.06084).

COMMAND: alignjax run --config=configs/papers/cfg_distill.py
  --workdir=runs/cfg_distill --config.policy=MODEL --config.tokenizer=TOKENIZER

embed -> for each seed a run without and one with the diversity reward -> LERP
between the two -> evaluate -> report. Everything is measured against the start
under guidance, which is the teacher: KL to it is what distillation lowers, and
diversity is what guidance costs and the reward gives back. The paper's figure
is the line of LERP in those two. guidance_scale and diversity_coef are the
paper's; its models write music, these code. What it gave is in docs/papers.md;
ten minutes on one core with the model of the quickstart. `:tiny` is the same
path with a few steps.
"""

from ml_collections import ConfigDict

from alignjax.cloud.jobs import Job
from alignjax.core.lookup import defaults
from configs.base import online, single

EXTRA = 'policy embed diversity_coefs lerp seeds prompts'.split()

VARIANTS = ('', 'tiny')


def get_config(variant: str = '') -> ConfigDict:
  tiny = variant == 'tiny'
  length = 16 if tiny else 40
  recipe = defaults('recipes', 'cfg_distill', max_new_tokens=length)
  c = online(recipe, steps=3 if tiny else 100, lr=1e-4)
  c.policy = ''
  c.batch_size = 8 if tiny else 16
  c.source.max_bytes = 1_000_000 if tiny else 6_000_000
  c.source.uncond = ''  # no negative prompt but the beginning of a text
  c.diversity_coefs = (0.0, 15.0)  # the ends of the line
  c.lerp = (0.5,) if tiny else (0.25, 0.5, 0.75)
  c.seeds = 1 if tiny else 3
  c.prompts = 16 if tiny else 256
  c.embed = single(
    defaults('recipes', 'embed'),
    steps=10 if tiny else 200,
    batch_size=2 if tiny else 4,
    lr=1e-3,
  )
  c.embed.source = defaults(
    'data', 'segments', length=length, max_bytes=c.source.max_bytes
  )
  return c


def jobs(c: ConfigDict):
  """The graph: what each command reads and writes."""
  shared = {'tokenizer': c.tokenizer, 'model': c.model.to_dict()}
  yield Job(
    'embed',
    'train',
    c.embed.to_dict() | shared | {'start': {'policy': c.policy}},
  )
  embedding = {'embedding': {'path': '@embed/model', 'tokenizer': ''}}
  numbers = c.to_dict()
  for name in EXTRA:
    numbers.pop(name)
  models = [
    {'name': 'init', 'kind': 'init', 'path': c.policy}
    | {'guidance_scale': c.recipe.guidance_scale},
    {'name': 'unguided', 'kind': 'unguided', 'path': c.policy},
  ]
  done = ['embed']
  for seed in range(1, c.seeds + 1):
    ends = []
    for coef in c.diversity_coefs:
      run = f'coef_{coef:g}_{seed}'.replace('.', '_')
      recipe = c.recipe.to_dict() | {'diversity_coef': coef}
      yield Job(
        run,
        'train',
        numbers
        | shared
        | embedding
        | {
          'start': {'policy': c.policy, 'teacher': '@policy'},
          'recipe': recipe,
          'seed': c.seed + seed,
        },
        needs=('embed',),
      )
      ends.append(run)
      models.append(
        {'name': run, 'kind': 'run', 'path': f'@{run}/model'}
        | {'series': f'coefficient {coef:g}'}
      )
    merged = f'lerp_{seed}'
    yield Job(
      merged,
      'merge',
      {
        'method': 'lerp',
        'base': c.policy,
        'models': [f'@{run}/model' for run in (ends[0], ends[-1])],
        't': list(c.lerp),
      },
      needs=tuple(ends),
    )
    for t in c.lerp:
      name, path = f'{merged} {t:g}', f'@{merged}/t_{t:.2f}'
      models.append(
        {'name': name, 'kind': 'lerp', 'path': path}
        | {'series': 'LERP', 'numbers': {'t': t}}
      )
    done += [*ends, merged]
  yield Job(
    'evaluate',
    'evaluate',
    shared
    | embedding
    | {
      'start': {'policy': c.policy},
      'mesh': {'data': -1},
      'seed': c.seed,
      'source': c.source.to_dict() | {'part': 'held_out', 'held_out': 0.3},
      'reward': c.reward.to_dict(),
      'prompts': c.prompts,
      'responses': 4,
      'reference_responses': 4,
      'batch_size': min(c.prompts, 32),
      'temperature': c.recipe.temperature,
      'max_new_tokens': c.recipe.max_new_tokens,
      'samples': 4,
      'models': models,
      'reference': 'init',
    },
    needs=tuple(done),
  )
  yield Job('report', 'report', {}, needs=('evaluate', *done))
