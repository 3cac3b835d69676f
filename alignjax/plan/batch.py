"""Shapes of a batch, from the `source` section of a config. Reads no rows."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from alignjax.core.errors import UserError
from alignjax.data.teacher import read_facts


def source_batch(section: Mapping[str, Any], rows: int) -> dict[str, Any]:
  """Shapes of a batch as the `source` section would give it.

  Pools of segments for a source with `documents`, packed rows for one with a
  `length`, prompts for one with `prompt_tokens`, a teacher's records for the
  `rows` that they belong to;
  UserError for others, whose shapes only their data tells.
  """

  def field(dtype, *shape):
    return jax.ShapeDtypeStruct((rows, *shape), dtype)

  if 'documents' in section:
    shape = (2 * section['documents'], section['length'])
    fields = {'response': field(jnp.int32, *shape)}
    fields['mask'] = field(jnp.bool_, *shape)
  elif 'length' in section:
    length = section['length']
    names = ('tokens', 'segment', 'position')
    fields = {name: field(jnp.int32, length) for name in names}
    fields['loss_mask'] = field(jnp.bool_, length)
  elif 'prompt_tokens' in section:
    fields = {'prompt': field(jnp.int32, section['prompt_tokens'])}
    if section.get('uncond') is not None:
      fields['uncond'] = fields['prompt']
    if width := section.get('response_tokens'):
      fields['response'] = field(jnp.int32, 1, width)
      fields['mask'] = field(jnp.bool_, 1, width)
  elif section['name'] == 'teacher.recorded':
    fields = source_batch(section['rows'], rows)
    length = fields['tokens'].shape[1]
    k = read_facts(Path(section['path']))['k']
    fields['teacher_ids'] = field(jnp.int32, length - 1, k)
    fields['teacher_probs'] = field(jnp.float32, length - 1, k)
  else:
    raise UserError(
      f'source {section["name"]!r} says neither `length` nor `prompt_tokens`, '
      'so that the shapes of its batches are not known without its data'
    )
  return fields | {'id': field(jnp.int32)}
