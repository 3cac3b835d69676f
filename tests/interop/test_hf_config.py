import dataclasses
import json

import pytest

from alignjax.core.errors import UserError
from alignjax.interop import hf_config, hf_facts
from alignjax.models.config import Config, from_json, to_json

# As published, in the names of the release that wrote them.
GEMMA_2B = dict(
  architectures=['GemmaForCausalLM'],
  attention_bias=False,
  attention_dropout=0.0,
  head_dim=256,
  hidden_act='gelu',
  hidden_activation=None,
  hidden_size=2048,
  intermediate_size=16384,
  model_type='gemma',
  num_attention_heads=8,
  num_hidden_layers=18,
  num_key_value_heads=1,
  rms_norm_eps=1e-06,
  rope_scaling=None,
  rope_theta=10000.0,
  torch_dtype='bfloat16',
  vocab_size=256000,
)
GEMMA_2_27B = dict(
  model_type='gemma2',
  attn_logit_softcapping=50.0,
  final_logit_softcapping=30.0,
  head_dim=128,
  hidden_act='gelu_pytorch_tanh',
  hidden_activation='gelu_pytorch_tanh',
  hidden_size=4608,
  intermediate_size=36864,
  num_attention_heads=32,
  num_hidden_layers=46,
  num_key_value_heads=16,
  query_pre_attn_scalar=144,
  rope_theta=10000.0,
  sliding_window=4096,
  sliding_window_size=4096,
  vocab_size=256000,
)
GEMMA_3_4B = dict(
  architectures=['Gemma3ForConditionalGeneration'],
  model_type='gemma3',
  image_token_index=262144,
  text_config=dict(
    hidden_size=2560,
    intermediate_size=10240,
    model_type='gemma3_text',
    num_hidden_layers=34,
    rope_scaling=dict(factor=8.0, rope_type='linear'),
    sliding_window=1024,
  ),
  torch_dtype='bfloat16',
  vision_config=dict(hidden_size=1152, model_type='siglip_vision_model'),
)
RECURRENT_2B = dict(
  architectures=['RecurrentGemmaForCausalLM'],
  _block_types=['recurrent', 'recurrent', 'attention'],
  attention_window_size=2048,
  conv1d_width=4,
  embeddings_scale_by_sqrt_dim=True,
  head_dim=256,
  hidden_activation='gelu_pytorch_tanh',
  hidden_size=2560,
  intermediate_size=15360,
  logits_soft_cap=30.0,
  lru_width=2560,
  model_type='recurrent_gemma',
  num_attention_heads=10,
  num_hidden_layers=26,
  num_key_value_heads=1,
  partial_rotary_factor=0.5,
  rope_theta=10000.0,
  vocab_size=256000,
  w_init_variance_scale=0.01,
)
FILES = [GEMMA_2B, GEMMA_2_27B, GEMMA_3_4B, RECURRENT_2B]

GEMMA_3 = Config(
  vocab_size=262208,
  width=2560,
  hidden=10240,
  layers=34,
  heads=8,
  kv_heads=4,
  head_dim=256,
  pattern=('local',) * 5 + ('global',),
  window=1024,
  query_scale=1 / 16,
  rope_base=1e6,
  rope_base_local=1e4,
  rope_scale=8.0,
  qk_norm=True,
  post_norm=True,
)
RECURRENT = Config(
  vocab_size=256000,
  width=2560,
  hidden=7680,
  layers=26,
  heads=10,
  kv_heads=1,
  head_dim=256,
  pattern=('recurrent', 'recurrent', 'local'),
  window=2048,
  window_self=False,
  query_scale=1 / 16,
  final_softcap=30.0,
  rope_fraction=0.5,
  bias=True,
  lru_width=2560,
  conv_width=4,
  round_embed_scale=True,
  init='griffin',
)


def config_of(facts, **more):
  return hf_config.config_of(facts, 'dir/config.json', **more)


def gemma3(**changes):
  return {
    **GEMMA_3_4B,
    'text_config': {**GEMMA_3_4B['text_config'], **changes},
  }


def test_first_gemma():
  assert config_of(GEMMA_2B) == Config(
    vocab_size=256000,
    width=2048,
    hidden=16384,
    layers=18,
    heads=8,
    kv_heads=1,
    head_dim=256,
  )


def test_gemma_2_alternates_and_scales_by_its_own_number():
  config = config_of(GEMMA_2_27B)
  assert config.pattern == ('local', 'global')
  assert config.query_scale == pytest.approx(1 / 12)
  assert (config.attn_softcap, config.final_softcap) == (50, 30)
  assert (config.window, config.head_dim, config.hidden) == (4096, 128, 36864)
  assert config.post_norm and not config.qk_norm


def test_gemma_3_is_filled_from_class_defaults():
  assert config_of(GEMMA_3_4B) == GEMMA_3


def test_recurrentgemma_counts_both_branches():
  assert config_of(RECURRENT_2B) == RECURRENT


def test_window_rule_may_be_overridden():
  assert config_of(RECURRENT_2B, window_self=True).window_self
  assert config_of(RECURRENT_2B, window_self=True).span == 2048
  assert config_of(RECURRENT_2B).span == 2049


@pytest.mark.parametrize('model_type', hf_config.DEFAULTS)
def test_a_file_with_nothing_is_the_class(model_type):
  expected = {
    'gemma': (28, 3072, 24576, 16, 16),
    'gemma2': (26, 2304, 9216, 8, 4),
    'gemma3_text': (26, 2304, 9216, 8, 4),
    'gemma3': (26, 2304, 9216, 8, 4),
    'recurrent_gemma': (26, 2560, 3840, 10, 10),
  }
  c = config_of({'model_type': model_type})
  found = (c.layers, c.width, c.hidden, c.heads, c.kv_heads)
  assert found == expected[model_type]


def test_new_rope_names_say_what_the_old_ones_say():
  new = dict(
    full_attention=dict(rope_type='linear', factor=8.0, rope_theta=1e6),
    sliding_attention=dict(rope_type='default', rope_theta=1e4),
  )
  assert config_of(gemma3(rope_parameters=new, rope_scaling=None)) == GEMMA_3
  old = gemma3(rope_theta=5e5, rope_local_base_freq=2e4)
  config = config_of(old)
  assert (config.rope_base, config.rope_base_local) == (5e5, 2e4)
  assert config.rope_scale == 8
  # Very old files say 'type'.
  legacy = gemma3(rope_scaling=dict(type='linear', factor=4.0))
  assert config_of(legacy).rope_scale == 4


def test_rope_of_recurrentgemma_in_either_place():
  facts = {k: v for k, v in RECURRENT_2B.items() if 'r' != k[0]}
  facts.pop('partial_rotary_factor')
  rope = dict(rope_type='default', rope_theta=3e4, partial_rotary_factor=0.25)
  config = config_of({**facts, 'rope_parameters': rope})
  assert (config.rope_base_local, config.rope_fraction) == (3e4, 0.25)
  assert config_of({**facts, 'partial_rotary_factor': 0.75}).rope_fraction == (
    0.75
  )
  assert config_of(facts).rope_fraction == 0.5


LOCAL, GLOBAL = 'sliding_attention', 'full_attention'


@pytest.mark.parametrize(
  'changes, kinds',
  [
    (dict(layer_types=[LOCAL, LOCAL, GLOBAL] * 2), 'llg'),
    (dict(layer_types=[LOCAL, LOCAL, GLOBAL, LOCAL]), 'llg'),
    (dict(layer_types=[GLOBAL, GLOBAL, LOCAL, GLOBAL, LOCAL]), 'gglgl'),
    (dict(layer_types=[LOCAL] * 4), 'l'),
    (dict(sliding_window_pattern=3, num_hidden_layers=7), 'llg'),
    (dict(layer_types=None, num_hidden_layers=13), 'lllllg'),
    # No global layer is reached.
    (dict(num_hidden_layers=5), 'l'),
  ],
)
def test_layer_types_become_the_shortest_pattern(changes, kinds):
  layers = len(changes.get('layer_types') or ())
  config = config_of(gemma3(**{'num_hidden_layers': layers, **changes}))
  assert ''.join(kind[0] for kind in config.pattern) == kinds


@pytest.mark.parametrize(
  'facts, parts',
  [
    ({'model_type': 'llama'}, ["'llama'", 'gemma3_text', 'recurrent_gemma']),
    ({}, ['model_type', 'None', 'recurrent_gemma']),
    ({'model_type': ['gemma']}, ['model_type', 'recurrent_gemma']),
    ({**GEMMA_2B, 'attention_bias': True}, ['attention_bias']),
    (gemma3(use_bidirectional_attention=True), ['use_bidirectional']),
    ({**GEMMA_2B, 'hidden_act': 'silu'}, ["hidden_act = 'silu'"]),
    ({**GEMMA_2_27B, 'hidden_activation': 'gelu'}, ['hidden_activation']),
    ({**GEMMA_2B, 'rms_norm_eps': 1e-5}, ['rms_norm_eps = 1e-05']),
    ({**GEMMA_2B, 'quantization_config': {'bits': 4}}, ['quantization']),
    (gemma3(attn_logit_softcapping=50.0), ['attn_logit_softcapping']),
    (gemma3(partial_rotary_factor=0.5), ['partial_rotary_factor']),
    (gemma3(rope_scaling=dict(rope_type='yarn', factor=2.0)), ["'yarn'"]),
    (gemma3(rope_scaling=dict(rope_type='linear')), ['factor', 'None']),
    (gemma3(rope_scaling='linear'), ['rope_scaling']),
    (gemma3(rope_parameters=dict(rope_theta=1e4)), ['rope_parameters']),
    # Its local layers would be scaled as well.
    (
      {**GEMMA_2_27B, 'rope_scaling': dict(type='linear', factor=2.0)},
      ['sliding_attention', '2.0'],
    ),
    (
      {**RECURRENT_2B, 'rope_scaling': dict(type='linear', factor=2.0)},
      ['scaled', '2.0'],
    ),
    ({**GEMMA_2B, 'hidden_size': '2048'}, ["hidden_size is '2048'"]),
    ({**GEMMA_2B, 'num_hidden_layers': 0}, ['num_hidden_layers is 0']),
    ({**GEMMA_2B, 'head_dim': 2**70}, ['head_dim is 118059']),
    ({**GEMMA_2B, 'num_hidden_layers': True}, ['num_hidden_layers is True']),
    ({**GEMMA_2B, 'head_dim': 15}, ['head_dim is 15', 'even']),
    ({**GEMMA_2B, 'num_key_value_heads': 3}, ['kv_heads = 3']),
    ({**GEMMA_2B, 'rope_theta': 'x'}, ['rope_theta']),
    (gemma3(layer_types=[LOCAL]), ['layer_types has 1', '34']),
    (gemma3(layer_types=['chunked'] * 34), ['layer_types', 'chunked']),
    ({**GEMMA_3_4B, 'text_config': 3}, ['text_config']),
    ({**RECURRENT_2B, '_block_types': []}, ['block_types']),
    ({**RECURRENT_2B, 'intermediate_size': 15361}, ['15361', 'even']),
    ({**RECURRENT_2B, 'hidden_size': 2561}, ['2561', '20']),
    ({**RECURRENT_2B, 'partial_rotary_factor': 0.34}, ['0.34', '256']),
    ({**RECURRENT_2B, 'partial_rotary_factor': 1.5}, ['1.5', '256']),
  ],
)
def test_what_is_not_supported_is_refused(facts, parts):
  with pytest.raises(UserError) as caught:
    config_of(facts)
  for part in ('dir/config.json', *parts):
    assert part in str(caught.value)


def test_several_settings_are_named_at_once():
  facts = {**GEMMA_2B, 'attention_bias': True, 'rms_norm_eps': 1.0}
  with pytest.raises(UserError, match='attention_bias.*rms_norm_eps'):
    config_of(facts)


SMALL = [
  dict(),
  dict(rope_base=5e5, rope_base_local=5e5, rope_scale=4.0),
  dict(
    pattern=['local', 'global'],
    window=8,
    query_scale=144**-0.5,
    attn_softcap=5.0,
    final_softcap=None,
    post_norm=True,
  ),
  dict(
    pattern=['local', 'local', 'global', 'local', 'global'],
    window=8,
    query_scale=168**-0.5,
    rope_base=1e6,
    rope_scale=8.0,
    final_softcap=3.0,
    qk_norm=True,
    post_norm=True,
  ),
]


def small(**more) -> Config:
  return from_json(
    dict(
      vocab_size=128,
      width=64,
      hidden=96,
      layers=7,
      heads=4,
      kv_heads=2,
      head_dim=16,
    )
    | more
  )


@pytest.mark.parametrize(
  'config',
  [*(small(**x) for x in SMALL), RECURRENT],
  ids=['gemma', 'scaled', 'gemma2', 'gemma3_text', 'recurrent_gemma'],
)
def test_written_file_reads_back(config):
  facts = hf_facts.facts_of(config, 'out', dtype='bfloat16')
  facts = json.loads(json.dumps(facts))
  assert facts['torch_dtype'] == facts['dtype'] == 'bfloat16'
  found = config_of(facts)
  assert hf_facts.differing(config, found) == []
  # As old and as new releases see it.
  old = {k: v for k, v in facts.items() if k not in ('rope_parameters',)}
  assert hf_facts.differing(config, config_of(old)) == []
  new = {
    k: v
    for k, v in facts.items()
    if k not in ('rope_theta', 'rope_scaling', 'rope_local_base_freq')
    and k not in ('sliding_window_pattern', '_block_types')
  }
  assert hf_facts.differing(config, config_of(new)) == []


@pytest.mark.parametrize(
  'change, field',
  [
    (dict(final_softcap=3.0), 'final_softcap'),
    (dict(query_scale=0.3), 'query_scale'),
    (dict(pattern=['local', 'global'], window=4), 'pattern'),
    (dict(rope_fraction=0.5), 'rope_fraction'),
    (dict(post_norm=True, window_self=False, pattern=['local']), 'window_self'),
    (dict(qk_norm=True), 'post_norm'),
  ],
)
def test_a_decoder_that_no_family_has_is_refused(change, field):
  with pytest.raises(UserError, match=f'cannot have .*{field} = '):
    hf_facts.facts_of(small(**change), 'out', dtype='float32')


@pytest.mark.parametrize('facts', FILES, ids=lambda x: x['model_type'])
def test_original_file_is_kept(facts):
  config = config_of(facts)
  source = dict(config=facts, dtype='bfloat16', rows=config.vocab_size)

  def kept(config, dtype='bfloat16'):
    return hf_facts.kept(config, 'out', dtype=dtype, source=source)

  before = json.dumps(facts)
  assert json.dumps(kept(config)) == before
  # How it is computed is not in the file.
  faster = dataclasses.replace(config, dtype='bfloat16', remat='full')
  assert json.dumps(kept(faster)) == before
  # The other rule of the same window is not in the file either.
  if facts is RECURRENT_2B:
    other = dataclasses.replace(config, window_self=True)
    assert json.dumps(kept(other)) == before
  wider = kept(dataclasses.replace(config, vocab_size=300000))
  text = wider.get('text_config', wider)
  assert text['vocab_size'] == 300000
  found = kept(config, dtype='float32')
  assert found.get('torch_dtype', 'float32') == 'float32'
  assert json.dumps(facts) == before


def test_original_file_is_overlaid_where_the_decoder_changed():
  source = dict(config=GEMMA_3_4B, dtype='bfloat16', rows=262208)
  config = from_json({**to_json(GEMMA_3), 'window': 512, 'rope_scale': 1.0})
  found = hf_facts.kept(config, 'out', dtype='bfloat16', source=source)
  assert config_of(found) == config
  assert found['vision_config'] == GEMMA_3_4B['vision_config']
  assert found['architectures'] == GEMMA_3_4B['architectures']
