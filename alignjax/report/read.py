"""What a report is made of, read from work directories and checked.

Finds training runs (`metrics.jsonl` with its neighbours), evaluations
(`evaluation.json`), differences of models (`geometry.json`) and perplexities
(`perplexity.json`) and turns each into a plain record. It computes nothing and
knows nothing of HTML. A line that is still being written is ignored; any other
malformed input is a UserError that names the file and the line.
"""

import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from alignjax.core.errors import UserError

# Checkpoints and model directories hold thousands of files and no metrics.
PRUNED = re.compile(r'\.|checkpoints$|params$|model(_|$)')
NOT_FINITE = ('nan', 'inf', '-inf')  # JSON has no such numbers, only names
INTERVALS = ('reward', 'kl')  # what every model of an evaluation must have


class Series(NamedTuple):
  """One logged number: steps and values, finite or not, of equal length."""

  steps: list[int]
  values: list[float]


class Run(NamedTuple):
  """One job that trained.

  Attributes:
    name: the job, as people call it.
    group: runs of one group differ in a trailing number or letter only.
    metrics, timing: key -> Series, from the files of those names.
    spent: seconds by name of the ledger in timing.jsonl, all starts together.
    lost_steps: steps that were done again.
  """

  name: str
  group: str
  metrics: Mapping[str, Series]
  timing: Mapping[str, Series]
  spent: Mapping[str, float] = {}
  lost_steps: int = 0

  @property
  def steps(self) -> int:
    """The last step that was logged."""
    return max(s.steps[-1] for s in self.metrics.values())


class Found(NamedTuple):
  """Everything below the work directories.

  Attributes:
    runs: those without rewards (pretraining) before those with.
    evaluations: by folder.
    geometries: by folder; how task vectors lie.
    perplexities: by folder; of models on one text.
    documents: 'folder · file' -> JSON text of config.json, environment.json;
      an environment that an earlier folder has too is left out.
  """

  runs: list[Run]
  evaluations: dict[str, dict[str, Any]]
  geometries: dict[str, dict[str, Any]]
  perplexities: dict[str, dict[str, Any]]
  documents: dict[str, str]


def found(workdirs: Sequence[str | os.PathLike]) -> Found:
  """Read every run and evaluation below `workdirs`, in a stable order.

  Raises:
    UserError: a directory is missing or holds nothing of all that, or a file is
      malformed.
  """
  if not workdirs:
    raise UserError('A report needs at least one work directory; none given.')
  runs: list[Run] = []
  readers = {
    'evaluation.json': evaluation,
    'geometry.json': geometry,
    'perplexity.json': perplexity,
  }
  told: dict[str, dict[str, dict[str, Any]]] = {file: {} for file in readers}
  documents: dict[str, str] = {}
  for workdir in map(Path, workdirs):
    if not workdir.is_dir():
      raise UserError(f'The work directory {workdir} does not exist.')
    prefix = workdir.resolve().name if len(workdirs) > 1 else ''
    before = len(runs) + sum(map(len, told.values()))
    for folder, files in _folders(workdir):
      name = folder.relative_to(workdir).as_posix()
      full = f'{prefix}/{name}' if prefix else name
      if name == '.':
        name = full = workdir.resolve().name
      if 'metrics.jsonl' in files and (run := _run(folder, name, full)):
        runs.append(run)
      for file in files & readers.keys():
        told[file][full] = readers[file](folder / file)
      _documents(folder, files, full, documents)
    if before == len(runs) + sum(map(len, told.values())):
      raise UserError(
        f'{workdir} has nothing to report: expected a metrics.jsonl with at '
        'least one row, an evaluation.json, a geometry.json or a '
        'perplexity.json in it or below it, found none of them.'
      )
  runs.sort(key=lambda r: 'reward' in r.metrics)
  evaluations, geometries, perplexities = told.values()
  return Found(runs, evaluations, geometries, perplexities, documents)


def evaluation(path: str | os.PathLike) -> dict[str, Any]:
  """Read one evaluation.json and check what the report relies on.

  Raises:
    UserError: not JSON, another format, no models, or a model whose reward or
      KL is not an interval of finite numbers.
  """
  path = Path(path)
  data = _of_format_1(path)
  models = data.get('models')
  if not isinstance(models, list) or not models:
    raise UserError(f'{path}: "models" must be a list with at least one model.')
  for row, model in enumerate(models):
    if not isinstance(model, dict) or not isinstance(model.get('name'), str):
      raise UserError(f'{path}: models[{row}] has no "name".')
    for key in INTERVALS:
      if not interval(model, key):
        raise UserError(
          f'{path}: "{key}" of model {model["name"]!r} must have finite '
          f'numbers mean, low and high; found {model.get(key)!r}.'
        )
  for row, point in enumerate(data.get('best_of_n') or []):
    if not (
      interval(point, 'reward')
      and _finite(point.get('kl'))
      and _finite(point.get('n'))
    ):
      raise UserError(
        f'{path}: best_of_n[{row}] must have n, kl and a reward with mean, '
        f'low and high; found {point!r}.'
      )
  return data


def geometry(path: str | os.PathLike) -> dict[str, Any]:
  """Read one geometry.json, the facts of `inspect --diff`, and check it.

  Raises:
    UserError: not JSON, another format, a model without a name, no group `all`,
      or a field of a group that is missing or not what it must be.
  """
  path = Path(path)
  data = _of_format_1(path)
  models = data.get('models')
  if not isinstance(models, list) or not models:
    raise UserError(f'{path}: "models" must be a list with at least one model.')
  for one in (data.get('base'), *models):
    if not isinstance(one, dict) or not isinstance(one.get('name'), str):
      raise UserError(
        f'{path}: base and models must have a "name"; found {one!r}.'
      )
  groups = data.get('groups')
  if not isinstance(groups, dict) or 'all' not in groups:
    raise UserError(f'{path}: "groups" must be an object with the group "all".')
  for name, group in groups.items():
    for field, (check, wanted) in _of_group(len(models)).items():
      value = group.get(field) if isinstance(group, dict) else None
      if not check(value):
        raise UserError(
          f'{path}: "{field}" of group {name!r} must be {wanted}; found '
          f'{repr(value)[:80]}.'
        )
  return data


def perplexity(path: str | os.PathLike) -> dict[str, Any]:
  """Read one perplexity.json, the facts of `alignjax perplexity`, and check it.

  Raises:
    UserError: not JSON, another format, no models, or a field of one that is
      missing or not what it must be.
  """
  path = Path(path)
  data = _of_format_1(path)
  models = data.get('models')
  named = isinstance(models, list) and all(
    isinstance(m, dict) and isinstance(m.get('name'), str) for m in models
  )
  if not models or not named:
    raise UserError(f'{path}: expected "models", each with a "name".')
  for model in models:
    for key in ('perplexity', 'nll', 'gain'):
      if not interval(model, key):
        raise UserError(
          f'{path}: "{key}" of model {model["name"]!r} must have finite '
          f'numbers mean, low and high; found {model.get(key)!r}.'
        )
    size = model.get('parameters')
    if not isinstance(size, int) or size < 1:
      raise UserError(
        f'{path}: "parameters" of model {model["name"]!r} must be a whole '
        f'number, 1 or more; found {size!r}.'
      )
  return data


def _of_group(models: int) -> dict[str, tuple[Callable[[Any], bool], str]]:
  """Field of a group -> what it must be, as a check and in words."""

  def number(most: float, none: bool = False) -> Callable[[Any], bool]:
    return lambda x: (none and x is None) or (_finite(x) and 0 <= x <= most)

  def several(count: int, check: Callable) -> Callable[[Any], bool]:
    return lambda x: (
      isinstance(x, list) and len(x) == count and all(map(check, x))
    )

  pairs, sides = models * (models - 1) // 2, models + 1
  length, rare = number(math.inf), number(math.inf, none=True)
  return {
    'norms': (several(models, length), f'{models} numbers from 0'),
    'relative': (several(models, rare), f'{models} numbers from 0 or null'),
    'angles_deg': (
      several(pairs, number(180, none=True)),
      f'{pairs} numbers from 0 to 180 or null',
    ),
    'sign_conflicts': (number(1, none=True), 'a number from 0 to 1 or null'),
    'distances': (
      several(sides, several(sides, length)),
      f'{sides} x {sides} numbers from 0',
    ),
    'lerp': (length, 'a number from 0'),
    'slerp': (rare, 'a number from 0 or null'),
  }


def _of_format_1(path: Path) -> dict[str, Any]:
  data = _parse(path, _text(path))
  if not isinstance(data, dict) or data.get('format') != 1:
    shown = data.get('format') if isinstance(data, dict) else type(data)
    raise UserError(f'{path}: found format {shown!r}, expected "format": 1.')
  return data


def interval(record: Any, key: str) -> tuple[float, float, float] | None:
  """(mean, low, high) of a field, or None where it is missing or not finite."""
  value = record.get(key) if isinstance(record, dict) else None
  if not isinstance(value, dict):
    return None
  numbers = [value.get(k) for k in ('mean', 'low', 'high')]
  if not all(map(_finite, numbers)):
    return None
  mean, low, high = map(float, numbers)  # pyright: ignore[reportArgumentType]
  return mean, low, high


def rows(path: str | os.PathLike) -> list[dict[str, Any]]:
  """Rows of a JSONL file; an unfinished last line is left out.

  Raises:
    UserError: a line is not a JSON object with an integer "step".
  """
  path = Path(path)
  out = []
  lines = _text(path).split('\n')
  for number, line in enumerate(lines, 1):
    if not line.strip():
      continue
    try:
      row = json.loads(line)
    except ValueError as error:
      if number == len(lines):  # no newline yet: it is being written
        break
      raise UserError(
        f'{path}, line {number}: not valid JSON ({error}).'
      ) from error
    step = row.get('step') if isinstance(row, dict) else None
    if not isinstance(step, int) or isinstance(step, bool):
      if number == len(lines):
        break
      raise UserError(
        f'{path}, line {number}: expected an object with an integer "step", '
        f'found {line.strip()[:60]!r}.'
      )
    out.append(row)
  return out


def _folders(root: Path) -> Iterator[tuple[Path, set[str]]]:
  for folder, folders, files in os.walk(root):
    folders[:] = sorted(
      (f for f in folders if not PRUNED.match(f)), key=_natural
    )
    yield Path(folder), set(files)


def _run(folder: Path, name: str, full: str) -> Run | None:
  metrics = _series(rows(folder / 'metrics.jsonl'))
  if not metrics:
    return None
  path = folder / 'timing.jsonl'
  timing = rows(path) if path.is_file() else []
  return Run(
    full,
    re.sub(r'(?<=\w)([_-]?\d+|[_-][a-z])$', '', name),
    metrics,
    _series(timing),
    _spent(path, timing),
    _lost_steps(path, timing),
  )


def _spent(path: Path, records: list[dict[str, Any]]) -> dict[str, float]:
  out: dict[str, float] = {}
  for row in records:
    spent = row.get('spent', {})
    if not isinstance(spent, dict) or not all(map(_finite, spent.values())):
      raise UserError(
        f'{path}: "spent" of step {row["step"]} must map names to finite '
        f'seconds; found {spent!r}.'
      )
    for name, seconds in spent.items():
      out[name] = out.get(name, 0.0) + seconds
  return out


def _lost_steps(path: Path, records: list[dict[str, Any]]) -> int:
  steps = 0
  for lost in (row['lost'] for row in records if 'lost' in row):
    if not isinstance(lost, dict) or not isinstance(lost.get('steps'), int):
      raise UserError(
        f'{path}: "lost" must have a whole number of "steps"; found {lost!r}.'
      )
    steps += lost['steps']
  return steps


def _documents(folder: Path, files: set[str], name: str, out: dict[str, str]):
  for file in ('config.json', 'environment.json'):
    if file not in files:
      continue
    value = _parse(folder / file, _text(folder / file))
    text = json.dumps(value, indent=2, ensure_ascii=False)
    if file == 'config.json' or text not in out.values():
      out[f'{name} · {file}'] = text


def _series(records: list[dict[str, Any]]) -> dict[str, Series]:
  # A resumed run may log a step twice; what was written last is what counts.
  # The ledger has rows of its own, with other keys.
  by_step: dict[int, dict[str, Any]] = {}
  for row in records:
    by_step.setdefault(row['step'], {}).update(row)
  points: dict[str, dict[int, float]] = {}
  for step in sorted(by_step):
    for key, value in by_step[step].items():
      number = isinstance(value, int | float) and not isinstance(value, bool)
      if key != 'step' and (number or value in NOT_FINITE):
        points.setdefault(key, {})[step] = float(value)
  return {k: Series(list(p), list(p.values())) for k, p in points.items()}


def _text(path: Path) -> str:
  try:
    return path.read_text('utf-8')
  except UnicodeDecodeError as error:
    raise UserError(
      f'{path}: expected UTF-8 text, found byte {error.start} that is not.'
    ) from error
  except OSError as error:
    raise UserError(f'{path}: cannot be read ({error.strerror}).') from error


def _parse(path: Path, text: str) -> Any:
  try:
    return json.loads(text)
  except json.JSONDecodeError as error:
    raise UserError(
      f'{path}, line {error.lineno}: not valid JSON ({error.msg}).'
    ) from error


def _finite(value: Any) -> bool:
  number = isinstance(value, int | float) and not isinstance(value, bool)
  return number and math.isfinite(value)


def _natural(name: str) -> list[tuple[int, str]]:
  """Sort key under which run_2 comes before run_10."""
  parts = re.split(r'(\d+)', name)
  return [(int(p), '') if p.isdigit() else (-1, p) for p in parts]
