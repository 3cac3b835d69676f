"""`alignjax train`: one training run; starting it again continues it."""

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alignjax.cli import config as configs
from alignjax.cli import console
from alignjax.core import files
from alignjax.core.types import UserError


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog='alignjax train',
    description='One training run. The same command continues where it '
    'stopped, bit for bit. Ctrl-C and SIGTERM finish the step, save and '
    'exit 75.',
    allow_abbrev=False,
  )
  parser.add_argument(
    '--config',
    required=True,
    metavar='F',
    help='config program or resolved JSON; --config.a.b=value sets a field',
  )
  parser.add_argument('--workdir', required=True, type=Path, metavar='W')
  parser.add_argument(
    '--fallback',
    action='store_true',
    help='if the newest checkpoint is damaged, go on from the one before',
  )
  return parser


def main(argv: Sequence[str]) -> int:
  """Returns 0 when the run is complete, 75 when it was interrupted."""
  arguments, rest = _parser().parse_known_args(list(argv))
  config, _, rest = configs.load(['--config', arguments.config, *rest])
  if rest:
    raise UserError(f'unknown argument {rest[0]!r}; `alignjax train --help`')
  workdir = arguments.workdir
  _claim(workdir, config)
  return _train(config, workdir, arguments.fallback)


def _claim(workdir: Path, config) -> None:
  """The workdir holds this run or nothing."""
  if workdir.exists() and not workdir.is_dir():
    raise UserError(f'--workdir={workdir} is a file')
  file = workdir / 'config.json'
  if file.exists():
    old = configs.from_json(file.read_text('utf-8'), str(file))
    if changes := configs.difference(old, config):
      raise UserError(
        f'{workdir} is the workdir of another run: {"; ".join(changes)}'
      )


def _train(config, workdir: Path, fallback: bool) -> int:
  from alignjax import train
  from alignjax.cli import parts
  from alignjax.core import lookup, tree
  from alignjax.models import gemma, recurrentgemma
  from alignjax.step import init_state
  from alignjax.system import mesh as meshes

  tokens = parts.tokenizer(config.tokenizer)
  mesh = meshes.make(dict(config.mesh))
  shape = parts.on_mesh(parts.model_config(config, tokens), mesh)
  model = parts.language_model(shape, tokens)
  recipe = parts.recipe(config, model, tokens)
  schedule = train.Schedule(
    **{name: config[name] for name in train.Schedule._fields}
  )
  updates = schedule.steps * recipe.updates
  tx = lookup.build('system', config.optimizer, updates)
  meshes.check_rows(mesh, config.batch_size, schedule.microbatches)
  source = lookup.build(
    'data', config.source, tokens, config.batch_size, schedule.seed
  )
  origins, digests = parts.start(config.start, shape)

  workdir.mkdir(parents=True, exist_ok=True)
  parts.compilation_cache(workdir)
  _check_start(workdir / 'start.json', digests)
  environment = json.dumps(_environment(), indent=2)
  files.write(workdir / 'config.json', configs.to_json(config))
  files.write(workdir / 'environment.json', environment)
  table = gemma.SHARDING + recurrentgemma.SHARDING
  state = init_state(
    recipe, tx, schedule.seed, start=origins, mesh=mesh, table=table
  )
  size = f'{tree.size(state.params) / 1e6:.2f} M parameters'
  _say(workdir, f'{config.recipe.name}, {size}, {schedule.steps} steps')
  state, finished = train.train(
    recipe,
    tx,
    source,
    state,
    schedule,
    workdir=workdir,
    label=workdir.name,
    mesh=mesh,
    fallback=fallback,
  )
  if not finished:
    done = f'{int(state.step)} of {schedule.steps}'
    _say(workdir, f'saved at step {done}; the same command continues')
    return console.INTERRUPTED
  _export(config, workdir, recipe, state, shape, digests.get('policy'))
  return console.OK


def _export(config, workdir: Path, recipe, state, shape, init) -> None:
  """One model directory for each role that moved; `init` is a digest."""
  from alignjax.models import decoder
  from alignjax.models.config import to_json
  from alignjax.system import model_dir

  provenance: dict[str, Any] = {
    'method': config.recipe.name,
    'steps': config.steps,
    'seed': config.seed,
  }
  if init is not None:
    provenance['init'] = {'checksum': init}
  for role, params in {**state.params, **state.frozen}.items():
    if role in recipe.follow and recipe.follow[role] is None:
      continue
    model_dir.write(
      workdir / ('model' if role == 'policy' else f'model_{role}'),
      config=to_json(shape),
      params={'policy': decoder.canonical(params)},
      provenance=provenance | {'role': role},
      tokenizer=config.tokenizer or None,
      overwrite=True,
    )


def _say(workdir: Path, text: str) -> None:
  print(f'{workdir.name}: {text}', file=sys.stderr, flush=True)


def _check_start(file: Path, digests: dict[str, str]) -> None:
  """Roles read from a path must still be what they were at the beginning."""
  if file.exists():
    old = json.loads(file.read_text('utf-8'))
    for role, digest in digests.items():
      if old.get(role) != digest:
        raise UserError(
          f'start.{role}: the weights have changed since this run began; '
          'use a new --workdir'
        )
  files.write(file, json.dumps(digests, indent=2, sort_keys=True))


def _environment() -> dict[str, str]:
  from importlib import metadata

  packages = ('alignjax', 'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint')
  out = {'python': platform.python_version(), 'platform': platform.platform()}
  for package in packages:
    try:
      out[package] = metadata.version(package)
    except metadata.PackageNotFoundError:  # run from a checkout
      out[package] = 'not installed'
  return out


if __name__ == '__main__':
  raise SystemExit(console.call('train', main))
