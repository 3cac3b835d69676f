"""Certifies that two directories hold the same model.

Both are opened afresh and read on their own: every leaf by name, shape, dtype
and checksum, and the logits of a fixed probe, computed layer by layer from the
files in float32, so that memory holds one layer or the embedding. Says
'identical', 'equal within' a number, or 'DIFFERENT'; it repairs nothing.
"""

import json
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from alignjax.core.spec import Spec
from alignjax.interop import hf_facts
from alignjax.interop import probe as probes
from alignjax.interop.open import CERTIFICATES
from alignjax.interop.opened import Opened
from alignjax.models.config import Config, to_json
from alignjax.system import leaf_files

FORMAT = 1
TOLERANCE = 2e-5  # of logits of the same numbers

IDENTICAL, DIFFERENT = 'identical', 'DIFFERENT'


class Certificate(NamedTuple):
  """What was compared, and how it came out.

  Attributes:
    verdict: one line.
    same: False if the verdict is DIFFERENT.
    facts: everything, as JSON.
  """

  verdict: str
  same: bool
  facts: dict[str, Any]


def steps(source: Opened) -> int:
  """How often `compare` calls its step."""
  return len(source.leaves) + len(source.extra) + 2 * source.config.layers


def peak_bytes(source: Opened, written: Mapping[str, Spec]) -> int:
  """Upper estimate of what the arrays of `compare` occupy at once."""
  pair = 0
  layers: dict[str, int] = {}
  for name, spec in source.leaves.items():
    ours, theirs = _bytes(spec), _bytes(written[name])
    # Who wrote the source may have encoded a leaf in one piece. What is written
    # here is decoded in small ones, and copied whole only if dtypes differ.
    passing = min(theirs, leaf_files.PASSING_BYTES)
    if spec.dtype != written[name].dtype:
      passing = theirs
    pair = max(pair, 2 * ours, ours + theirs + passing)
    layer = name.split('/')[0]
    layers[layer] = layers.get(layer, 0) + 4 * math.prod(spec.shape)
  rows, width = source.leaves['embedding'].shape
  del layers['embedding']
  table = (
    max(_bytes(side['embedding']) for side in (source.leaves, written))
    + 8 * probes.ROWS * width
  )
  # The probe's logits of one side and, in passing, of the other.
  kept = 4 * 2 * probes.LENGTH * (rows + 4 * probes.ROWS)
  return kept + max(pair, table, 2 * max(layers.values()))


def _bytes(spec: Spec) -> int:
  return math.prod(spec.shape) * spec.dtype.itemsize


def compare(
  source: Opened,
  destination: Opened,
  step: Callable[[str], None] = lambda text: None,
) -> Certificate:
  """Reads both and compares. Raises UserError for a file that is damaged."""
  leaves = _leaves(source, destination, step)
  extra = _extra(source, destination, step)
  settings = _settings(source.config, destination.config)
  wrong = [row['leaf'] for row in leaves + extra if row['result'] == DIFFERENT]
  wrong += [f'config {name}' for name in settings]
  facts: dict[str, Any] = {
    'format': FORMAT,
    'verdict': '',
    'source': _side(source),
    'destination': _side(destination),
    'config': settings,
    'probe': None,
    'leaves': leaves,
    'extra': extra,
  }
  if leaves_fit(source, destination):
    facts['probe'] = _probe(source, destination, step)
  verdict, same = judged(wrong, facts)
  facts['verdict'] = verdict
  return Certificate(verdict, same, facts)


def write(certificate: Certificate, path: epath.PathLike) -> None:
  """Leaves both files, for machines and for people, in a directory."""
  texts = (
    json.dumps(certificate.facts, indent=1) + '\n',
    '\n'.join(_text(certificate.facts)) + '\n',
  )
  for name, text in zip(CERTIFICATES, texts):
    file = epath.Path(path) / name
    partial = file.parent / f'.{name}.partial'
    partial.write_text(text)
    partial.replace(file)


def judged(wrong: list[str], facts: Mapping[str, Any]) -> tuple[str, bool]:
  """(verdict, whether it is the same model) of what was found.

  `wrong` names what cannot be explained by a cast or by rows of padding.
  """
  found = facts['probe']
  if wrong or found is None:
    some = ', '.join(wrong[:5]) + (', ...' if len(wrong) > 5 else '')
    return f'{DIFFERENT}: {len(wrong)} of what was compared ({some})', False
  results = {row['result'] for row in facts['leaves']}
  said = sorted(results - {IDENTICAL})
  said += ['extra tensors left out'] * any(
    row['result'] == 'left out' for row in facts['extra']
  )
  note = f' ({"; ".join(said)})' if said else ''
  if found['bitwise_equal']:
    return f'{IDENTICAL}: every leaf and every logit of the probe{note}', True
  worst = found['max_abs_difference']
  cast = any('cast' in result for result in results)
  # The same numbers may be added up in another order by a busy machine.
  if not found['finite'] or not (cast or worst <= TOLERANCE):
    return f'{DIFFERENT}: logits of the probe by {worst:.3g}{note}', False
  return f'equal within {worst:.3g} in logits of the probe{note}', True


def leaves_fit(source: Opened, destination: Opened) -> bool:
  """Whether the same tokens can be put through both."""
  ours, theirs = source.leaves, destination.leaves
  return ours.keys() == theirs.keys() and all(
    ours[name].shape == theirs[name].shape or name == 'embedding'
    for name in ours
  )


def _probe(source: Opened, destination: Opened, step) -> dict[str, Any]:
  rows = min(_rows(source), _rows(destination))
  what = probes.probe(rows)
  ours = list(probes.logits(source, what, rows, step))
  worst, equal, largest, finite = 0.0, True, 0.0, True
  tops: list[list[np.ndarray]] = [[], []]
  offset = 0
  for a, b in zip(ours, probes.logits(destination, what, rows, step)):
    finite &= bool(np.isfinite(a).all() and np.isfinite(b).all())
    equal &= _view(a) == _view(b)
    with np.errstate(invalid='ignore', over='ignore'):
      worst = max(worst, _largest(a - b))
    largest = max(largest, _largest(a))
    for top, part in zip(tops, (a, b)):
      best = part.argmax(-1)
      value = np.take_along_axis(part, best[..., None], -1)[..., 0]
      top.append(np.stack([value, best + offset]))
    offset += a.shape[-1]
  winners = [_argmax(top) for top in tops]
  return {
    'seed': probes.SEED,
    'shape': [*what.tokens.shape, rows],
    'tokens': what.tokens.tolist(),
    'largest_logit': largest,
    'max_abs_difference': worst,
    'bitwise_equal': equal,
    'finite': finite,
    'argmax_agreement': float(np.mean(winners[0] == winners[1])),
  }


def _largest(x: np.ndarray) -> float:
  """Largest magnitude of what is a number; JSON has no others."""
  return float(np.abs(x).max(initial=0, where=np.isfinite(x)))


def _argmax(parts: list[np.ndarray]) -> np.ndarray:
  """Id of the largest logit, from the largest of every part."""
  values, ids = np.stack(parts, axis=1)
  best = values.argmax(0)
  return np.take_along_axis(ids, best[None], 0)[0]


def _rows(model: Opened) -> int:
  return model.leaves['embedding'].shape[0]


def _leaves(source: Opened, destination: Opened, step) -> list[dict[str, Any]]:
  rows = []
  for name in sorted(source.leaves.keys() | destination.leaves.keys()):
    row: dict[str, Any] = {'leaf': name}
    arrays = []
    for side, model in (('source', source), ('destination', destination)):
      if name not in model.leaves:
        row[side] = None
        continue
      array = model.load(name)
      arrays.append(array)
      row[side] = {'tensors': list(model.origin[name]), **_array(array)}
    row['result'] = _result(*arrays) if len(arrays) == 2 else DIFFERENT
    rows.append(row)
    if name in source.leaves:
      step(f'compared {name}')
  return rows


def _extra(source: Opened, destination: Opened, step) -> list[dict[str, Any]]:
  """Tensors beyond the decoder; a destination that has none left them out."""
  rows = []
  for name in sorted(source.extra.keys() | destination.extra.keys()):
    row: dict[str, Any] = {'leaf': name, 'result': 'left out'}
    arrays = []
    for side, model in (('source', source), ('destination', destination)):
      row[side] = None
      if name in model.extra:
        arrays.append(model.load_extra(name))
        row[side] = {'tensors': [name], **_array(arrays[-1])}
    if len(arrays) == 2:
      row['result'] = _result(*arrays)
    elif destination.extra:
      row['result'] = DIFFERENT
    rows.append(row)
    if name in source.extra:
      step(f'compared {name}')
  return rows


def _array(array: np.ndarray) -> dict[str, Any]:
  return {
    'shape': list(array.shape),
    'dtype': str(array.dtype),
    'crc32': f'{zlib.crc32(_view(array)):08x}',
  }


def _view(array: np.ndarray) -> memoryview:
  """The bytes of an array where they are: a copy would be a tensor more."""
  return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _result(a: np.ndarray, b: np.ndarray) -> str:
  """How the destination's leaf comes from the source's."""
  said = []
  if a.shape != b.shape and a.shape[1:] == b.shape[1:] and a.ndim == 2:
    rows = min(len(a), len(b))
    said.append(f'{rows} common rows')
    a, b = a[:rows], b[:rows]
  if a.shape != b.shape:
    return DIFFERENT
  if a.dtype != b.dtype:
    said.append(f'cast to {b.dtype}')
    a = a.astype(b.dtype)
  if _view(a) != _view(b):
    return DIFFERENT
  return ', '.join(said) or IDENTICAL


def _settings(ours: Config, theirs: Config) -> dict[str, Any]:
  """Fields of the two configs that make different functions."""
  a, b = to_json(ours), to_json(theirs)
  fields = set(hf_facts.differing(ours, theirs)) - {'vocab_size'}
  if 'local' in ours.pattern and ours.window_self != theirs.window_self:
    fields.add('window_self')
  return {field: [a[field], b[field]] for field in sorted(fields)}


def _side(model: Opened) -> dict[str, Any]:
  return {
    'path': str(model.path),
    'format': model.format,
    'config': to_json(model.config),
  }


def _text(facts: Mapping[str, Any]) -> Iterator[str]:
  """Lines for people."""
  yield facts['verdict']
  yield ''
  for side in ('source', 'destination'):
    yield f'{side:<12} {facts[side]["format"]:<9} {facts[side]["path"]}'
  for name, (a, b) in facts['config'].items():
    yield f'config {name}: {a!r} in the source, {b!r} in the destination'
  yield ''
  if (found := facts['probe']) is not None:
    rows, length, vocabulary = found['shape']
    yield f'probe        {rows} x {length} tokens, {vocabulary} logits each'
    yield f'max |diff|   {found["max_abs_difference"]:.6g}'
    yield f'max |logit|  {found["largest_logit"]:.6g}'
    yield f'same argmax  {found["argmax_agreement"]:.2%}'
    yield ''
  for row in (*facts['leaves'], *facts['extra']):
    yield f'{row["leaf"]}: {row["result"]}'
    for side in ('source', 'destination'):
      if (found := row[side]) is None:
        yield f'  {side:<12} -'
        continue
      shape = ' x '.join(map(str, found['shape'])) or 'scalar'
      yield (
        f'  {side:<12} {found["crc32"]} {found["dtype"]} {shape}'
        f'  {", ".join(found["tensors"])}'
      )
