"""config.json of a Gemma or RecurrentGemma, as a decoder's numbers.

Fields that a file leaves out have the defaults of the class that wrote it, and
old names are read like new ones. A setting that this decoder does not compute
is refused, never dropped. The image side of Gemma 3 is not interpreted.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from alignjax.core.errors import UserError
from alignjax.models.config import Config

Facts = Mapping[str, Any]

# Class defaults, from architecture to architecture; the names are the new ones.
_GEMMA = dict(
  vocab_size=256_000,
  hidden_size=3072,
  intermediate_size=24_576,
  num_hidden_layers=28,
  num_attention_heads=16,
  num_key_value_heads=16,
  head_dim=256,
)
_GEMMA_2 = dict(
  vocab_size=256_000,
  hidden_size=2304,
  intermediate_size=9216,
  num_hidden_layers=26,
  num_attention_heads=8,
  num_key_value_heads=4,
  head_dim=256,
  sliding_window=4096,
  sliding_window_pattern=2,
  query_pre_attn_scalar=256,
  attn_logit_softcapping=50.0,
  final_logit_softcapping=30.0,
)
_GEMMA_3 = _GEMMA_2 | dict(
  vocab_size=262_208,
  sliding_window_pattern=6,
  attn_logit_softcapping=None,
  final_logit_softcapping=None,
)
_RECURRENT = dict(
  vocab_size=256_000,
  hidden_size=2560,
  intermediate_size=3 * 2560,
  num_hidden_layers=26,
  num_attention_heads=10,
  num_key_value_heads=None,
  lru_width=None,
  attention_window_size=2048,
  conv1d_width=4,
  logits_soft_cap=30.0,
  block_types=('recurrent', 'recurrent', 'attention'),
)
DEFAULTS: dict[str, dict[str, Any]] = {
  'gemma': _GEMMA,
  'gemma2': _GEMMA_2,
  'gemma3_text': _GEMMA_3,
  'gemma3': _GEMMA_3,
  'recurrent_gemma': _RECURRENT,
}
_KINDS = {
  'sliding_attention': 'local',
  'full_attention': 'global',
  'recurrent': 'recurrent',
  'attention': 'local',
}
TANH = 'gelu_pytorch_tanh'
EPSILON = 1e-6
# One table, with rows for an image token or to fill tiles, or without.
PADDED_ROWS = ({256_000, 256_128}, {262_144, 262_208})


def config_of(
  facts: Facts, where: str, *, window_self: bool | None = None
) -> Config:
  """The decoder that a config.json describes, in float32.

  Args:
    facts: the parsed file.
    where: its name in errors.
    window_self: see Config; None is the rule that the weights were trained
      with: False for RecurrentGemma, True for the others.

  Raises UserError for an architecture, a setting or a value that is not
  supported.
  """
  model_type = facts.get('model_type')
  if not isinstance(model_type, str) or model_type not in DEFAULTS:
    raise UserError(
      f'{where}: model_type is {model_type!r}, expected one of {list(DEFAULTS)}'
    )
  text = text_facts(facts, where)
  _check_supported(model_type, facts, text, where)
  build = _recurrent if model_type == 'recurrent_gemma' else _gemma
  try:
    config = build(model_type, text, where)
  except UserError as error:
    message = str(error)
    if message.startswith(where):
      raise
    raise UserError(f'{where}: {message}') from None
  if window_self is not None:
    config = dataclasses.replace(config, window_self=window_self)
  return config


def text_facts(facts: Facts, where: str) -> Facts:
  """The part of config.json that is about the decoder."""
  if facts.get('model_type') != 'gemma3':
    return facts
  text = facts.get('text_config', {})
  if not isinstance(text, Mapping):
    raise UserError(f'{where}: text_config is not an object')
  return text


def _gemma(model_type: str, text: Facts, where: str) -> Config:
  values = DEFAULTS[model_type] | dict(text)
  layers = _size(values, 'num_hidden_layers', where)
  pattern = _gemma_pattern(model_type, values, layers, where)
  ropes = {
    kind: _rope(rope, f'{where}: rope of {kind}')
    for kind, rope in _ropes(model_type, text, where).items()
  }
  if ropes['sliding_attention'][1] != 1 and 'local' in pattern:
    raise UserError(
      f'{where}: the rope of sliding_attention is scaled by'
      f' {ropes["sliding_attention"][1]}, which is not supported'
    )
  extra: dict[str, Any] = {}
  if 'local' in pattern:
    extra |= {'window': _size(values, 'sliding_window', where)}
  if model_type != 'gemma':
    scalar = _number(values, 'query_pre_attn_scalar', where)
    extra |= {
      'query_scale': scalar**-0.5,
      'attn_softcap': _cap(values, 'attn_logit_softcapping', where),
      'final_softcap': _cap(values, 'final_logit_softcapping', where),
    }
  return Config(
    vocab_size=_size(values, 'vocab_size', where),
    width=_size(values, 'hidden_size', where),
    hidden=_size(values, 'intermediate_size', where),
    layers=layers,
    heads=_size(values, 'num_attention_heads', where),
    kv_heads=_size(values, 'num_key_value_heads', where),
    head_dim=_size(values, 'head_dim', where, multiple=2),
    pattern=pattern,
    rope_base=ropes['full_attention'][0],
    rope_scale=ropes['full_attention'][1],
    rope_base_local=ropes['sliding_attention'][0],
    qk_norm=model_type.startswith('gemma3'),
    post_norm=model_type != 'gemma',
    **extra,
  )


def _gemma_pattern(
  model_type: str, values: Facts, layers: int, where: str
) -> tuple[str, ...]:
  if model_type == 'gemma':
    return ('global',)
  if values.get('layer_types') is not None:
    kinds = _kinds(values, 'layer_types', where)
    if len(kinds) != layers:
      raise UserError(
        f'{where}: layer_types has {len(kinds)} entries, expected {layers}, the'
        f' number of layers'
      )
    return _period(kinds)
  every = _size(values, 'sliding_window_pattern', where)
  return _period(
    ['local' if (i + 1) % every else 'global' for i in range(layers)]
  )


def _recurrent(model_type: str, text: Facts, where: str) -> Config:
  values = DEFAULTS[model_type] | dict(text)
  if '_block_types' in text and 'block_types' not in text:
    values['block_types'] = text['_block_types']
  layers = _size(values, 'num_hidden_layers', where)
  kinds = _kinds(values, 'block_types', where)
  width = _size(values, 'hidden_size', where)
  heads = _size(values, 'num_attention_heads', where)
  if width % (2 * heads):
    raise UserError(
      f'{where}: hidden_size is {width}, expected a multiple of'
      f' 2 * num_attention_heads = {2 * heads}'
    )
  for name, default in (('num_key_value_heads', heads), ('lru_width', width)):
    if values[name] is None:
      values[name] = default
  rope = _ropes(model_type, text, where)['sliding_attention']
  base, scale = _rope(rope, f'{where}: rope')
  if scale != 1:
    raise UserError(f'{where}: a scaled rope (by {scale}) is not supported')
  fractions = {
    'partial_rotary_factor': 0.5,
    **{k: v for k, v in text.items() if v is not None},
    **{k: v for k, v in rope.items() if v is not None},
  }
  fraction = _number(fractions, 'partial_rotary_factor', where)
  if not 0 < fraction <= 1 or int(fraction * (width // heads)) % 2:
    raise UserError(
      f'{where}: partial_rotary_factor is {fraction}, expected a share that'
      f' makes an even number of {width // heads} channels'
    )
  return Config(
    vocab_size=_size(values, 'vocab_size', where),
    width=width,
    # The file counts both branches.
    hidden=_size(values, 'intermediate_size', where, multiple=2) // 2,
    layers=layers,
    heads=heads,
    kv_heads=_size(values, 'num_key_value_heads', where),
    head_dim=width // heads,
    pattern=_period([kinds[i % len(kinds)] for i in range(layers)]),
    window=_size(values, 'attention_window_size', where),
    window_self=False,
    final_softcap=_number(values, 'logits_soft_cap', where),
    rope_base=base,
    rope_base_local=base,
    rope_fraction=fraction,
    bias=True,
    lru_width=_size(values, 'lru_width', where),
    conv_width=_size(values, 'conv1d_width', where),
    round_embed_scale=True,
    init='griffin',
  )


def _ropes(model_type: str, text: Facts, where: str) -> dict[str, Facts]:
  """Kind of attention -> its rope, with rope_theta, from new or old names."""
  new, old = text.get('rope_parameters') or {}, text.get('rope_scaling') or {}
  for name, rope in (('rope_parameters', new), ('rope_scaling', old)):
    if not isinstance(rope, Mapping):
      raise UserError(f'{where}: {name} is {rope!r}, expected an object')
  theta, kinds = text.get('rope_theta'), ('full_attention', 'sliding_attention')
  by_kind = bool(set(kinds) & set(new))
  if not model_type.startswith('gemma3'):
    if by_kind:
      raise UserError(
        f'{where}: rope_parameters by kind of layer are not supported for'
        f' {model_type}'
      )
    rope = _given({'rope_theta': 10_000.0}, {'rope_theta': theta}, old or new)
    return dict.fromkeys(kinds, rope)
  if new and not by_kind:
    raise UserError(
      f'{where}: rope_parameters has {sorted(new)}, expected {list(kinds)}'
    )
  full, sliding = (new.get(kind) or {} for kind in kinds)
  local = text.get('rope_local_base_freq')
  return {
    'full_attention': _given(
      {'rope_theta': 1_000_000.0}, {'rope_theta': theta}, full, old
    ),
    'sliding_attention': _given(
      {'rope_theta': 10_000.0}, {'rope_theta': local}, sliding
    ),
  }


def _given(*parts: Facts) -> dict[str, Any]:
  """Later parts win where they say something."""
  return {k: v for part in parts for k, v in part.items() if v is not None}


def _rope(rope: Facts, what: str) -> tuple[float, float]:
  """Base and linear scale."""
  kind = rope.get('rope_type', rope.get('type', 'default'))
  if kind not in ('default', 'linear'):
    raise UserError(
      f'{what}: rope_type is {kind!r}, expected default or linear'
    )
  scale = _number(rope, 'factor', what) if kind == 'linear' else 1.0
  return _number(rope, 'rope_theta', what), scale


def _check_supported(
  model_type: str, facts: Facts, text: Facts, where: str
) -> None:
  wrong = [
    f'{name} = {text[name]!r}'
    for name in ('attention_bias', 'use_bidirectional_attention')
    if text.get(name)
  ]
  if facts.get('quantization_config'):
    wrong.append('quantization_config')
  if (epsilon := text.get('rms_norm_eps', EPSILON)) != EPSILON:
    wrong.append(f'rms_norm_eps = {epsilon!r}')
  # The first Gemma said gelu and meant the tanh form; the others say both.
  first = model_type == 'gemma'
  for name in ('hidden_activation', 'hidden_act')[: 2 if first else 1]:
    found = text.get(name) or TANH
    if found != TANH and not (first and found == 'gelu'):
      wrong.append(f'{name} = {found!r}')
  if model_type.startswith('gemma3') and text.get('attn_logit_softcapping'):
    # transformers carries the field and does not apply it.
    wrong.append(f'attn_logit_softcapping = {text["attn_logit_softcapping"]!r}')
  if model_type != 'recurrent_gemma':
    ropes = _ropes(model_type, text, where).values()
    for part in (text, *ropes):
      if part.get('partial_rotary_factor') not in (None, 1, 1.0):
        found = part['partial_rotary_factor']
        wrong.append(f'partial_rotary_factor = {found!r}')
  if wrong:
    raise UserError(
      f'{where}: {", ".join(dict.fromkeys(wrong))} is not supported for'
      f' {model_type}'
    )


def _period(kinds: Sequence[str]) -> tuple[str, ...]:
  """The shortest pattern that, cycled, gives `kinds`."""
  for n in range(1, len(kinds)):
    if all(kind == kinds[i % n] for i, kind in enumerate(kinds)):
      return tuple(kinds[:n])
  return tuple(kinds)


def _kinds(values: Facts, name: str, where: str) -> list[str]:
  names = (
    ('recurrent', 'attention')
    if name == 'block_types'
    else ('sliding_attention', 'full_attention')
  )
  found = values[name]
  good = isinstance(found, list | tuple) and found
  if not good or any(kind not in names for kind in found):
    raise UserError(
      f'{where}: {name} is {found!r}, expected a list of {list(names)}'
    )
  return [_KINDS[kind] for kind in found]


def _size(values: Facts, name: str, where: str, multiple: int = 1) -> int:
  found = values[name]
  if type(found) is not int or not 0 < found < 2**31 or found % multiple:
    kind = 'a positive even number' if multiple == 2 else 'a positive number'
    raise UserError(f'{where}: {name} is {found!r}, expected {kind}')
  return found


def _number(values: Facts, name: str, where: str) -> float:
  found: Any = values.get(name)
  # A bool is an int.
  if type(found) in (int, float) and 0 < found < math.inf:
    return float(found)
  raise UserError(f'{where}: {name} is {found!r}, expected a positive number')


def _cap(values: Facts, name: str, where: str) -> float | None:
  return None if values[name] is None else _number(values, name, where)
