"""Makes the golden files of Gemma, Gemma 2, Gemma 3 and RecurrentGemma.

  python tests/golden/make_transformers.py [family ...]

Needs torch and transformers (made with 5.23.0 and torch 2.13.0, CPU); reading
the files needs neither. Every number is float32, eager attention.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
import weights
from transformers import (
  Gemma2Config,
  Gemma2ForCausalLM,
  Gemma3ForCausalLM,
  Gemma3TextConfig,
  GemmaConfig,
  GemmaForCausalLM,
  RecurrentGemmaConfig,
  RecurrentGemmaForCausalLM,
)

HERE = Path(__file__).parent
VOCAB, WINDOW = 80, 8
COMMON = dict(
  vocab_size=VOCAB,
  hidden_size=24,
  num_attention_heads=4,
  num_key_value_heads=2,
  head_dim=8,
  intermediate_size=40,
  max_position_embeddings=512,
  attn_implementation='eager',
  pad_token_id=0,
  eos_token_id=1,
  bos_token_id=2,
)
# A query scalar that is not head_dim, caps that bite, layers that leave a
# remainder of the pattern, and sequences three windows long.
FAMILIES = {
  'gemma1': (
    GemmaForCausalLM,
    GemmaConfig(**COMMON | dict(num_hidden_layers=2, num_key_value_heads=1)),
  ),
  'gemma2': (
    Gemma2ForCausalLM,
    Gemma2Config(
      **COMMON,
      num_hidden_layers=5,
      sliding_window=WINDOW,
      query_pre_attn_scalar=12,
      attn_logit_softcapping=2.0,
      final_logit_softcapping=3.0,
    ),
  ),
  'gemma3': (
    Gemma3ForCausalLM,
    Gemma3TextConfig(
      **COMMON,
      num_hidden_layers=7,
      sliding_window=WINDOW,
      query_pre_attn_scalar=12,
      rope_parameters={
        'full_attention': {
          'rope_type': 'linear',
          'factor': 8.0,
          'rope_theta': 1e6,
        },
        'sliding_attention': {'rope_type': 'default', 'rope_theta': 1e4},
      },
    ),
  ),
  'recurrentgemma': (
    RecurrentGemmaForCausalLM,
    RecurrentGemmaConfig(
      **COMMON
      | dict(
        num_attention_heads=3,
        num_key_value_heads=1,
        num_hidden_layers=5,
        intermediate_size=72,  # twice a branch
        lru_width=24,
        attention_window_size=WINDOW,
        logits_soft_cap=3.0,
      )
    ),
  ),
}
SEED = {name: i for i, name in enumerate(FAMILIES)}


def model_of(family: str):
  """The model with our weights, its config as saved, and the checksum."""
  kind, config = FAMILIES[family]
  model = kind(config).eval()
  shapes = {name: tuple(x.shape) for name, x in model.named_parameters()}
  values = weights.tree(SEED[family], shapes)
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      parameter.copy_(torch.from_numpy(values[name]))
  with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    saved = json.loads((Path(folder) / 'config.json').read_text())
  return model, {
    'seed': SEED[family],
    'config': saved,
    'shapes': shapes,
    'sha256': weights.checksum(values),
    'versions': {
      'transformers': transformers.__version__,
      'torch': torch.__version__,
    },
  }


def run(model, tokens, position=None, mask=None):
  with torch.no_grad():
    return model(
      input_ids=torch.from_numpy(tokens).long(),
      position_ids=None if position is None else torch.from_numpy(position),
      attention_mask=None if mask is None else torch.from_numpy(mask),
      use_cache=False,
    ).logits.numpy()


def plain(model):
  """Logits, the mean next-token loss and its gradient."""
  tokens = weights.tokens(10, 2, 26, VOCAB)
  out = {'plain/tokens': tokens, 'plain/logits': run(model, tokens)}
  ids = torch.from_numpy(tokens).long()
  logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
  loss = torch.nn.functional.cross_entropy(
    logits.reshape(-1, VOCAB), ids[:, 1:].reshape(-1)
  )
  loss.backward()
  out['loss'] = loss.detach().numpy()
  for name, parameter in model.named_parameters():
    out[f'grad/{name}'] = parameter.grad.numpy()
  return out


def packed(model):
  """Three documents in a row; positions alone tell transformers so."""
  lengths = (17, 14, 9)
  tokens = weights.tokens(11, 1, sum(lengths), VOCAB)
  position = np.concatenate([np.arange(n) for n in lengths])[None]
  segment = np.repeat([1, 2, 3], lengths)[None].astype(np.int32)
  logits = run(model, tokens, position)
  for s in (1, 2, 3):
    columns = segment[0] == s
    alone = run(model, tokens[:, columns])
    assert np.abs(logits[:, columns] - alone).max() < 1e-5
  return {
    'packed/tokens': tokens,
    'packed/position': position.astype(np.int32),
    'packed/segment': segment,
    'packed/logits': logits,
  }


def padded(model):
  """A left-padded row and a right-padded row; logits of real tokens only."""
  tokens = weights.tokens(12, 2, 26, VOCAB)
  mask = np.ones_like(tokens)
  mask[0, :7], mask[1, -9:] = 0, 0
  tokens[0, 7] = 2
  tokens = np.where(mask, tokens, 0).astype(np.int32)
  position = np.cumsum(mask, axis=1) - 1
  logits = run(model, tokens, np.maximum(position, 0), mask.astype(np.int64))
  return {
    'padded/tokens': tokens,
    'padded/position': np.where(mask, position, -1).astype(np.int32),
    'padded/logits': logits[mask.astype(bool)],
  }


def greedy(model):
  """64 likeliest tokens after two prompts, and by how much they won."""
  found = []
  for seed in range(20, 400):
    prompt = weights.tokens(seed, 1, 11, VOCAB)
    row, margins = prompt, []
    for _ in range(64):
      logits = run(model, row)[0, -1]
      second, first = np.sort(logits)[-2:]
      margins.append(first - second)
      row = np.concatenate([row, [[logits.argmax()]]], axis=1)
    new = row[0, 11:]
    # Continuations that end in one repeated token, or that rounding may turn,
    # test less.
    if min(margins) > 1e-3 and len(set(new[-32:].tolist())) >= 6:
      found.append((prompt[0], new, margins))
    if len(found) == 2:
      break
  prompt, new, margins = zip(*found)
  return {
    'greedy/prompt': np.stack(prompt).astype(np.int32),
    'greedy/tokens': np.stack(new).astype(np.int32),
    'greedy/margin': np.asarray(margins, np.float32),
  }


def main() -> None:
  torch.set_num_threads(1)
  for family in sys.argv[1:] or FAMILIES:
    model, facts = model_of(family)
    data = plain(model) | greedy(model)
    if family != 'recurrentgemma':
      # There, transformers lets pads and earlier documents leak into the state.
      data |= packed(model) | padded(model)
    text = json.dumps(facts, indent=1) + '\n'
    (HERE / f'{family}.json').write_text(text)
    np.savez_compressed(HERE / f'{family}.npz', **data)
    top = np.abs(data['plain/logits']).max()
    print(family, f'largest logit {top:.2f}, loss {data["loss"]:.3f}')


if __name__ == '__main__':
  main()
