"""The import law, and the size of files, read from the sources."""

import ast
import statistics
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / 'alignjax'

# Room -> the rooms it may import, from top to bottom of the house. A room
# imports itself and rooms above it; where the house says less, less.
ABOVE: dict[str, tuple[str, ...]] = {}


def _room(name: str, *allowed: str) -> None:
  """Without `allowed`: every room above."""
  ABOVE[name] = allowed or tuple(ABOVE)


_room('core', 'core')
_room('system', 'core')
_room('data', 'core')
_room('losses', 'core')
_room('kernels', 'core')
_room('models', 'core', 'kernels')
_room('interop', 'core', 'system', 'data', 'models')
_room('policies', 'core', 'models')
_room('rewards', 'core', 'losses', 'models', 'policies')
_room('stages', 'core', 'system', 'losses', 'policies', 'rewards')
_room('recipes')
_room('step', 'core', 'system')
_room('train', 'core', 'system', 'step')
_room('replay', 'core', 'system', 'train')
_room(
  'evaluate',
  *(room for room in ABOVE if room not in ('recipes', 'step', 'train')),
)
_room('perplexity', 'core', 'losses')
_room('merge', 'core', 'system', 'interop')
_room('plan')
_room('report', 'core')
_room('cloud', 'core')
_room('api')
_room('cli')

# Reading versions and data files by importlib imports nothing by name.
HARMLESS = ('importlib.metadata', 'importlib.resources')


def sources() -> list[Path]:
  return sorted(PACKAGE.rglob('*.py'))


def module(path: Path) -> str:
  parts = path.relative_to(PACKAGE.parent).with_suffix('').parts
  return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


def imports(path: Path, text: str | None = None) -> set[str]:
  """Dotted names that a file imports, inside functions as well.

  `from a import b` counts as a.b: whether b is a module does not matter here.
  """
  found = set()
  package = module(path).split('.')
  if path.stem != '__init__':
    package = package[:-1]
  for node in ast.walk(ast.parse(text or path.read_text('utf-8'))):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      base = package[: len(package) - node.level + 1] if node.level else []
      base = '.'.join([*base, *([node.module] if node.module else [])])
      found |= {f'{base}.{alias.name}' for alias in node.names}
  return found


def room(name: str) -> str | None:
  """'alignjax.merge.driver' -> 'merge'; None for the front door or others."""
  parts = name.split('.')
  return parts[1] if parts[0] == 'alignjax' and len(parts) > 1 else None


def violations(name: str, imported: set[str]) -> list[str]:
  """What a module imports against the law, one sentence each."""
  own, found = room(name), []
  for other in sorted(imported):
    inside = name.startswith('alignjax')
    target = room(other)
    if target == 'cli' and own != 'cli':
      found.append(f'{name} imports {other}: nothing imports cli')
    elif own and target is None and other.split('.')[0] == 'alignjax':
      found.append(f'{name} imports the front door {other}')
    elif own and target and target != own and target not in ABOVE[own]:
      found.append(f'{name} imports {other}, which is not above it')
    if own == target == 'recipes' and other.split('.')[2:3] != [
      name.split('.')[2]
    ]:
      found.append(f'{name} imports {other}: a recipe imports no recipe')
    if inside and own != 'models' and f'{other}.'.startswith('flax.linen.'):
      found.append(f'{name} imports flax.linen; only models does')
    by_name = f'{other}.'.startswith(('importlib.', 'runpy.'))
    if inside and by_name and not other.startswith(HARMLESS):
      if name != 'alignjax.core.lookup':
        found.append(f'{name} imports {other}; only core.lookup does')
  return found


def test_every_room_is_in_the_house():
  rooms = {
    path.stem
    for path in PACKAGE.iterdir()
    if not path.name.startswith(('_', '.'))
    and (path.suffix == '.py' or any(path.glob('*.py')))
  }
  assert rooms and rooms <= set(ABOVE)


@pytest.mark.parametrize('path', sources(), ids=module)
def test_imports_point_up(path):
  assert violations(module(path), imports(path)) == []


@pytest.mark.parametrize(
  'path', sorted((ROOT / 'configs').rglob('*.py')), ids=lambda path: path.stem
)
def test_configs_do_not_import_cli(path):
  text = path.read_text('utf-8')
  found = imports(PACKAGE / '__init__.py', text)
  assert violations('configs', found) == []


@pytest.mark.parametrize(
  'name, text, broken',
  [
    ('losses.value', 'from alignjax.models import decoder', 'not above'),
    ('core.tree', 'from alignjax.system import mesh', 'not above'),
    ('core.tree', 'from ..system import mesh', 'not above'),
    ('train', 'def f():\n  from alignjax import evaluate', 'not above'),
    ('recipes.warp', 'from alignjax.recipes import bond', 'imports no recipe'),
    ('recipes.warp', 'from alignjax.recipes.bond import x', 'no recipe'),
    ('recipes.warp', 'from . import bond', 'no recipe'),
    ('train', 'import alignjax.cli.run', 'nothing imports cli'),
    ('train', 'import alignjax', 'front door'),
    ('policies.lm', 'from flax import linen as nn', 'only models'),
    ('policies.lm', 'import flax.linen as nn', 'only models'),
    ('cli.run', 'import importlib', 'only core.lookup'),
    ('cli.run', 'from importlib import import_module', 'only core.lookup'),
    ('cli.run', 'from importlib import metadata', None),
    ('cli.run', 'from alignjax.recipes import bond', None),
    ('models.layers', 'from flax import linen as nn', None),
    ('recipes.warp', 'from alignjax.losses.divergence import kl', None),
  ],
)
def test_the_law_sees(name, text, broken):
  path = PACKAGE / f'{name.replace(".", "/")}.py'
  found = violations(module(path), imports(path, text))
  assert bool(found) == bool(broken), found
  assert not broken or broken in found[0]


def test_files_are_short():
  lines = {
    module(path): len(path.read_text('utf-8').splitlines())
    for path in sources()
  }
  assert {name: n for name, n in lines.items() if n > 400} == {}
  assert statistics.median(lines.values()) < 200


DEF = (ast.FunctionDef, ast.AsyncFunctionDef)


def own_lines(function: ast.AST) -> int:
  """Lines of a function without those of the functions inside it."""
  inner = []
  queue = list(ast.iter_child_nodes(function))
  while queue:
    node = queue.pop()
    if isinstance(node, DEF):
      inner.append(node.end_lineno - node.lineno + 1)
    else:
      queue += ast.iter_child_nodes(node)
  return function.end_lineno - function.lineno + 1 - sum(inner)


@pytest.mark.parametrize('path', sources(), ids=module)
def test_functions_are_short(path):
  found = {
    node.name: own_lines(node)
    for node in ast.walk(ast.parse(path.read_text('utf-8')))
    if isinstance(node, DEF)
  }
  assert {name: n for name, n in found.items() if n > 60} == {}
