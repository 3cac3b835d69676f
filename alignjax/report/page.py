"""The page: one offline HTML file from work directories.

Puts findings, front, table, geometry, curves, time, samples and configs in
order and writes them at once. It needs no network and no script: a content
security policy in the file itself forbids both, and the bytes depend on the
inputs alone.
"""

import os
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from alignjax.core import files
from alignjax.report import arms, findings, ink
from alignjax.report.curves import curves_html
from alignjax.report.front import front_svg
from alignjax.report.fronts import diversity_html, wins_html
from alignjax.report.geometry import geometry_html, geometry_lines
from alignjax.report.goodput import goodput_html
from alignjax.report.perplexity import perplexity_html, perplexity_lines
from alignjax.report.points import sweeps
from alignjax.report.read import Found, found
from alignjax.report.samples import samples_html, visible
from alignjax.report.searched import searched_html
from alignjax.report.tables import models_html
from alignjax.report.tradeoff import tradeoff_html

POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def report(
  workdirs: Sequence[str | os.PathLike], out: str | os.PathLike
) -> list[str]:
  """Write one offline HTML file on everything below `workdirs`.

  Args:
    workdirs: directories with `metrics.jsonl` (and `timing.jsonl`,
      `config.json`), `evaluation.json`, `geometry.json` or `perplexity.json`
      in them or below them.
    out: the file to write; an existing one is replaced in one step.

  Returns:
    Lines of findings: those of the first evaluation, or else of the first
    perplexities, or else what the training curves show, or else what the first
    geometry does.

  Raises:
    UserError: nothing to report, malformed input, or `out` cannot be written.
  """
  what = found(workdirs)
  lines = [findings.evaluated(e) for e in what.evaluations.values()]
  lines = lines or [perplexity_lines(p) for p in what.perplexities.values()]
  if not lines and what.runs:
    lines = [findings.trained(what)]
  lines = lines or [geometry_lines(g) for g in what.geometries.values()]
  title = ' · '.join(Path(w).resolve().name or 'report' for w in workdirs)
  files.write(out, html(title, what, lines).encode())
  return lines[0]


def html(title: str, what: Found, lines: list[list[str]]) -> str:
  """The whole page as text."""
  sheet = resources.files('alignjax.report') / 'page.css'
  sections = [_head(title, what, lines[0])]
  for number, (name, evaluation) in enumerate(what.evaluations.items()):
    heading = _whose(name, what.evaluations)
    mine = _findings(lines[number]) if number else ''
    sections.append(_front(heading, mine, evaluation, f'front {number}'))
    sections.append(_models(heading, evaluation))
    if charts := wins_html(evaluation, f'wins {number}'):
      sections.append(_section(f'Win rates against KL{heading}', charts))
    if charts := diversity_html(evaluation, f'diversity {number}'):
      sections.append(_section(f'Diversity{heading}', charts))
    if chart := tradeoff_html(evaluation, f'tradeoff {number}'):
      said = f'One objective against the other{heading}'
      sections.append(_section(said, chart))
    if chart := searched_html(evaluation, f'search {number}'):
      sections.append(_section(f'The search for the numbers{heading}', chart))
  for number, (name, text) in enumerate(what.perplexities.items()):
    heading = f'Perplexity on held-out text{_whose(name, what.perplexities)}'
    charts = perplexity_html(text, f'perplexity {number}')
    sections.append(_section(heading, charts))
  for number, (name, geometry) in enumerate(what.geometries.items()):
    heading = f'How the task vectors lie{_whose(name, what.geometries)}'
    charts = geometry_html(geometry, f'geometry {number}')
    sections.append(_section(heading, charts))
  if curves := curves_html(what.runs):
    note = (
      'The strong line is a running mean over a tenth of the steps, the '
      'faint line is what was logged, the number is where the mean ends.'
    )
    sections.append(_section('Training curves', f'<p>{note}</p>{curves}'))
  if goodput := goodput_html(what.runs):
    sections.append(_section('Where the time went', goodput))
  for name, evaluation in what.evaluations.items():
    if samples := samples_html(evaluation):
      heading = _whose(name, what.evaluations)
      sections.append(_section(f'Completions side by side{heading}', samples))
  if configs := _configs(what):
    sections.append(_section('Configs', configs))
  sections.append(_section('How the numbers are computed', _notes(what)))
  return (
    '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
    f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    '<meta name="color-scheme" content="light dark">\n'
    f'<title>{visible(title)} – alignjax report</title>\n'
    f'<style>\n{sheet.read_text("utf-8")}</style></head>\n<body><main>\n'
    + '\n'.join(sections)
    + '\n</main></body></html>\n'
  )


def _whose(name: str, some: Mapping[str, Any]) -> str:
  """Which of several, after a heading."""
  return f' <small>{visible(name)}</small>' if len(some) > 1 else ''


def _section(heading: str, body: str) -> str:
  return f'<section><h2>{heading}</h2>\n{body}\n</section>'


def _head(title: str, what: Found, lines: list[str]) -> str:
  return (
    f'<header class="top"><p class="brand">alignjax report</p>'
    f'<h1>{visible(title)}</h1><p>{_summary(what)}</p>\n'
    f'{_findings(lines)}</header>'
  )


def _findings(lines: list[str]) -> str:
  items = ''.join(f'<li>{visible(line)}</li>' for line in lines)
  return f'<ol class="findings">{items}</ol>'


def _summary(what: Found) -> str:
  """One paragraph: what was trained, what was evaluated and how."""
  said = []
  if what.runs:
    jobs = [f'{r.name} ({r.steps:,} steps)' for r in what.runs[:8]]
    more = f' and {len(what.runs) - 8} more' if len(what.runs) > 8 else ''
    count = len(what.runs)
    noun = 'job' if count == 1 else 'jobs'
    said.append(f'{count} training {noun}: {", ".join(jobs)}{more}.')
  for name, evaluation in what.evaluations.items():
    where = f' in {name}' if len(what.evaluations) > 1 else ''
    models = len(evaluation['models'])
    text = f'{models} model{"s" if models > 1 else ""} evaluated{where}'
    parts = [
      ('prompts', ' on {} held-out prompts'),
      ('responses', ', {} completions each'),
      ('temperature', ', sampled at temperature {}'),
      ('max_new_tokens', ', at most {} new tokens'),
      ('reference', '; the init that KL and win rate refer to is {}'),
    ]
    for key, words in parts:
      if evaluation.get(key) is not None:
        text += words.format(evaluation[key])
    said.append(text + '.')
  return visible(' '.join(said))


def _front(heading: str, lines: str, evaluation: dict, salt: str) -> str:
  chart = front_svg(evaluation, salt)
  said = 'Bars are 95% intervals in both directions; up and left is better. '
  if paths := sweeps(evaluation):
    each, whose = ('Each', ' of the last') if len(paths) > 1 else ('The', '')
    said += (
      f'{each} green line walks from the init (rate 0) to the merged model '
      f'(rate 1) in weight space; bold green numbers are rates{whose}. '
    )
  if any(map(ink.arm, evaluation['models'])):
    said += (
      'Models of one arm share a colour and a marker; those of an arm with '
      'several are named by the legend, those of a grid by their numbers; '
      'where one number varies a line joins them in its order. '
    )
  if arms.pooled(evaluation) is not evaluation:
    said += (
      'An arm is one marker with its intervals over seeds and prompts, the '
      'small pale ones are its seeds. '
    )
  if evaluation.get('best_of_n'):
    said += (
      'Best of N draws N completions from the init and keeps the best; its KL '
      'is the analytic bound log N − (N − 1)/N.'
    )
  body = (
    f'{lines}<figure class="card wide"><div class="scroll">{chart}</div>'
    f'<figcaption>{said}</figcaption></figure>'
  )
  return _section(f'What alignment gains, and what it costs{heading}', body)


def _models(heading: str, evaluation: dict[str, Any]) -> str:
  note = (
    'Means with 95% intervals in brackets. Bold is the highest mean of reward, '
    'win rate and log-quantile; the other columns have no better direction '
    'of their own. Overlapping intervals do not separate two models.'
  )
  body = f'{models_html(evaluation)}<p class="note">{note}</p>'
  together = arms.pooled(evaluation)
  if together is evaluation:
    return _section(f'All models{heading}', body)
  note = (
    'Means over seeds. The 95% intervals join the spread between the seeds '
    '(Student’s t) with that between prompts, which all seeds share. '
  )
  body = (
    f'{models_html(together)}<p class="note">{note}</p>'
    f'<details><summary>Every seed</summary>{body}</details>'
  )
  return _section(f'All arms{heading}', body)


def _configs(what: Found) -> str:
  out = []
  for name, text in what.documents.items():
    out.append(
      f'<details><summary>{visible(name)}</summary>'
      f'<pre class="config" tabindex="0">\n{visible(text)}</pre></details>'
    )
  return ''.join(out)


def _notes(what: Found) -> str:
  """Short notes on how to read each number; only on what is on the page."""
  notes = []
  evaluations = list(what.evaluations.values())
  fields = {k for e in evaluations for m in e['models'] for k in m}
  told = {
    'reward': 'Reward: mean over held-out prompts and completions. Intervals '
    'are 95% throughout, from the spread between prompts.',
    'kl': 'KL: summed over the tokens of a completion, in nats per sequence, '
    'under the model’s own samples; per token it compares whole '
    'next-token distributions.',
    'kl_sampled': 'KL, sampled: the same quantity from the log-probabilities '
    'of the sampled tokens alone. Same mean, more noise; a check on KL.',
    'win_rate': 'Win rate: how often a completion has a higher reward than '
    'one of the init to the same prompt; a tie counts half.',
    'best_of_4': 'Best (worst) of 4 wins: the same for the best (worst) of 4 '
    'completions of each, over all subsets: what a policy is worth under '
    'best-of-4 sampling, or against an adversary who keeps the worst.',
    'log_quantile': 'Log-quantile: mean log of (1 + completions of the init '
    'that score no higher on the same prompt) / (1 + all of them); at best 0.',
    'diversity': 'Diversity: 1 - cos between the embeddings of two completions '
    'of one prompt, mean over all pairs.',
    'indicators': 'Hack indicators: share of completions that look like a '
    'way around the reward rather than a better answer.',
  }
  notes += [text for key, text in told.items() if key in fields]
  if evaluations:
    notes.append(
      'Findings: a difference is called measurable where its 95% interval '
      'leaves out zero. That interval combines those of both sides as if they '
      'were independent, which is cautious on shared prompts. The best of '
      'several models is picked by the same numbers that it is judged by, so '
      'its score is slightly flattered. Nothing is corrected for the number of '
      'comparisons.'
    )
  if what.runs:
    notes.append(
      'Training curves come from metrics.jsonl and timing.jsonl; rewards there '
      'are of training prompts, while the policy explores. A value that is not '
      'finite leaves a gap. Scales are logarithmic where a positive number '
      'spans more than three orders of magnitude.'
    )
  if what.geometries:
    notes.append(
      'Task vectors: what training added to the weights of the base. Angles '
      'and norms are those of all weights of a layer taken as one vector; '
      'embedding and final norm are on their own, as in SLERP.'
    )
  if any('seconds' in r.timing for r in what.runs):
    notes.append(
      'Speeds and times in steps leave out start-up and compilation, and '
      'whatever ran between jobs.'
    )
  items = ''.join(f'<li>{escape(n)}</li>' for n in notes)
  return f'<ul class="notes">{items}</ul>'
