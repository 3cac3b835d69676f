"""Tiny Hugging Face directories, named and shaped by hand, for tests.

Every name, shape and config field is spelt here as the files have them; the
tables under test are not consulted. Weights are random bits.
"""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import numpy as peer

D, F, N, K, H, V = 16, 10, 2, 1, 6, 20
TEXT = dict(
  vocab_size=V,
  hidden_size=D,
  intermediate_size=F,
  num_attention_heads=N,
  num_key_value_heads=K,
  head_dim=H,
  hidden_activation='gelu_pytorch_tanh',
  rms_norm_eps=1e-06,
)
CONFIGS = {
  'gemma': dict(TEXT, model_type='gemma', num_hidden_layers=2),
  'gemma2': dict(
    TEXT,
    model_type='gemma2',
    num_hidden_layers=3,
    sliding_window=4,
    query_pre_attn_scalar=9,
  ),
  'gemma3_text': dict(
    TEXT,
    model_type='gemma3_text',
    num_hidden_layers=3,
    sliding_window=4,
    sliding_window_pattern=2,
    query_pre_attn_scalar=9,
    rope_scaling=dict(factor=8.0, rope_type='linear'),
  ),
  'recurrent_gemma': dict(
    TEXT,
    model_type='recurrent_gemma',
    intermediate_size=2 * F,
    num_hidden_layers=4,
    attention_window_size=4,
    lru_width=8,
  ),
}
CONFIGS['gemma3'] = dict(
  model_type='gemma3',
  architectures=['Gemma3ForConditionalGeneration'],
  text_config=CONFIGS['gemma3_text'],
  vision_config=dict(model_type='siglip_vision_model', hidden_size=6),
)
VISION = {
  'vision_tower.vision_model.embeddings.patch_embedding.weight': (6, 3, 2, 2),
  'vision_tower.vision_model.encoder.layers.0.mlp.fc1.bias': (5,),
  'multi_modal_projector.mm_input_projection_weight': (6, D),
  'multi_modal_projector.mm_soft_emb_norm.weight': (6,),
}


def shapes(model_type: str, rows: int = V, prefix: str = 'model.') -> dict:
  """Tensor name -> shape, in the order of the layers."""
  if model_type == 'recurrent_gemma':
    return _recurrent(rows)
  out = {f'{prefix}embed_tokens.weight': (rows, D)}
  for i in range(2 if model_type == 'gemma' else 3):
    at = f'{prefix}layers.{i}.'
    out |= {
      f'{at}input_layernorm.weight': (D,),
      f'{at}self_attn.q_proj.weight': (N * H, D),
      f'{at}self_attn.k_proj.weight': (K * H, D),
      f'{at}self_attn.v_proj.weight': (K * H, D),
      f'{at}self_attn.o_proj.weight': (D, N * H),
      f'{at}post_attention_layernorm.weight': (D,),
      f'{at}mlp.gate_proj.weight': (F, D),
      f'{at}mlp.up_proj.weight': (F, D),
      f'{at}mlp.down_proj.weight': (D, F),
    }
    if model_type != 'gemma':
      out[f'{at}pre_feedforward_layernorm.weight'] = (D,)
      out[f'{at}post_feedforward_layernorm.weight'] = (D,)
    if model_type.startswith('gemma3'):
      out[f'{at}self_attn.q_norm.weight'] = (H,)
      out[f'{at}self_attn.k_norm.weight'] = (H,)
  return out | {f'{prefix}norm.weight': (D,)}


def _recurrent(rows: int) -> dict:
  E, b = 8, 4  # lru_width, and its share of one of the two heads
  out = {'model.embed_tokens.weight': (rows, D)}
  for i in range(4):
    at = f'model.layers.{i}.'
    block = f'{at}temporal_block.'
    out |= {
      f'{at}temporal_pre_norm.weight': (D,),
      f'{at}channel_pre_norm.weight': (D,),
      f'{at}mlp_block.gate_proj.weight': (F, D),
      f'{at}mlp_block.gate_proj.bias': (F,),
      f'{at}mlp_block.up_proj.weight': (F, D),
      f'{at}mlp_block.up_proj.bias': (F,),
      f'{at}mlp_block.down_proj.weight': (D, F),
      f'{at}mlp_block.down_proj.bias': (D,),
    }
    if i == 2:
      out |= {
        f'{block}q_proj.weight': (D, D),
        f'{block}k_proj.weight': (D // N, D),
        f'{block}v_proj.weight': (D // N, D),
        f'{block}o_proj.weight': (D, D),
        f'{block}o_proj.bias': (D,),
      }
    else:
      out |= {
        f'{block}linear_x.weight': (E, D),
        f'{block}linear_x.bias': (E,),
        f'{block}linear_y.weight': (E, D),
        f'{block}linear_y.bias': (E,),
        f'{block}linear_out.weight': (D, E),
        f'{block}linear_out.bias': (D,),
        f'{block}conv_1d.weight': (E, 1, 4),
        f'{block}conv_1d.bias': (E,),
        f'{block}rg_lru.recurrent_param': (E,),
        f'{block}rg_lru.input_gate_weight': (N, b, b),
        f'{block}rg_lru.input_gate_bias': (N, b),
        f'{block}rg_lru.recurrent_gate_weight': (N, b, b),
        f'{block}rg_lru.recurrent_gate_bias': (N, b),
      }
  return out | {'model.final_norm.weight': (D,)}


def values(names: dict, dtype='float32', seed: int = 0) -> dict:
  """Random bits of every shape: no rounding goes unseen."""
  rng = np.random.default_rng(seed)
  kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
  return {
    name: np.frombuffer(
      rng.bytes(int(np.prod(shape)) * kind.itemsize), kind
    ).reshape(shape)
    for name, shape in names.items()
  }


def write(path: Path, config: dict, tensors: dict, shards: int = 1) -> Path:
  """A directory as save_pretrained leaves it, `shards` files and an index."""
  path.mkdir(parents=True)
  (path / 'config.json').write_text(json.dumps(config, indent=2) + '\n')
  if shards == 1:
    peer.save_file(tensors, path / 'model.safetensors', {'format': 'pt'})
    return path
  weight_map = {}
  for i in range(shards):
    file = f'model-{i + 1:05d}-of-{shards:05d}.safetensors'
    part = {name: tensors[name] for name in list(tensors)[i::shards]}
    peer.save_file(part, path / file, {'format': 'pt'})
    weight_map |= dict.fromkeys(part, file)
  facts = {
    'metadata': {'total_size': sum(x.nbytes for x in tensors.values())},
    'weight_map': weight_map,
  }
  (path / 'model.safetensors.index.json').write_text(json.dumps(facts))
  return path


def model(
  path: Path, model_type: str, dtype: str = 'float32', **changes
) -> tuple[Path, dict]:
  """A directory of a family, and its tensors by name."""
  config = CONFIGS[model_type] | {'torch_dtype': dtype} | changes
  tensors = values(shapes(model_type), dtype)
  return write(path, config, tensors), tensors


def stored(path: Path) -> dict:
  """Every tensor of a directory."""
  out = {}
  for file in sorted(path.glob('*.safetensors')):
    out |= peer.load_file(file)
  return out
