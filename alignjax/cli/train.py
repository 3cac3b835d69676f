"""`alignjax train`: one training run; starting it again continues it."""

import argparse
import collections
import json
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alignjax.cli import config as configs
from alignjax.cli import console
from alignjax.core import files
from alignjax.core.errors import UserError


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog='alignjax train',
    description='One training run. The same command continues where it '
    'stopped, bit for bit. Ctrl-C and SIGTERM finish the step, save and '
    'exit 75.',
    epilog='--config.start.ROLE is what a role begins with: a model directory, '
    "'@ROLE' for a copy of another, or a merge that is made in memory, a "
    'section or JSON of the fields of `alignjax merge --config`: '
    '\'{"method": "slerp", "base": P, "models": [A, B], "t": 0.5}\', where P, '
    'A and B are directories or merges again.',
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
    '--replay',
    type=int,
    metavar='STEP',
    help='make a past step of this run again, from the nearest kept '
    'checkpoint, and compare its metrics; exits 1 if they differ',
  )
  hosts = parser.add_argument_group(
    'several hosts',
    'The same command on each; TPU pods, Slurm and Open MPI need no flags. '
    '--workdir is one folder that all of them see.',
  )
  hosts.add_argument('--coordinator', metavar='HOST:PORT', help='of process 0')
  hosts.add_argument('--processes', type=int, metavar='N')
  hosts.add_argument('--process', type=int, metavar='I', help='0 .. N - 1')
  hosts.add_argument(
    '--start_s',
    type=int,
    default=300,
    metavar='S',
    help='seconds to wait for the other processes (%(default)s)',
  )
  hosts.add_argument(
    '--heartbeat_s',
    type=int,
    default=60,
    metavar='S',
    help='silence of a process that ends the others (%(default)s)',
  )
  return parser


def main(argv: Sequence[str]) -> int:
  """Returns 0 when the run is complete, 75 when it was interrupted."""
  arguments, rest = _parser().parse_known_args(list(argv))
  from alignjax.system import hosts

  config, _, rest = configs.load(['--config', arguments.config, *rest])
  if rest:
    raise UserError(f'unknown argument {rest[0]!r}; `alignjax train --help`')
  workdir = arguments.workdir
  _claim(workdir, config)
  given = {name: getattr(arguments, name) for name in hosts.Hosts._fields}
  with hosts.session(hosts.Hosts(**given)):
    return _train(config, workdir, arguments.replay)


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


def _train(config, workdir: Path, step: int | None) -> int:
  started = time.monotonic()
  from alignjax import train
  from alignjax.cli import parts, starts
  from alignjax.core import lookup, tree
  from alignjax.models import sharding
  from alignjax.step import init_state
  from alignjax.system import mesh as meshes

  tokens = parts.tokenizer(config.tokenizer)
  mesh = meshes.make(dict(config.mesh))
  shape = parts.model_config(config, tokens)
  model = parts.language_model(shape, tokens)
  source = lookup.build(
    'data', config.source, tokens, config.batch_size, config.seed
  )
  reward = parts.reward(config, tokens, source) if 'reward' in config else None
  recipe = parts.recipe(config, model, tokens, reward)
  starts.check(config, recipe)
  schedule = train.Schedule(
    **{name: config[name] for name in train.Schedule._fields if name in config}
  )
  tx = lookup.build('system', config.optimizer, schedule.steps * recipe.updates)
  meshes.check_rows(mesh, config.batch_size, schedule.microbatches)
  origins = starts.origins(config, shape, tokens, recipe)
  begun = starts.facts(origins)

  _enter(workdir, config, begun, step)
  # No name holds what roles begin with: it is freed once the state is there.
  state = init_state(
    *(recipe, tx, schedule.seed),
    start=starts.load(starts.resumed(origins, recipe, workdir), mesh),
    mesh=mesh,
    table=sharding.TABLE,
  )
  if step is not None:
    return _replay(
      recipe, tx, source, state, schedule, workdir=workdir, step=step, mesh=mesh
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
    started=started,
  )
  if not finished:
    done = f'{int(state.step)} of {schedule.steps}'
    _say(workdir, f'saved at step {done}; the same command continues')
    return console.INTERRUPTED
  _export(config, workdir, recipe, state, shape, begun.get('policy'))
  return console.OK


def _enter(workdir: Path, config, begun, step: int | None) -> None:
  """Notes a run where it begins, or finds it as it began; `step` replays."""
  from alignjax.cli import parts

  if step is None:
    workdir.mkdir(parents=True, exist_ok=True)
  elif not (workdir / 'metrics.jsonl').exists():
    raise UserError(f'--replay: no run at {workdir}')
  parts.compilation_cache(workdir)
  _check_start(workdir / 'start.json', begun)
  if step is None:
    _note(workdir, config, begun)


def _replay(*run, workdir: Path, **options) -> int:
  """Says whether a past step gives the same metrics; 1 if it does not."""
  from alignjax import replay

  done = replay.replay(*run, workdir=workdir, **options)
  said = f'step {done.row["step"]}, from checkpoint {done.origin}'
  if done.logged is None:
    print(f'{said}: {json.dumps(done.row)}; metrics.jsonl has no row of it')
    return console.OK
  if done.differences:
    print(f'{said}: different: {"; ".join(done.differences)}')
    return 1
  print(f'{said}: the same metrics, bit for bit')
  return console.OK


def _export(config, workdir: Path, recipe, state, shape, init) -> None:
  """One model directory for each role that moved; `init` is what began."""
  from alignjax.models import decoder
  from alignjax.models.config import to_json
  from alignjax.policies import conditioned
  from alignjax.system import hosts, model_dir

  provenance: dict[str, Any] = {
    'method': config.recipe.name,
    'steps': config.steps,
    'seed': config.seed,
  }
  if init is not None:
    provenance['init'] = init
  for role, params in {**state.params, **state.frozen}.items():
    if role in recipe.follow and recipe.follow[role] is None:
      continue
    folders = {'policy': decoder.canonical(params)}
    view, facts = 'plain', {'role': role}
    if mixed := recipe.mixed.get(role):
      fixed = state.frozen.get(conditioned.REFERENCE)
      ends = fixed if len(mixed.names) > len(params['copies']) else None
      folders = conditioned.roles(params, decoder.canonical, ends)
      view, facts = 'conditioned', facts | {'condition': list(mixed.names)}
    named = {leaf for of in folders.values() for leaf in of}
    # Every process takes part in gathering each leaf; one writes them.
    leaves = {folder: _whole(of) for folder, of in folders.items()}
    if not hosts.first():
      for of in leaves.values():
        collections.deque(of, maxlen=0)
      continue
    head = 'untied' if 'unembedding' in named else 'tied'
    model_dir.write(
      workdir / ('model' if role == 'policy' else f'model_{role}'),
      config=to_json(shape),
      params=leaves,
      provenance=provenance | facts,
      view=view,
      head=_head(params, head),
      tokenizer=config.tokenizer or None,
      overwrite=True,
    )


def _head(params, head: str) -> str:
  """What model.json says of the head of a role; `head` if it has none."""
  for kind in ('scalar', 'embedding'):
    if f'{kind}_head' in params:
      return f'{kind}({params[f"{kind}_head"].shape[-1]})'
  return head


def _whole(params):
  from alignjax.core import tree
  from alignjax.system import hosts

  named = tree.named(params)
  return ((name, hosts.whole(leaf)) for name, leaf in named.items())


def _say(workdir: Path, text: str) -> None:
  from alignjax.system import hosts

  if hosts.first():
    print(f'{workdir.name}: {text}', file=sys.stderr, flush=True)


def _check_start(file: Path, begun: dict[str, dict[str, Any]]) -> None:
  """Roles read from a path must still be what they were at the beginning."""
  if file.exists():
    old = json.loads(file.read_text('utf-8'))
    for role, facts in begun.items():
      if _checksum(old.get(role)) != facts['checksum']:
        raise UserError(
          f'start.{role}: the weights have changed since this run began; '
          'use a new --workdir'
        )


def _checksum(told: Any) -> Any:
  """Of a role in start.json: what is merged tells its sources as well."""
  return told['checksum'] if isinstance(told, dict) else told


def _note(workdir: Path, config, begun: dict[str, dict[str, Any]]) -> None:
  """What this run is, by the process that writes what is written once."""
  from alignjax.system import hosts

  if not hosts.first():
    return
  told = {
    role: facts if 'merge' in facts else facts['checksum']
    for role, facts in begun.items()
  }
  start = json.dumps(told, indent=2, sort_keys=True)
  files.write(workdir / 'start.json', start)
  files.write(workdir / 'config.json', configs.to_json(config))
  environment = json.dumps(_environment(), indent=2)
  files.write(workdir / 'environment.json', environment)


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
