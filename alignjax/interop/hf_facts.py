"""config.json of a decoder that is to be read by transformers.

A file that came with the weights is kept, but for what has changed since.
Without one it is written from the numbers, with the old and the new name of
each, and read back: a decoder that is none of Hugging Face's is refused.
"""

import copy
import math
from typing import Any

from alignjax.core.errors import UserError
from alignjax.interop.hf_config import (
  EPSILON,
  TANH,
  Facts,
  config_of,
)
from alignjax.models.config import FREE, Config, to_json

ARCHITECTURES = {
  'gemma': 'GemmaForCausalLM',
  'gemma2': 'Gemma2ForCausalLM',
  'gemma3_text': 'Gemma3ForCausalLM',
  'recurrent_gemma': 'RecurrentGemmaForCausalLM',
}
# Longest trained text; reading ignores it.
_CONTEXT = {
  'gemma': 8192,
  'gemma2': 8192,
  'gemma3_text': 131_072,
  'recurrent_gemma': 8192,
}
_LAYER_TYPES = {'local': 'sliding_attention', 'global': 'full_attention'}
_BLOCK_TYPES = {'local': 'attention', 'recurrent': 'recurrent'}


def family(config: Config) -> str:
  """The model_type that a decoder is written as."""
  if config.bias or 'recurrent' in config.pattern:
    return 'recurrent_gemma'
  if config.qk_norm:
    return 'gemma3_text'
  return 'gemma2' if config.post_norm else 'gemma'


def facts_of(config: Config, where: str, *, dtype: str) -> dict[str, Any]:
  """config.json of a decoder whose weights are stored as `dtype`.

  Raises UserError if no family of Hugging Face's is such a decoder. A window
  is written as it is: transformers counts the query's own key.
  """
  model_type = family(config)
  facts = _common(config, model_type, dtype)
  facts |= (
    _recurrent_facts(config)
    if model_type == 'recurrent_gemma'
    else _gemma_facts(config, model_type)
  )
  found = config_of(facts, where)
  if fields := differing(config, found):
    ours, theirs = to_json(config), to_json(found)
    what = [f'{f} = {ours[f]} (it has {theirs[f]})' for f in fields]
    raise UserError(
      f'{where}: a {model_type} of Hugging Face cannot have {", ".join(what)}'
    )
  return facts


def kept(
  config: Config, where: str, *, dtype: str, source: Facts
) -> dict[str, Any]:
  """config.json as it was, with what has changed since.

  Args:
    config: the decoder to write.
    where: the file's name in errors.
    dtype: of its weights as stored.
    source: 'config' (the original), and 'dtype' and 'rows' of its embedding.
  """
  facts = copy.deepcopy(dict(source['config']))
  text = facts
  if facts['model_type'] == 'gemma3':
    text = facts.setdefault('text_config', {})
  if set(differing(config, config_of(facts, where))) - {'vocab_size'}:
    new = facts_of(config, where, dtype=dtype)
    text |= {k: new[k] for k in new if k not in ('architectures', 'model_type')}
  if config.vocab_size != source['rows']:
    text['vocab_size'] = config.vocab_size
  for part in (facts, text):
    for name in {'dtype', 'torch_dtype'} & set(part):
      if dtype != source['dtype']:
        part[name] = dtype
  return facts


def differing(a: Config, b: Config) -> list[str]:
  """Fields in which two decoders are not the same function.

  How RecurrentGemma counts its window is not in its files, so it counts for
  the others only.
  """
  ours, theirs = _meaning(a), _meaning(b)
  return [
    field
    for field in dict.fromkeys((*ours, *theirs))
    if not _equal(ours.get(field), theirs.get(field))
  ]


def _equal(a: Any, b: Any) -> bool:
  if isinstance(a, float) and isinstance(b, float):
    return math.isclose(a, b, rel_tol=1e-12)
  return a == b


def _meaning(config: Config) -> dict[str, Any]:
  kinds = [config.kind(i) for i in range(config.layers)]
  idle = set(FREE)
  if 'local' not in kinds:
    idle |= {'window', 'window_self', 'rope_base_local'}
  if 'global' not in kinds:
    idle |= {'rope_base', 'rope_scale'}
  if 'recurrent' not in kinds:
    idle |= {'lru_width', 'conv_width'}
  if family(config) == 'recurrent_gemma':
    idle |= {'window_self'}
  facts = {k: v for k, v in to_json(config).items() if k not in idle}
  return facts | {'pattern': kinds}


def _common(config: Config, model_type: str, dtype: str) -> dict[str, Any]:
  return {
    'architectures': [ARCHITECTURES[model_type]],
    'model_type': model_type,
    'vocab_size': config.vocab_size,
    'hidden_size': config.width,
    'intermediate_size': config.hidden,
    'num_hidden_layers': config.layers,
    'num_attention_heads': config.heads,
    'num_key_value_heads': config.kv_heads,
    'head_dim': config.head_dim,
    'hidden_act': TANH,
    'hidden_activation': TANH,
    'rms_norm_eps': EPSILON,
    'max_position_embeddings': _CONTEXT[model_type],
    'attention_bias': False,
    'attention_dropout': 0.0,
    'initializer_range': 0.02,
    'bos_token_id': 2,
    'eos_token_id': 1,
    'pad_token_id': 0,
    'tie_word_embeddings': True,
    'use_cache': True,
    'dtype': dtype,
    'torch_dtype': dtype,
  }


def _gemma_facts(config: Config, model_type: str) -> dict[str, Any]:
  kinds = [config.kind(i) for i in range(config.layers)]
  full: dict[str, Any] = {'rope_type': 'default'}
  if config.rope_scale != 1:
    full = {'rope_type': 'linear', 'factor': config.rope_scale}
  scaling = dict(full)
  full['rope_theta'] = config.rope_base
  facts: dict[str, Any] = {
    'rope_theta': config.rope_base,
    'rope_scaling': None if config.rope_scale == 1 else scaling,
    'rope_parameters': full,
  }
  if model_type == 'gemma':
    return facts
  facts |= {
    'layer_types': [_LAYER_TYPES.get(kind, kind) for kind in kinds],
    'sliding_window': config.window,
    'query_pre_attn_scalar': _whole(config.query_scale**-2),
    'attn_logit_softcapping': config.attn_softcap,
    'final_logit_softcapping': config.final_softcap,
  }
  if model_type == 'gemma3_text':
    local = {'rope_type': 'default', 'rope_theta': config.rope_base_local}
    facts |= {
      'rope_parameters': {'full_attention': full, 'sliding_attention': local},
      'rope_local_base_freq': config.rope_base_local,
      'sliding_window_pattern': _every(kinds),
    }
  return facts


def _every(kinds: list[str]) -> int:
  """Old releases know only that every so-manieth layer is global."""
  return kinds.index('global') + 1 if 'global' in kinds else len(kinds) + 1


def _recurrent_facts(config: Config) -> dict[str, Any]:
  blocks = [_BLOCK_TYPES.get(kind, kind) for kind in config.pattern]
  return {
    'intermediate_size': 2 * config.hidden,  # of both branches
    'attention_window_size': config.window,
    'block_types': blocks,
    '_block_types': blocks,
    'conv1d_width': config.conv_width,
    'lru_width': config.lru_width,
    'logits_soft_cap': config.final_softcap,
    'partial_rotary_factor': config.rope_fraction,
    'rope_theta': config.rope_base_local,
    'rope_parameters': {
      'rope_type': 'default',
      'rope_theta': config.rope_base_local,
      'partial_rotary_factor': config.rope_fraction,
    },
    'w_init_variance_scale': 0.01,
  }


def _whole(number: float) -> float | int:
  """Files hold 144, not 144.00000000000003."""
  near = round(number)
  return near if math.isclose(number, near, rel_tol=1e-12) else number
