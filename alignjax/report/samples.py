"""Completions side by side: the same prompt, a few models, their rewards.

Text from models is untrusted: it is escaped, its control characters are made
visible, and long completions scroll. It picks which models to show, never
which completions.
"""

import re
from collections.abc import Sequence
from html import escape
from typing import Any

from alignjax.report import ink
from alignjax.report.findings import best_run
from alignjax.report.points import sweep

OPEN = 3  # prompts shown before the rest is folded


def samples_html(evaluation: dict[str, Any]) -> str:
  """The samples of an evaluation; '' where it holds none."""
  samples = [s for s in evaluation.get('samples') or [] if s.get('responses')]
  if not samples:
    return ''
  names = chosen(evaluation)
  blocks = [_sample(s, names, evaluation) for s in samples]
  out = ''.join(blocks[:OPEN])
  if blocks[OPEN:]:
    rest = len(blocks) - OPEN
    count = f'{rest} more prompts' if rest > 1 else 'One more prompt'
    out += f'<details><summary>{count}</summary>{"".join(blocks[OPEN:])}'
    out += '</details>'
  return out


def chosen(evaluation: dict[str, Any]) -> list[str]:
  """Names of at most four models: init, best run, SLERP, best LITI rate.

  Falls back to the first four that have completions.
  """
  have: list[str] = []
  for sample in evaluation['samples']:
    have += [n for n in sample.get('responses') or {} if n not in have]
  kinds = {m['name']: str(m.get('kind')) for m in evaluation['models']}
  picks = [n for n in have if kinds.get(n) == 'init'][:1]
  run = best_run(evaluation)
  # The ends of the sweep are the init and the merged model, shown already.
  inner = [p for p in sweep(evaluation) if p.rate not in (0.0, 1.0)]
  inner = [p for p in inner if p.name in have]
  # The best run may not have been sampled; another run is the next best.
  runs = [n for n in have if kinds.get(n) == 'run']
  picks += [run.name] if run and run.name in have else runs[:1]
  picks += [n for n in have if kinds.get(n) in ('slerp', 'lerp')][:1]
  picks += [p.name for p in sorted(inner, key=lambda p: -p.y[0])[:1]]
  picks = list(dict.fromkeys(picks))
  return picks if len(picks) > 1 else have[:4]


def visible(text: str) -> str:
  """Escaped text with control characters as their Unicode pictures."""
  text = re.sub(
    r'[\x00-\x08\x0b-\x1f]', lambda m: chr(0x2400 + ord(m[0])), text
  )
  # Half of a surrogate pair cannot be written as UTF-8.
  text = re.sub(r'[\x7f-\x9f\ud800-\udfff\ufffe\uffff]', '\ufffd', text)
  return escape(text)


def _sample(
  sample: dict[str, Any], names: Sequence[str], evaluation: dict[str, Any]
) -> str:
  columns = ''.join(
    _response(n, sample['responses'][n], evaluation)
    for n in names
    if n in sample['responses']
  )
  title = visible(str(sample.get('id', '')))
  prompt = visible(str(sample.get('prompt', '')))
  return (
    f'<article class="sample"><h4>prompt {title}</h4>'
    f'<pre class="prompt" tabindex="0">\n{prompt}</pre>'
    f'<div class="responses">{columns}</div></article>'
  )


def _response(
  name: str, response: dict[str, Any], evaluation: dict[str, Any]
) -> str:
  colour = ink.css(ink.looks(evaluation['models']).get(name))
  reward = response.get('reward')
  score = f'{reward:.2f}' if isinstance(reward, int | float) else '–'
  text = str(response.get('text', ''))
  shown = visible(text) if text.strip() else '<em>(empty)</em>'
  return (
    f'<div class="response" style="--kind:{colour}"><header><b>'
    f'{escape(name)}</b><span>reward {score}</span></header>'
    f'<pre tabindex="0">\n{shown}</pre></div>'
  )
