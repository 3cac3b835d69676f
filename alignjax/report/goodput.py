"""Where the time of each run went: one bar and one row of seconds per run.

From the ledger in timing.jsonl, restarts and lost work included. Goodput is
the share of useful time: steps and what fills their batches. It draws no
conclusion: a slow start is cheap in a long run.
"""

from collections.abc import Sequence
from html import escape

from alignjax.report.curves import duration
from alignjax.report.read import Run

# What the ledger knows, in the order of the bars: colour, heading, useful.
NAMES = {
  'step': ('#0072b2', 'step', True),
  'rollout': ('#009e73', 'rollout', True),
  'score': ('#56b4e9', 'score', True),
  'stages': ('#7a6fb0', 'other stages', True),
  'data': ('#e69f00', 'data wait', False),
  'checkpoint': ('#d55e00', 'checkpoint wait', False),
  'compile': ('#cc79a7', 'compile', False),
  'startup': ('#8b949e', 'start-up', False),
  'other': ('#c3c9d1', 'other', False),
  'lost': ('#a3262a', 'lost work', False),
}
NOTE = (
  'Wall-clock time of every start of a run. A second belongs to what the '
  'device was doing; while it was idle, to compilation, or else to what the '
  'host was doing, so data and rewards count as far as nothing hid them. Lost '
  'work are steps that were done again after a kill, as far as they had been '
  'logged. Goodput is the share of steps, rollout, score and other stages.'
)


def goodput_html(runs: Sequence[Run]) -> str:
  """A table with one row for each run that kept a ledger; '' without any."""
  runs = [run for run in runs if sum(run.spent.values()) > 0]
  if not runs:
    return ''
  known = [n for n in NAMES if any(run.spent.get(n) for run in runs)]
  # A name from a newer ledger is shown, too.
  extra = {name for run in runs for name in run.spent} - set(NAMES)
  names = [*known, *sorted(extra)]
  head = ''.join(
    f'<th scope="col"><i class="swatch" style="background:{_look(name)[0]}">'
    f'</i>{escape(_look(name)[1])}</th>'
    for name in names
  )
  body = '\n'.join(_row(run, names) for run in runs)
  return (
    '<div class="scroll"><table class="models goodput"><thead><tr>'
    '<th scope="col">run</th><th scope="col">goodput</th>'
    f'<th scope="col">wall clock</th>{head}</tr></thead>'
    f'<tbody>{body}</tbody></table></div><p class="note">{NOTE}</p>'
  )


def share(run: Run) -> float:
  """The useful part of all seconds of a run, in [0, 1]."""
  useful = sum(s for name, s in run.spent.items() if _look(name)[2])
  return useful / sum(run.spent.values())


def _row(run: Run, names: Sequence[str]) -> str:
  total = sum(run.spent.values())
  cells = ''.join(_cell(run, name, total) for name in names)
  again = (
    f'<small>{run.lost_steps:,} steps done again</small>'
    if run.lost_steps
    else ''
  )
  return (
    f'<tr><th scope="row">{escape(run.name)}{_bar(run, names, total)}</th>'
    f'<td><b>{100 * share(run):.1f}%</b></td>'
    f'<td>{duration(total)}{again}</td>{cells}</tr>'
  )


def _cell(run: Run, name: str, total: float) -> str:
  seconds = run.spent.get(name, 0.0)
  if not seconds:
    return '<td class="none">–</td>'
  part = f'{100 * seconds / total:.1f}%'
  return f'<td>{part}<small>{duration(seconds)}</small></td>'


def _bar(run: Run, names: Sequence[str], total: float) -> str:
  parts = ''.join(
    f'<i style="width:{100 * seconds / total:.3f}%;background:'
    f'{_look(name)[0]}"></i>'
    for name in names
    if (seconds := run.spent.get(name, 0.0))
  )
  said = escape(f'{run.name}: {100 * share(run):.1f}% useful', quote=True)
  return f'<span class="spent" role="img" aria-label="{said}">{parts}</span>'


def _look(name: str) -> tuple[str, str, bool]:
  return NAMES.get(name, ('#c3c9d1', name, False))
