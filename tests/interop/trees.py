"""Tiny random models and the trees that DeepMind's code would hold of them.

Written out by hand, tensor by tensor, so that the tables under test are not
their own witnesses.
"""

import dataclasses

import jax
import numpy as np
import orbax.checkpoint as ocp

from alignjax.models.gemma import gemma
from alignjax.models.recurrentgemma import recurrentgemma
from alignjax.models.shapes import shapes

SIZES = dict(vocab_size=40, width=16, hidden=24, heads=4, head_dim=8)
CONFIGS = {
  'gemma1': gemma(family='gemma1', layers=2, kv_heads=1, **SIZES),
  'fused': gemma(family='gemma1', layers=2, kv_heads=4, **SIZES),
  'gemma2': gemma(family='gemma2', layers=4, kv_heads=2, **SIZES),
  'gemma3': gemma(family='gemma3', layers=6, kv_heads=2, window=1024, **SIZES),
  'griffin': dataclasses.replace(
    recurrentgemma(vocab_size=40, width=16, hidden=24, heads=4, layers=5),
    head_dim=4,
  ),
}


def leaves(config, seed=0, dtype=np.float32):
  """Canonical leaves of a decoder, none of them 0."""
  draw = np.random.default_rng(seed).normal
  return {
    name: (draw(size=x.shape) * 0.3).astype(dtype)
    for name, x in sorted(shapes(config).items())
  }


def nested(config, of, transposed=False):
  """The nested layout of canonical leaves, by name."""
  out = {
    'embedder/input_embedding': of['embedding'],
    'final_norm/scale': of['final_norm'],
  }
  for i in range(config.layers):
    own = {
      name.removeprefix(f'layer_{i}/'): x
      for name, x in of.items()
      if name.startswith(f'layer_{i}/')
    }
    if 'recurrent' in config.pattern:
      out |= {f'blocks.{i}/{k}': x for k, x in _griffin(own).items()}
    else:
      layer = _gemma(own, transposed)
      out |= {f'layer_{i}/{k}': x for k, x in layer.items()}
  return out


def _gemma(own, transposed):
  heads_first = lambda x: np.stack(  # noqa: E731
    [x[:, n] for n in range(x.shape[1])]
  )
  q, k, v = (heads_first(own[f'attn/{x}']) for x in 'qkv')
  gating = [own['ffw/gate'], own['ffw/up']]
  if transposed:
    gating = [x.T for x in gating]
  out = {
    'attn/attn_vec_einsum/w': own['attn/o'],
    'mlp/gating_einsum': np.stack(gating),
    'mlp/linear': own['ffw/down'],
    'pre_attention_norm/scale': own['pre_attn_norm'],
    'pre_ffw_norm/scale': own['pre_ffw_norm'],
  }
  if len(q) == len(k):
    out['attn/qkv_einsum/w'] = np.stack([q, k, v])
  else:
    out['attn/q_einsum/w'] = q
    out['attn/kv_einsum/w'] = np.stack([k, v])
  for ours, theirs in (
    ('attn/q_norm', 'attn/_query_norm/scale'),
    ('attn/k_norm', 'attn/_key_norm/scale'),
    ('post_attn_norm', 'post_attention_norm/scale'),
    ('post_ffw_norm', 'post_ffw_norm/scale'),
  ):
    if ours in own:
      out[theirs] = own[ours]
  return out


def _griffin(own):
  width = own['pre_ffw_norm'].shape[0]
  out = {
    'channel_pre_norm/scale': own['pre_ffw_norm'],
    'mlp_block/ffw_up/w': np.stack([own['ffw/gate'], own['ffw/up']]),
    'mlp_block/ffw_up/b': np.stack([own['ffw/gate_bias'], own['ffw/up_bias']])[
      :, None, None
    ],
    'mlp_block/ffw_down/kernel': own['ffw/down'],
    'mlp_block/ffw_down/bias': own['ffw/down_bias'],
  }
  if 'attn/q' in own:
    block = 'attention_block'
    out['temporal_pre_norm/scale'] = own['pre_attn_norm']
    for x in 'qkv':
      out[f'{block}/proj_{x}/kernel'] = own[f'attn/{x}'].reshape(width, -1)
    out[f'{block}/proj_final/kernel'] = own['attn/o'].reshape(-1, width)
    out[f'{block}/proj_final/bias'] = own['attn/o_bias']
    return out
  block = 'recurrent_block'
  out['temporal_pre_norm/scale'] = own['pre_recurrent_norm']
  for x in ('x', 'y', 'out'):
    out[f'{block}/linear_{x}/kernel'] = own[f'recurrent/{x}']
    out[f'{block}/linear_{x}/bias'] = own[f'recurrent/{x}_bias']
  out[f'{block}/conv_1d/w'] = own['recurrent/conv']
  out[f'{block}/conv_1d/b'] = own['recurrent/conv_bias']
  out[f'{block}/rg_lru/a_param'] = own['recurrent/a_param']
  for gate in ('input_gate', 'a_gate'):
    out[f'{block}/rg_lru/{gate}/w'] = own[f'recurrent/{gate}']
    out[f'{block}/rg_lru/{gate}/b'] = own[f'recurrent/{gate}_bias']
  return out


def flat(names, prefix=''):
  """The flat layout: one dict per module, whose key has slashes."""
  out = {}
  for name, x in names.items():
    if '/mlp/' in name:
      name += '/w'
    root = '' if name.startswith('SigLiP') else 'transformer/'
    module, _, leaf = f'{prefix}{root}{name}'.rpartition('/')
    out.setdefault(module, {})[leaf] = x
  return out


def stacked(names, pattern):
  """The stacked layout, flat: layers of a kind along a leading axis."""
  layers = {}
  out = {}
  for name, x in names.items():
    if not name.startswith('layer_'):
      out[name] = x
      continue
    number, _, inner = name.removeprefix('layer_').partition('/')
    repeat, kind = divmod(int(number), pattern)
    layers.setdefault((kind, inner), {})[repeat] = x
  for (kind, inner), of in layers.items():
    out[f'stacked_layers/attention_type_{kind}/{inner}'] = np.stack(
      [of[i] for i in range(len(of))]
    )
  return flat(out)


def save(path, params, kind='standard'):
  """By one of Orbax's checkpointers."""
  params = jax.tree.map(np.asarray, params)
  if kind == 'standard':
    with ocp.StandardCheckpointer() as checkpointer:
      checkpointer.save(path, params)
    return path
  handler = ocp.PyTreeCheckpointHandler(
    use_ocdbt=kind != 'zarr', use_zarr3=kind == 'zarr3'
  )
  with ocp.Checkpointer(handler) as checkpointer:
    checkpointer.save(path, params)
  return path
