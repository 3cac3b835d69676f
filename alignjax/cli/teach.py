"""`alignjax teach`: what a teacher says about the rows of a source, on disk.

Reads the config of a run with a teacher in the step, and writes what that run
would have computed: `targets`, `k` and `draw_seed` are the recipe's. The same
command goes on where it was stopped, and does nothing where all is written.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alignjax.cli import config as configs
from alignjax.cli import console
from alignjax.core.errors import UserError


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog='alignjax teach',
    description="Run a teacher over a source's rows, once, and write ids and "
    'probabilities for each position with a loss (ArrayRecord). Train on them '
    "with the recipe 'distill.recorded' and the source 'teacher.recorded'. The "
    'same command continues.',
    allow_abbrev=False,
  )
  parser.add_argument(
    '--config',
    required=True,
    metavar='F',
    help="of a run of the recipe 'distill': sections tokenizer, source, "
    'teacher, recipe, mesh, batch_size',
  )
  parser.add_argument('--out', required=True, type=Path, metavar='DIR')
  parser.add_argument(
    '--shard_rows',
    type=int,
    default=256,
    metavar='N',
    help='rows per file, the work that a kill can cost (%(default)s)',
  )
  return parser


def main(argv: Sequence[str]) -> int:
  """Exit code; raises UserError for bad input."""
  arguments, rest = _parser().parse_known_args(list(argv))
  loaded, _, rest = configs.load(['--config', arguments.config, *rest])
  config: Any = loaded
  if rest:
    raise UserError(f'unknown argument {rest[0]!r}; `alignjax teach --help`')
  if arguments.shard_rows < 1:
    raise UserError(
      f'--shard_rows: found {arguments.shard_rows}, expected >= 1'
    )
  recipe: Any = config.get('recipe') or {}
  if 'draw_seed' not in recipe or 'k' not in recipe:
    raise UserError(
      f'recipe: {recipe.get("name")!r} says no targets, k and draw_seed; '
      "`alignjax teach` takes the config of a run of the recipe 'distill'"
    )
  if recipe.targets == 'full':
    raise UserError(
      "recipe.targets = 'full': a whole distribution per position is not "
      "written down; set 'top_k', 'counts' or 'distinct'"
    )
  if not (config.get('teacher') or {}).get('path'):
    raise UserError('teacher.path: expected the model to write down')
  _teach(config, arguments.out, arguments.shard_rows)
  return console.OK


def _teach(config: Any, out: Path, shard_rows: int) -> None:
  from alignjax.cli import parts
  from alignjax.core import lookup
  from alignjax.data import teacher as records
  from alignjax.losses import teacher as teachers
  from alignjax.models import sharding
  from alignjax.system import mesh as meshes
  from alignjax.system.progress import progress
  from alignjax.system.rows import to_mesh

  tokens = parts.tokenizer(config.tokenizer)
  mesh = meshes.make(dict(config.mesh))
  meshes.check_rows(mesh, config.batch_size, 1)
  shape = parts.teacher_config(config, tokens)
  numbers = {name: config.recipe[name] for name in ('k', 'draw_seed')}
  kind = config.recipe.targets
  teachers.check(kind, numbers['k'], config.recipe.normaliser)
  if kind == 'top_k' and numbers['k'] > tokens.size:
    raise UserError(
      f'recipe.k = {numbers["k"]} is more than the {tokens.size} ids that the '
      'tokenizer has'
    )
  source = lookup.build(
    'data', config.source, tokens, config.batch_size, config.seed
  )
  found = parts.opened(config.teacher.path, shape, 'teacher.path')
  about = numbers | {'targets': kind, 'teacher': parts.digest(found)}
  params = parts.load_params(found, shape, mesh)
  places = meshes.shardings(params, sharding.TABLE, mesh)
  bundle = {'teacher': meshes.put(params, places)}
  policy = parts.language_model(shape, tokens).policy('teacher')
  said = teachers.writer(policy, kind=kind, **numbers)
  with (
    meshes.current(mesh),
    progress(f'teach {out.name}', len(source)) as advance,
  ):
    records.write(
      out,
      source,
      tokens,
      about,
      lambda batch: said(bundle, to_mesh(batch, meshes.rows(mesh))),
      shard_rows=shard_rows,
      advance=advance,
    )


if __name__ == '__main__':
  raise SystemExit(console.call('teach', main))
