"""The job graph: an experiment is a graph of our own commands.

A job is a verb with a config; it may need other jobs and name their outputs
in its config as '@job/path'. Here are only the words and the arithmetic of
the graph; who runs the jobs, where, is a renderer's business.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from alignjax.core import lookup
from alignjax.core.errors import UserError

_NAME = re.compile(r'[A-Za-z0-9_-]+')
_OUTPUT = re.compile(r'(--[^=@]+=)?@([A-Za-z0-9_-]+)(/.*)?')


class Job(NamedTuple):
  """One command of an experiment.

  Attributes:
    name: the job's folder in the workdir: letters, digits, '_' and '-'.
    verb: a verb of `alignjax`, or any module with a dot in its path that
      runs as `python -m verb --config=... --workdir=...`.
    config: nested numbers and names. '@job' and '@job/path' mean a needed
      job's folder, or a path in it; other strings stay as they are.
    needs: names of the jobs that have to be finished first.
    arguments: further arguments of the command; '@job/path' works here too,
      also as '--flag=@job/path'.
  """

  name: str
  verb: str
  config: Any
  needs: tuple[str, ...] = ()
  arguments: tuple[str, ...] = ()


def order(jobs: Iterable[Job]) -> list[Job]:
  """The jobs, each after what it needs, otherwise in the order given.

  Raises UserError for a bad or repeated name, an unknown need, a cycle, or an
  '@job' of a job that is not needed, directly or through others.
  """
  waiting: dict[str, Job] = {}
  for job in jobs:
    if not _NAME.fullmatch(job.name):
      raise UserError(
        f'job {job.name!r}: a name is letters, digits, "_" and "-"'
      )
    if job.name in waiting:
      raise UserError(f'two jobs are named {job.name!r}')
    waiting[job.name] = job
  names = list(waiting)
  for job in waiting.values():
    for need in job.needs:
      if need not in waiting:
        raise UserError(
          f'job {job.name!r} needs {need!r}, which is no job'
          f'{lookup.nearest(need, names)}'
        )
  ordered: dict[str, Job] = {}
  while waiting:
    ready = [j for j in waiting.values() if all(n in ordered for n in j.needs)]
    if not ready:
      raise UserError(f'jobs need each other: {_cycle(waiting)}')
    ordered[ready[0].name] = waiting.pop(ready[0].name)
  _check_outputs(ordered)
  return list(ordered.values())


def _cycle(waiting: Mapping[str, Job]) -> str:
  """'a -> b -> a', every arrow a need; all of `waiting` are stuck."""
  path = [next(iter(waiting))]
  while path[-1] not in path[:-1]:
    path.append(next(n for n in waiting[path[-1]].needs if n in waiting))
  return ' -> '.join(path[path.index(path[-1]) :])


def _check_outputs(ordered: Mapping[str, Job]) -> None:
  above: dict[str, set[str]] = {}
  for job in ordered.values():
    above[job.name] = set(job.needs).union(*(above[n] for n in job.needs))
    for text in _strings((job.config, job.arguments)):
      match = _OUTPUT.fullmatch(text)
      if match and match[2] in ordered and match[2] not in above[job.name]:
        raise UserError(
          f'job {job.name!r} uses {text!r} but does not need {match[2]!r}'
        )


def _strings(value: Any) -> Iterator[str]:
  if isinstance(value, str):
    yield value
  elif isinstance(value, tuple | list):
    for item in value:
      yield from _strings(item)
  elif hasattr(value, 'keys'):
    for key in value.keys():
      yield from _strings(value[key])


def resolved(value: Any, names: Iterable[str], workdir: Path) -> Any:
  """A plain value with every '@job/path' as an absolute path in `workdir`."""
  if isinstance(value, str):
    match = _OUTPUT.fullmatch(value)
    if match and match[2] in names:
      flag, name, path = match[1] or '', match[2], match[3] or ''
      return f'{flag}{workdir.resolve() / name}{path}'
    return value
  if isinstance(value, tuple | list):
    return [resolved(item, names, workdir) for item in value]
  if isinstance(value, dict):
    return {k: resolved(item, names, workdir) for k, item in value.items()}
  return value


def dependants(ordered: Sequence[Job], names: Iterable[str]) -> set[str]:
  """`names` and all jobs that need one of them, directly or through others."""
  found = set(names)
  for job in ordered:
    if found.intersection(job.needs):
      found.add(job.name)
  return found


def facts(ordered: Sequence[Job]) -> dict[str, dict[str, Any]]:
  """What each job's outputs depend on, as JSON, by job name.

  Configs must be plain. `needs` maps the needed jobs to their `hash`, so two
  facts are equal only if everything above is.
  """
  found: dict[str, dict[str, Any]] = {}
  for job in ordered:
    fact = {
      'format': 1,
      'verb': job.verb,
      'arguments': list(job.arguments),
      'config': job.config,
      'needs': {need: found[need]['hash'] for need in job.needs},
    }
    text = json.dumps(fact, sort_keys=True)
    fact['hash'] = hashlib.sha256(text.encode()).hexdigest()
    found[job.name] = fact
  return found
