"""Do directories go from transformers to alignjax and back, and mean the same?

Run with the project's Python and give it one that has torch and transformers:

  python tests/bench/hf_loads.py /path/to/peer/bin/python

The peer saves a tiny random model of every family (float32 and bfloat16); we
read each and write it again, once with its config.json and once from numbers
alone; the peer loads the results and compares keys, weights and logits.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

SIZES = dict(
  vocab_size=128,
  hidden_size=64,
  intermediate_size=96,
  num_attention_heads=4,
  num_key_value_heads=2,
  head_dim=16,
)
WINDOW = dict(sliding_window=8, query_pre_attn_scalar=24)
ROPE = dict(
  full_attention=dict(rope_type='linear', factor=8.0, rope_theta=1e6),
  sliding_attention=dict(rope_type='default', rope_theta=1e4),
)
GEMMA_3 = dict(
  SIZES,
  **WINDOW,
  num_hidden_layers=7,
  max_position_embeddings=512,
  rope_parameters=ROPE,
)
VISION = dict(
  model_type='siglip_vision_model',
  hidden_size=48,
  intermediate_size=80,
  num_hidden_layers=2,
  num_attention_heads=4,
  image_size=56,
  patch_size=14,
  vision_use_head=False,
)
# Configuration class -> its arguments, model class.
MODELS = {
  'GemmaConfig': (
    dict(SIZES, num_hidden_layers=2, num_key_value_heads=1),
    'GemmaForCausalLM',
  ),
  'Gemma2Config': (
    dict(
      SIZES,
      **WINDOW,
      num_hidden_layers=4,
      attn_logit_softcapping=5.0,
      final_logit_softcapping=3.0,
    ),
    'Gemma2ForCausalLM',
  ),
  'Gemma3TextConfig': (GEMMA_3, 'Gemma3ForCausalLM'),
  'Gemma3Config': (
    dict(
      text_config=dict(GEMMA_3, vocab_size=130, num_hidden_layers=6),
      vision_config=VISION,
      mm_tokens_per_image=4,
      image_token_index=128,
      boi_token_index=126,
      eoi_token_index=127,
    ),
    'Gemma3ForConditionalGeneration',
  ),
  'RecurrentGemmaConfig': (
    dict(
      {k: v for k, v in SIZES.items() if k != 'head_dim'},
      intermediate_size=192,
      num_hidden_layers=3,
      num_key_value_heads=1,
      lru_width=64,
      attention_window_size=8,
      logits_soft_cap=3.0,
    ),
    'RecurrentGemmaForCausalLM',
  ),
}


def make(root: Path) -> None:
  """Peer: saves every model, re-initialised so that nothing is zero."""
  import torch
  import transformers

  for name, (arguments, kind) in MODELS.items():
    torch.manual_seed(0)
    config = getattr(transformers, name)(**arguments)
    model = getattr(transformers, kind)(config)
    with torch.no_grad():
      for key, weight in model.named_parameters():
        if key.endswith('recurrent_param'):
          weight.uniform_(-4, 1)
        else:
          weight.normal_(0, 0.2 if weight.ndim > 1 else 0.3)
    for dtype in (torch.float32, torch.bfloat16):
      path = root / f'{name}-{str(dtype).split(".")[1]}'
      model.to(dtype).save_pretrained(path / 'peer')
    model.to(dtype).save_pretrained(path / 'sharded', max_shard_size='60KB')


def rewrite(root: Path) -> None:
  """Ours: reads every directory and writes it twice."""
  from alignjax.interop import hf

  for path in sorted([*root.glob('*/peer'), *root.glob('*/sharded')]):
    opened = hf.read(path)
    record = opened.provenance['source']
    config = opened.config
    print(
      f'{path.parent.name}/{path.name}: prefix {record["prefix"]!r}, lm_head'
      f' {record["lm_head"]!r}, {len(opened.leaves)} leaves,'
      f' {len(opened.extra)} beyond them, pattern'
      f' {"".join(kind[0] for kind in config.pattern)}, {config.dtype}'
    )
    kept = {**opened.leaves, **opened.extra}
    for label, leaves, source in (
      ('kept', kept, record),
      ('new', opened.leaves, None),
    ):
      target = path.parent / f'{path.name}-{label}'
      with hf.writer(
        target, config, leaves, source=source, shard_bytes=60_000
      ) as put:
        for name in opened.leaves:
          put(name, opened.load(name))
        for name in set(leaves) - set(opened.leaves):
          put(name, opened.load_extra(name))


def load(root: Path) -> None:
  """Peer: loads what we wrote; keys, weights and logits must be the same."""
  import torch
  import transformers

  def open_model(path, kind):
    model, info = kind.from_pretrained(
      path,
      dtype='auto',
      attn_implementation='eager',
      output_loading_info=True,
    )
    problems = {key: sorted(map(str, x)) for key, x in info.items() if x}
    return model.eval(), problems

  tokens = torch.randint(5, 120, (2, 24), generator=torch.manual_seed(1))
  failed = 0
  for path in sorted(root.glob('*/*-*')):
    name = path.parent.name.split('-')[0]
    causal = transformers.AutoModelForCausalLM
    kind = getattr(transformers, MODELS[name][1])
    theirs, _ = open_model(path.parent / path.name.split('-')[0], kind)
    model, problems = open_model(path, causal)
    if path.name.endswith('kept'):
      again, more = open_model(path, kind)
      problems |= more
      a, b = theirs.state_dict(), again.state_dict()
      if [*a] != [*b] or any(
        a[k].dtype != b[k].dtype or not torch.equal(a[k], b[k]) for k in a
      ):
        problems['state_dict'] = 'differs'
    with torch.no_grad():
      gap = (
        theirs(input_ids=tokens, use_cache=False).logits
        - model(input_ids=tokens, use_cache=False).logits
      )
    gap = float(gap.abs().max())
    good = not problems and gap == 0
    failed += not good
    print(
      f'{"ok  " if good else "FAIL"} {path.parent.name}/{path.name}:'
      f' {type(model).__name__}, {model.dtype}, logits differ by {gap:g}'
      f' {json.dumps(problems) if problems else ""}'
    )
  print(f'transformers {transformers.__version__}: {failed} failures')
  sys.exit(failed > 0)


def main() -> None:
  """All three, each in its own process."""
  with tempfile.TemporaryDirectory() as root:
    for python, verb in (
      (sys.argv[1], 'make'),
      (sys.executable, 'rewrite'),
      (sys.argv[1], 'load'),
    ):
      subprocess.run([python, __file__, verb, root], check=True)


if __name__ == '__main__':
  if len(sys.argv) == 3:
    verbs = {'make': make, 'rewrite': rewrite, 'load': load}
    verbs[sys.argv[1]](Path(sys.argv[2]))
  elif len(sys.argv) == 2:
    main()
  else:
    sys.exit(__doc__)
