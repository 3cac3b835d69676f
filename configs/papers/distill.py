"""Distillation from a larger teacher: Gemma 2's, and Gemma 3's 256 ids.

COMMAND: alignjax run --config=configs/papers/distill.py --workdir=runs/distill
  --config.teacher.path=TEACHER --config.tokenizer=TOKENIZER

Students of two sizes, each from scratch on next tokens, on the teacher's whole
distribution, and on 256 ids that it draws a position: same init, rows, order
and number of steps. The report draws perplexity on held-out text against size.
Expected (arXiv 2408.00118, tables 7 and 8): distilled students below those from
scratch, by about as much at every size. The teacher must not have seen the
held-out share: take the model of the quickstart, whose source this is. What it
gave is in docs/papers.md; half an hour on one core. `:tiny` is the same path in
two minutes.

One run, from a model, is `alignjax train` with the same config and
--config.start.policy=MODEL; the teacher may be of another size, family and file
format. `--config.recipe.targets=counts` takes 256 ids a position in place of
the whole distribution; distill_recorded.py reads them from disk.
"""

from ml_collections import ConfigDict

from alignjax.cloud.jobs import Job
from alignjax.core.lookup import defaults
from configs import base

VARIANTS = ('', 'tiny')


def get_config(variant: str = '') -> ConfigDict:
  tiny = variant == 'tiny'
  recipe = defaults('recipes', 'distill')
  c = base.single(recipe, steps=20 if tiny else 1000, batch_size=8, lr=3e-3)
  c.optimizer.update(schedule='cosine', final_lr=3e-4, weight_decay=0.05)
  c.log_every, c.save_every = 10, 200
  c.source = defaults('data', 'sources.text', length=128)
  c.teacher = ConfigDict({'path': '', 'tokenizer': ''})
  # Rows of the embedding: as many as the tokenizer has ids, or more.
  student = defaults('models', 'gemma', family='gemma2', vocab_size=1536)
  student.update(layers=4, heads=4, kv_heads=2, window=32, init_std=0.02)
  c.graph = ConfigDict(dict(student=student, seeds=1 if tiny else 3))
  c.graph.widths = (32,) if tiny else (48, 96)
  return c


def jobs(c: ConfigDict):
  """The graph: what each command reads and writes."""
  arms = {
    'scratch': {'recipe': defaults('recipes', 'sft').to_dict()},
    'distilled': {'recipe': c.recipe.to_dict()},
    'distilled_256': {
      'recipe': c.recipe.to_dict() | {'targets': 'counts', 'k': 256}
    },
  }
  models = [base.model('teacher', 'teacher', c.teacher.path)]
  for arm, changes in arms.items():
    for width in c.graph.widths:
      for seed in range(1, c.graph.seeds + 1):
        name = f'{arm}_{width}_{seed}'
        yield base.train(
          c,
          name,
          seed=c.seed + seed,
          start={},
          model=_student(c, width),
          **changes,
        )
        models.append(base.model(name, 'run', f'@{name}', series=arm))
  numbers = c.to_dict()
  yield Job(
    'perplexity',
    'perplexity',
    {field: numbers[field] for field in ('tokenizer', 'mesh', 'seed')}
    | {
      'batch_size': 32,
      'source': numbers['source'] | {'part': 'held_out'},
      'models': models,
      'reference': 'teacher',
    },
    tuple(model['name'] for model in models[1:]),
  )
  yield base.report('perplexity')


def _student(c: ConfigDict, width: int) -> dict:
  shape = c.graph.student.to_dict()
  head = width // shape['heads']
  return shape | {'width': width, 'hidden': 5 * width // 2, 'head_dim': head}
