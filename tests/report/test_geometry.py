"""How task vectors lie, from models on disk to what is drawn."""

import json

import numpy as np
import pytest

from alignjax.cli import facts
from alignjax.core.errors import UserError
from alignjax.interop.open import open as open_model
from alignjax.merge.geometry import geometry as measured
from alignjax.models.config import to_json
from alignjax.models.shapes import shapes
from alignjax.report import geometry, ink, read, report
from alignjax.system import model_dir
from tests import tiny
from tests.report import synthetic
from tests.report.test_page import Page

CONFIG = tiny.config(layers=2)
NAMES = ['embedding', 'layer_0', 'layer_1', 'final_norm']


def write(folder, make):
  """A model whose leaves are make(index of the item in all weights)."""
  leaves, begun = {}, 0
  for name, leaf in shapes(CONFIG).items():
    index = np.arange(begun, begun + leaf.size).reshape(leaf.shape)
    leaves[name], begun = np.float32(make(index)), begun + leaf.size
  model_dir.write(
    folder,
    config=to_json(CONFIG),
    params={'policy': leaves.items()},
    provenance={},
  )
  return str(folder)


@pytest.fixture(scope='module')
def models(tmp_path_factory):
  folder = tmp_path_factory.mktemp('models')
  forms = {
    'base': lambda i: 1.0 + 0 * i,
    'even': lambda i: 1.0 + (i % 2 == 0) / 4,
    'same': lambda i: 1.0 + (i % 2 == 0) / 4,
    'odd': lambda i: 1.0 + (i % 2) / 4,
    'back': lambda i: 1.0 - (i % 2 == 0) / 4,
  }
  return {name: write(folder / name, form) for name, form in forms.items()}


def kept(models, folder, *names):
  """As `inspect base --diff names --out` keeps it, and the report reads it."""
  document = facts.difference(
    models['base'], [models[name] for name in names], 'policy'
  )
  path = folder / 'geometry.json'
  folder.mkdir(exist_ok=True)
  path.write_text(json.dumps(document))
  return read.geometry(path)


@pytest.fixture
def figures(monkeypatch):
  """Every figure that is drawn, kept."""
  found, svg = [], ink.svg
  monkeypatch.setattr(ink, 'svg', lambda f, t: found.append(f) or svg(f, t))
  return found


def drawn(figure):
  """[lines, groups]: y of the layers and of the dots at the ends, by x."""
  known: dict[str, dict[float, float]] = {}
  for line in figure.axes[0].lines:
    if line.get_linestyle() in ('-', 'None') and len(line.get_xdata()):
      points = zip(line.get_xdata(), line.get_ydata())
      known.setdefault(str(line.get_color()), {}).update(points)
  return [[of[x] for x in sorted(of)] for of in known.values()]


@pytest.mark.parametrize(
  'names, angles',
  [
    (('even', 'same'), [0]),
    (('even', 'back'), [180]),
    (('even', 'odd'), [90]),
    (('even', 'same', 'back'), [0, 180, 180]),
  ],
)
def test_closed_forms_are_drawn(models, tmp_path, figures, names, angles):
  found = kept(models, tmp_path, *names)
  geometry.geometry_html(found, 'x')
  lines = drawn(figures[0])
  assert lines == [[angle] * 4 for angle in angles]
  low, high = figures[0].axes[0].get_ylim()
  assert low < min(90, *angles) and max(90, *angles) < high
  # Half of the items have moved by a quarter of the base's ones.
  for line in drawn(figures[1]):
    np.testing.assert_allclose(line, 0.25 * 0.5**0.5, rtol=0.02)


def test_what_is_drawn_is_what_geometry_measures(tmp_path, figures):
  draw = np.random.default_rng(0).normal
  names = ['base', 'a', 'b', 'c']
  models = {
    name: write(tmp_path / name, lambda i: draw(size=i.shape)) for name in names
  }
  found = kept(models, tmp_path, *names[1:])
  base, *others = (open_model(models[name]) for name in names)
  truth = measured(base, others)
  page = geometry.geometry_html(found, 'x')
  assert [*found['groups']] == [*NAMES, 'all']
  angles, norms = (np.array(drawn(figure)) for figure in figures)
  for at, name in enumerate(NAMES):
    of = truth[name]
    np.testing.assert_allclose(angles[:, at], of.angles)
    np.testing.assert_allclose(norms[:, at], of.norms / of.weights)
    assert f'{of.conflicts:.1%}' in page
  whole = truth['all']
  for row in whole.distances:
    for x in row[row > 0]:
      assert f'<td>{geometry._size(x)}</td>' in page
  mean = whole.norms.mean()
  slerp = np.hypot.reduce([truth[name].slerp for name in NAMES])
  assert f'a task vector of {whole.lerp / mean:.2f} times' in page
  assert f'one of {slerp / mean:.2f} times' in page


def test_orthogonal_vectors_are_told_so(models, tmp_path):
  lines = geometry.geometry_lines(kept(models, tmp_path, 'even', 'odd'))
  assert '90.0° in the layers (within 5° of orthogonal in each)' in lines[1]
  assert (
    '0.71 times' in lines[2]
    and 'SLERP layer by layer one of 1.00' in (lines[2])
  )
  assert 'Signs disagree' not in lines[2]  # nothing is moved by both
  lines = geometry.geometry_lines(kept(models, tmp_path, 'even', 'same'))
  assert 'orthogonal' not in ' '.join(lines)
  assert 'LERP of the 2 models makes a task vector of 1.00 times' in lines[2]
  lines = geometry.geometry_lines(kept(models, tmp_path, 'even', 'back'))
  assert 'of 0.00 times' in lines[2] and 'SLERP is not defined' in lines[2]
  assert 'Signs disagree at 100.0%' in lines[2]


def test_one_model_has_no_angle(models, tmp_path, figures):
  found = kept(models, tmp_path, 'even')
  assert geometry.angle_lines(found) == []
  page = geometry.geometry_html(found, 'x')
  assert len(figures) == 1 and 'ngle' not in page
  assert 'norm of LERP' not in page and '<td>17.' in page


def test_a_model_that_has_not_moved_is_shown_as_such(models, tmp_path, figures):
  found = kept(models, tmp_path, 'even', 'base', 'odd')
  page = geometry.geometry_html(found, 'x')
  assert 'base: the same weights as base, a task vector of 0' in page
  assert [line.values for line in geometry.angle_lines(found)] == [
    [None] * 4,
    [90] * 4,
    [None] * 4,
  ]
  low, _ = figures[1].axes[0].get_ylim()
  assert low < 0  # the dots at 0 are whole
  found = kept(models, tmp_path, 'base', 'base')
  alone = geometry.geometry_html(found, 'x')
  for text in (page, alone):
    Page(text)
    assert 'nan' not in text.lower() and 'None' not in text
  assert '<td class="none">–</td>' in alone


def test_a_base_of_zeros_has_no_relative_norm(models, tmp_path, figures):
  zero = write(tmp_path / 'zero', lambda i: 0.0 * i)
  found = kept({**models, 'base': zero}, tmp_path, 'even', 'odd')
  page = geometry.geometry_html(found, 'x')
  assert len(figures) == 1  # angles alone
  assert '% of that of its weights' not in page and 'nan' not in page.lower()


def made(count, layers=3, **more):
  """A made-up document: pair or model n has the value n."""
  pairs = count * (count - 1) // 2
  group = {
    'weights': 1.0,
    'norms': [float(i + 1) for i in range(count)],
    'relative': [float(i + 1) for i in range(count)],
    'angles_deg': [float(i) for i in range(pairs)],
    'sign_conflicts': 0.5,
    'distances': [[1.0] * (count + 1)] * (count + 1),
    'lerp': 1.0,
    'slerp': 2.0,
  }
  keys = ['embedding', *map('layer_{}'.format, range(layers)), 'final_norm']
  return {
    'format': 1,
    'base': {'name': 'sft', 'path': '/sft'},
    'models': [{'name': f'run {i}', 'path': f'/{i}'} for i in range(count)],
    'groups': {key: dict(group) for key in [*keys, 'all']},
    **more,
  }


def test_many_pairs_are_a_range_and_a_median(figures):
  page = geometry.geometry_html(made(5), 'x')  # ten pairs, five models
  angles, norms = figures
  assert drawn(angles) == [[4.5] * 5] and 'the median of 10' in page
  (band,) = [c for c in angles.axes[0].collections if 'Fill' in repr(c)]
  heights = band.get_paths()[0].vertices[:, 1]
  assert (heights.min(), heights.max()) == (0, 9)
  assert len(drawn(norms)) == 5
  assert page.count('class="key"') == 5
  figures.clear()
  geometry.geometry_html(made(7), 'x')
  assert drawn(figures[1]) == [[4.0] * 5]


def test_groups_stand_in_order():
  names = ['embedding', *(f'layer_{i}' for i in range(40)), 'final_norm', 'x']
  where = geometry.depth(names)
  assert where.at == sorted(where.at) and len(set(where.at)) == len(names)
  assert where.layers == [*range(1, 41)]
  labels = [*where.ticks.values()]
  assert labels[:3] == ['embedding', '0', '3'] and labels[-2:] == [
    'final norm',
    'x',
  ]
  assert len(labels) < 20
  assert geometry.depth(['embedding']).at == [0]
  geometry.geometry_html(made(2, layers=0), 'x')


def test_the_report_has_a_section(tmp_path):
  work = synthetic.workdir(tmp_path)
  report([work], tmp_path / 'without.html')
  without = (tmp_path / 'without.html').read_text('utf-8')
  assert 'How the task vectors lie' not in without
  document = made(3, models=[{'name': f'<b>{i}</b>'} for i in range(3)])
  document['base']['name'] = '<script>'
  for name in ('geometry', 'other'):
    (work / name).mkdir()
    (work / name / 'geometry.json').write_text(json.dumps(document))
  lines = report([work], tmp_path / 'r.html')
  text = (tmp_path / 'r.html').read_text('utf-8')
  page = Page(text)
  assert text.index('All models') < text.index('How the task vectors lie')
  assert text.index('lie <small>other') < text.index('<h2>Training curves')
  assert '&lt;b&gt;0&lt;/b&gt; · &lt;b&gt;1&lt;/b&gt;' in text
  assert '<b>0</b>' not in text and '<script' not in text
  ids = [v for k, v in page.attributes if k == 'id']
  assert len(ids) == len(set(ids))
  assert 'Alignment' in lines[0]  # the evaluation's findings come first
  report([work], tmp_path / 'again.html')
  assert (tmp_path / 'again.html').read_text('utf-8') == text


def test_a_geometry_alone_is_a_report(models, tmp_path):
  kept(models, tmp_path / 'w', 'even', 'odd')
  lines = report([tmp_path / 'w'], tmp_path / 'r.html')
  assert 'Task vectors of even and odd, from base' in lines[0]
  assert 'How the task vectors lie' in (tmp_path / 'r.html').read_text('utf-8')


def changed(field, value, group='layer_1'):
  def change(document):
    document['groups'][group][field] = value

  return change


@pytest.mark.parametrize(
  'change, said',
  [
    (lambda d: d.update(format=2), 'found format 2'),
    (lambda d: d.update(models=[]), '"models" must be a list'),
    (lambda d: d.update(base={}), 'must have a "name"'),
    (lambda d: d['models'].append(3), 'must have a "name"; found 3'),
    (lambda d: d['groups'].pop('all'), 'with the group "all"'),
    (lambda d: d.update(groups=[]), '"groups" must be an object'),
    (lambda d: d['groups'].update(all=1), '"norms" of group \'all\''),
    (changed('norms', [1.0]), '"norms" .*must be 3 numbers from 0; found'),
    (changed('norms', [1.0, -1.0, 1.0]), '"norms" of group \'layer_1\''),
    (changed('norms', [1.0, True, 1.0]), '"norms" of group \'layer_1\''),
    (changed('relative', None), '"relative" of group'),
    (changed('angles_deg', [1, 2, 181]), '3 numbers from 0 to 180 or null'),
    (changed('angles_deg', [1, 2, float('nan')]), '"angles_deg" of group'),
    (changed('sign_conflicts', 1.5), 'a number from 0 to 1 or null'),
    (changed('distances', [[0.0] * 4] * 3), '4 x 4 numbers from 0'),
    (changed('lerp', None), '"lerp" of group'),
    (changed('slerp', 'much'), '"slerp" of group'),
  ],
)
def test_a_malformed_file_is_one_sentence(tmp_path, change, said):
  document = made(3)
  change(document)
  path = tmp_path / 'geometry.json'
  path.write_text(json.dumps(document))
  with pytest.raises(UserError, match=f'geometry.json: .*{said}') as error:
    report([tmp_path], tmp_path / 'r.html')
  assert '\n' not in str(error.value)
  path.write_text('{"format": 1,')
  with pytest.raises(UserError, match='line 1: not valid JSON'):
    read.found([tmp_path])
