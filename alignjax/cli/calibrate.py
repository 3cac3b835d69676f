"""`alignjax calibrate`: rewards of reference responses to every prompt.

Samples M responses of one model to each row of a source, scores them and keeps
the rewards, ascending, in W/rewards.npy; W/calibration.json says of what. The
source `calibrated` joins them to the prompts, for recipes that measure a
response against the reference (CTRL). A killed calibration goes on.
"""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alignjax.cli import config as configs
from alignjax.cli import console
from alignjax.core import files
from alignjax.core.errors import UserError

PARTIAL = 'rewards.partial.npy'


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog='alignjax calibrate',
    description='Sample a reference model on every prompt of a source and '
    'keep the rewards, for recipes that calibrate theirs.',
    epilog='The config has: tokenizer, model, start.policy (the reference), '
    'source (of prompts), reward, responses (for each prompt), batch_size '
    '(prompts at a time), max_new_tokens, temperature, seed.',
    allow_abbrev=False,
  )
  parser.add_argument(
    '--config', required=True, metavar='F', help='program or resolved JSON'
  )
  parser.add_argument('--workdir', required=True, type=Path, metavar='W')
  return parser


def main(argv: Sequence[str]) -> int:
  """Exit code; raises UserError for bad input."""
  arguments, rest = _parser().parse_known_args(list(argv))
  loaded = configs.load(['--config', arguments.config, *rest])
  config: Any = loaded[0]
  rest = loaded[2]
  if rest:
    raise UserError(
      f'unknown argument {rest[0]!r}; `alignjax calibrate --help`'
    )
  configs.check(
    config,
    arguments.config,
    'tokenizer model start source reward seed'.split(),
    responses=2,
    batch_size=1,
    max_new_tokens=1,
    temperature=1e-6,
  )
  _calibrate(config, arguments.workdir)
  return console.OK


def _calibrate(config, workdir: Path) -> None:
  from alignjax.cli import parts
  from alignjax.core import lookup
  from alignjax.data import calibrated
  from alignjax.rewards import compose

  tokens = parts.tokenizer(config.tokenizer)
  shape = parts.model_config(config, tokens)
  model = parts.language_model(shape, tokens)
  rows = lookup.build(
    'data', config.source, tokens, config.batch_size, config.seed
  )
  reward = parts.reward(config, tokens, rows)
  origin = config.start.get('policy')
  if not origin:
    raise UserError('start.policy: no reference model is named')
  found = parts.opened(origin, shape, 'start.policy')
  guests, _ = parts.guests(config, tokens, compose.roles(reward))
  facts = {
    'format': calibrated.FORMAT,
    'rows': len(rows),
    'responses': config.responses,
    'prompts': calibrated.fingerprint(rows),
    'reference': parts.digest(found),
    'config': configs.plain(config),
  }
  workdir.mkdir(parents=True, exist_ok=True)
  file, out = workdir / calibrated.FACTS, workdir / calibrated.REWARDS
  if file.exists():
    if json.loads(file.read_text('utf-8')) != facts:
      raise UserError(f'{workdir} holds another calibration: see {file}')
  else:
    files.write(file, json.dumps(facts, indent=1) + '\n')
  if not out.exists():
    parts.compilation_cache(workdir)
    bundle = {**guests, 'policy': parts.load_params(found, shape)}
    table = _table(workdir / PARTIAL, (len(rows), config.responses))
    _sample(config, model, bundle, rows, reward, table)
    table.flush()
    os.replace(workdir / PARTIAL, out)
  rewards = calibrated.read(str(workdir), facts['prompts'], len(rows))
  print(
    f'{out}: {rewards.shape[1]} rewards of {found.path} for each of '
    f'{len(rows):,} prompts, mean {rewards.mean():.3f}'
  )


def _sample(config, model, bundle, rows, reward, table) -> None:
  import jax

  from alignjax import evaluate
  from alignjax.system.progress import progress

  write = evaluate.sampler(
    model,
    count=config.responses,
    max_new_tokens=config.max_new_tokens,
    temperature=config.temperature,
  )
  with progress('calibrate', len(rows)) as advance:
    evaluate.reference_rewards(
      write,
      bundle,
      rows,
      reward,
      jax.random.key(config.seed),
      into=table,
      advance=advance,
    )


def _table(file: Path, shape: tuple[int, int]):
  """A float32 array on disk; NaN where nothing has been written yet."""
  import numpy as np

  if not file.exists():
    new = file.with_suffix('.new')
    array = np.lib.format.open_memmap(
      new, mode='w+', dtype=np.float32, shape=shape
    )
    array[:] = np.nan
    array.flush()
    os.replace(new, file)
  return np.lib.format.open_memmap(file, mode='r+')


if __name__ == '__main__':
  raise SystemExit(console.call('calibrate', main))
