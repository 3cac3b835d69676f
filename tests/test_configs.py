"""Every program in configs/, in all its variants: complete and well formed."""

import inspect
from pathlib import Path

import pytest

from alignjax.cli import config as configs
from alignjax.cli.console import VERBS
from alignjax.cloud import jobs
from alignjax.core import lookup
from alignjax.core.errors import UserError

ROOT = Path(__file__).parents[1]
SECTIONS = {'recipe': 'recipes', 'reward': 'rewards', 'optimizer': 'system'}


def programs():
  for path in sorted((ROOT / 'configs').rglob('*.py')):
    _, program = configs._read(str(path)) if _has_config(path) else (None, None)
    for variant in getattr(program, 'VARIANTS', [''] if program else []):
      name = str(path.relative_to(ROOT)) + (f':{variant}' if variant else '')
      yield name


def _has_config(path):
  return 'def get_config' in path.read_text()


def check_sections(config):
  """Numbers of parts are those that their functions take."""
  for name, room in SECTIONS.items():
    if name not in config or 'name' not in config[name]:
      continue
    section = dict(config[name])
    fn = lookup.find(room, section.pop('name'))
    assert set(section) <= set(inspect.signature(fn).parameters), name
  if 'recipe' in config:
    wanted = inspect.signature(lookup.find('recipes', config['recipe']['name']))
    for part in wanted.parameters.values():
      if part.kind is not part.KEYWORD_ONLY and part.name != 'teacher':
        assert part.name in config


@pytest.mark.parametrize('name', list(programs()))
def test_a_program_is_whole(name, monkeypatch):
  monkeypatch.chdir(ROOT)
  config, program, _ = configs.load([f'--config={name}'])
  if not hasattr(program, 'jobs'):
    check_sections(configs.plain(config))
    return
  for job in jobs.order(program.jobs(config)):
    assert job.verb in VERBS
    check_sections(configs.plain(job.config))


def test_paper_configs_name_their_command():
  for path in (ROOT / 'configs' / 'papers').glob('*.py'):
    text = ' '.join(path.read_text().split())
    assert f'--config=configs/papers/{path.name}' in text
    assert 'COMMAND: alignjax' in text


def test_unknown_variants_are_told():
  with pytest.raises(UserError, match="no variant 'big'"):
    configs.load([f'--config={ROOT}/configs/quickstart.py:big'])
