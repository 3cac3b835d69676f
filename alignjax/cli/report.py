"""`alignjax report WORKDIR...`: one offline HTML file, and its findings.

Reads metrics and evaluations that other verbs wrote. It never trains, samples
or loads a model.
"""

from collections.abc import Sequence

from alignjax.cli import console


def main(argv: Sequence[str]) -> int:
  """Write the report and print where it is; returns the exit code.

  Raises UserError for work directories without anything to report, malformed
  input, or --png without anything to draw.
  """
  import argparse
  from pathlib import Path

  parser = argparse.ArgumentParser(
    prog='alignjax report',
    description='One offline HTML file: reward-KL front, table, curves.',
  )
  parser.add_argument('workdir', nargs='*', help='where runs were written')
  parser.add_argument('--out', help='default: report.html in the first WORKDIR')
  parser.add_argument('--png', help='also write the first chart as a small PNG')
  parser.add_argument(
    '--axes',
    nargs=2,
    metavar='NAME',
    help='what the PNG draws to the right and upwards: kl, reward, diversity,'
    ' log_quantile, win_rate, best_of_4, worst_of_4; default: kl and reward,'
    ' or what the evaluation is for (two objectives, perplexity against size)',
  )
  parser.add_argument('--config', help=argparse.SUPPRESS)
  parser.add_argument('--workdir', dest='job', help=argparse.SUPPRESS)
  args = parser.parse_args(argv)
  if args.job:  # as a job: of the graph that it belongs to
    args.workdir.append(str(Path(args.job).parent))
  if not args.workdir:
    parser.error('WORKDIR is needed')

  from alignjax.report import picture, report
  from alignjax.report.read import found

  if args.png:
    axes = tuple(args.axes) if args.axes else None
    picture(found(args.workdir), args.png, axes)
  out = Path(args.out or Path(args.workdir[0]) / 'report.html')
  for line in report(args.workdir, out):
    print(f'- {line}')
  print(f'report: {out}')
  return console.OK


if __name__ == '__main__':
  raise SystemExit(console.call('report', main))
