"""`alignjax plan`: what a run needs on a TPU slice, before one is rented.

Compiles the run's own programs with the TPU compiler, which needs no TPU, in a
process of their own; without libtpu an estimate, labelled so.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alignjax.cli import config as configs
from alignjax.cli import console
from alignjax.core import files
from alignjax.core.errors import UserError
from alignjax.plan import topology as topologies

_EPILOG = """\
examples
  alignjax plan --config=configs/plan/gemma2_9b.py --topology v5p:4x4x4
  alignjax plan --config=F --topology v5e:16x16 --slices 2 --step all
  alignjax plan --config=F --topology v6e:4x4 --search --fast

The mesh is the config's: --config.mesh.fsdp=16. Exit code 1: does not fit.
"""
DOES_NOT_FIT = 1
_STEPS = ('train', 'rollout', 'all')


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog='alignjax plan',
    description='Memory, FLOPs, communication and estimated time of a run on '
    'a TPU slice, from the real TPU compiler, without a TPU.',
    epilog=_EPILOG,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  add = parser.add_argument
  add('--config', required=True, metavar='F', help='of one training run')
  add('--topology', required=True, metavar='NAME', help='such as v5p:4x4x4')
  add('--slices', type=int, default=1, metavar='K', help='equal slices')
  add('--step', choices=_STEPS, default='train', help='train by default')
  add('--search', action='store_true', help='try meshes, microbatches, remat')
  add('--top', type=int, default=4, help='candidates to compile (4)')
  add('--fast', action='store_true', help='two small depths, extrapolated')
  add('--layers', type=int, metavar='N', help='plan a model of N layers')
  add('--json', type=Path, metavar='FILE', help='the records as well')
  add('--analytic', action='store_true', help='estimate, without compiling')
  add('--time_limit', type=float, default=1800, metavar='S', help='a compile')
  add(
    '--option',
    action='append',
    default=[],
    metavar='NAME=VALUE',
    help='of the compiler, such as xla_tpu_scoped_vmem_limit_kib=65536',
  )
  # This command in a process of its own; not for people.
  add('--child', type=Path, help=argparse.SUPPRESS)
  return parser


def main(argv: Sequence[str]) -> int:
  """Returns 0 if everything fits and 1 if not; UserError for bad input."""
  if argv[:1] == ['--child']:
    return _child(Path(argv[1]))
  arguments, rest = _parser().parse_known_args(list(argv))
  config, _, rest = configs.load(['--config', arguments.config, *rest])
  if rest:
    raise UserError(f'unknown argument {rest[0]!r}; `alignjax plan --help`')
  job = _job(arguments, config)

  from alignjax.cli import plan_show
  from alignjax.plan import compile as compiling

  version = None if arguments.analytic else compiling.available()
  if version is None and not arguments.analytic:
    print(
      'alignjax plan: libtpu is not installed, so this is an estimate '
      '(pip install alignjax[plan])',
      file=sys.stderr,
    )
  job['analytic'] = version is None
  if arguments.search:
    records = _search(job, arguments.top)
  else:
    records = _records(job)
  plan_show.show(records, ranked=arguments.search)
  if arguments.json:
    text = json.dumps({'config': job['config'], 'records': records}, indent=2)
    files.write(arguments.json, text + '\n')
  return console.OK if all(r['fits'] for r in records) else DOES_NOT_FIT


def _job(arguments, config) -> dict[str, Any]:
  """Everything that a process needs to plan, in JSON; checked."""
  missing = [k for k in ('model', 'recipe', 'optimizer') if k not in config]
  if missing:
    raise UserError(
      f'{arguments.config}: no section {missing[0]!r}; plan takes the config '
      'of one training run (of a graph of jobs, W/JOB/config.json)'
    )
  topology = topologies.parse(arguments.topology, arguments.slices)
  options = {}
  for option in arguments.option:
    name, equals, value = option.partition('=')
    if not equals:
      raise UserError(f'--option {option}: expected NAME=VALUE')
    options[name] = value
  if arguments.layers is not None and arguments.layers < 1:
    raise UserError(f'--layers {arguments.layers}: expected at least 1')
  return {
    'config': configs.plain(config),
    'topology': topology.name,
    'slices': topology.slices,
    'step': arguments.step,
    'fast': arguments.fast,
    'options': options,
    'layers': arguments.layers,
    'time_limit': arguments.time_limit,
    'mesh': None,
    'microbatches': None,
    'remat': None,
  }


def _composed(job: dict[str, Any], devices: Sequence[Any] | None) -> Any:
  """(programs, mesh, shape, schedule) as `alignjax train` builds them.

  Without devices the mesh is abstract, and the programs cannot be lowered.
  """
  import dataclasses

  from alignjax import train
  from alignjax.cli import parts
  from alignjax.core import lookup
  from alignjax.models import sharding
  from alignjax.plan import programs, stand_ins
  from alignjax.plan.batch import source_batch
  from alignjax.system import mesh as meshes

  config: Any = configs.from_json(json.dumps(job['config']))
  topology = topologies.parse(job['topology'], job['slices'])
  axes = dict(job['mesh'] or config.mesh)
  if devices is None:
    mesh: Any = programs.abstract_mesh(axes, topology.device_count)
  else:
    mesh = meshes.make(axes, devices)
  tokens = _tokens(config)
  shape = parts.model_config(config, tokens)
  changes = {k: job[k] for k in ('layers', 'remat') if job[k] is not None}
  shape = dataclasses.replace(shape, **changes)
  reward = None
  if 'reward' in config:
    reward = parts.reward(config, tokens, stand_ins.Records())
    reward = stand_ins.without_host(reward)
  model = parts.language_model(shape, tokens)
  recipe = parts.recipe(config, model, tokens, reward)
  names = train.Schedule._fields
  schedule = train.Schedule(**{k: config[k] for k in names if k in config})
  if job['microbatches'] is not None:
    schedule = schedule._replace(microbatches=job['microbatches'])
  tx = lookup.build('system', config.optimizer, schedule.steps * recipe.updates)
  meshes.check_rows(mesh, config.batch_size, schedule.microbatches)
  state = programs.state(recipe, tx, config.start, mesh, sharding.TABLE)
  batch = source_batch(config.source, config.batch_size)
  found = programs.programs(
    recipe, tx, state, batch, schedule, mesh, shape, which=job['step']
  )
  return found, mesh, shape, schedule


def _tokens(config):
  """The run's tokenizer, or a stand-in where its file is not here."""
  from alignjax.cli import parts
  from alignjax.core import lookup
  from alignjax.plan import stand_ins

  path = config.get('tokenizer')
  if not path or Path(path).exists() or config.model['name'] == 'start':
    return parts.tokenizer(path)
  return stand_ins.Tokens(lookup.build('models', config.model).vocab_size)


def _measured(job: dict[str, Any]) -> list[dict[str, Any]]:
  """Raw records of the job's programs, made in this process."""
  from alignjax.plan import compile as compiling
  from alignjax.plan import facts

  topology = topologies.parse(job['topology'], job['slices'])
  if job['analytic']:
    found, mesh, shape, schedule = _composed(job, None)
    return [
      facts.estimated(p, shape, topology, mesh.shape, schedule.microbatches)
      for p in found
    ]
  found, mesh, shape, _ = _composed(job, topologies.devices(topology))
  dump = Path(job['dump']) if job.get('dump') else None
  return [
    facts.compiled(
      compiling.compiled(
        p, mesh, int(topology.hbm), options=job['options'], dump=dump
      ),
      p,
      shape,
      topology,
      mesh.shape,
    )
    for p in found
  ]


def _child(file: Path) -> int:
  """Reads a job, leaves its records or its error beside it."""
  job = json.loads(file.read_text('utf-8'))
  try:
    result = {'records': _measured(job)}
  except UserError as error:
    result = {'error': str(error)}
  files.write(file.with_suffix('.out'), json.dumps(result))
  return console.OK


def _in_child(job: dict[str, Any]) -> list[dict[str, Any]]:
  """`_measured` in a process of its own."""
  from alignjax.plan import compile as compiling

  depth = f' of {job["layers"]} layers' if job['layers'] else ''
  with tempfile.TemporaryDirectory(prefix='alignjax_plan_') as folder:
    file = Path(folder) / 'job.json'
    dump = Path(folder) / 'dump' if job.get('dump') else None
    files.write(file, json.dumps(job | {'dump': dump and str(dump)}))
    compiling.in_child(
      ['-m', 'alignjax.cli.plan', '--child', str(file)],
      label=f'{job["step"]}{depth} on {job["topology"]}',
      limit=job['time_limit'],
      dump=dump,
    )
    result = json.loads(file.with_suffix('.out').read_text('utf-8'))
  if 'error' in result:
    raise UserError(result['error'])
  return result['records']


def _records(job: dict[str, Any]) -> list[dict[str, Any]]:
  """Finished records of a job, at two depths where it is to be fast."""
  from alignjax.plan import facts, search

  if job['analytic']:
    raw = _measured(job)
  else:
    # The cheap checks first: what does not divide is not worth a compile.
    _, _, shape, _ = _composed(job, None)
    depths = search.shallow(shape) if job['fast'] else None
    if depths is None:
      raw = _in_child(job)
    else:
      first, second = (_in_child(job | {'layers': n}) for n in depths)
      raw = [
        facts.extrapolated(a, b, (*depths, shape.layers))
        for a, b in zip(first, second)
      ]
  return [_finished(record, job) for record in raw]


def _finished(record: dict[str, Any], job: dict[str, Any]) -> dict[str, Any]:
  from alignjax.plan import facts

  topology = topologies.parse(job['topology'], job['slices'])
  record = facts.finished(record, topology, job['config']['steps'])
  return record | {'assumptions': facts.assumptions(record, topology)}


def _search(job: dict[str, Any], top: int) -> list[dict[str, Any]]:
  """The best candidates' records of the training step, fastest first."""
  from alignjax.models import decoder
  from alignjax.plan import search

  job = job | {'step': 'train'}  # the others have no microbatches
  topology = topologies.parse(job['topology'], job['slices'])
  # Composed once; every leaf divides over no axis.
  everything, _, shape, _ = _composed(job | {'mesh': {'expert': -1}}, None)
  found = list(
    search.candidates(
      shape,
      topology.device_count,
      job['config']['batch_size'],
      tuple(decoder.REMAT),
      slices=topology.slices,
    )
  )

  def cheap(candidate):
    return _estimated(candidate, everything[-1], shape, job)

  def compiled(candidate):
    record = _records(job | candidate._asdict())[0]
    return record | {'candidate': candidate.label}

  may = search.ranked(found, cheap)
  print(
    f'{len(may)} of {len(found)} candidates divide and may fit', file=sys.stderr
  )
  if job['analytic']:
    return [record for _, record in may[:top]]
  best = search.ranked([candidate for candidate, _ in may[:top]], compiled)
  return [record for _, record in best]


def _estimated(candidate, step, shape, job) -> dict[str, Any]:
  """A candidate's record without a compiler, and without tracing anything."""
  import dataclasses

  from alignjax.models import sharding
  from alignjax.plan import facts, programs

  topology = topologies.parse(job['topology'], job['slices'])
  mesh = programs.abstract_mesh(candidate.mesh, topology.device_count)
  shape = dataclasses.replace(shape, remat=candidate.remat)
  record = facts.estimated(
    programs.elsewhere(step, mesh, sharding.TABLE),
    shape,
    topology,
    mesh.shape,
    candidate.microbatches,
  )
  return _finished(record, job) | {'candidate': candidate.label}


if __name__ == '__main__':
  raise SystemExit(console.call('plan', main))
