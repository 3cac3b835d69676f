import json

import numpy as np
import pytest
from ml_collections import ConfigDict, config_dict

from alignjax.cli import config
from alignjax.core.errors import UserError

PROGRAM = """
from ml_collections import ConfigDict, config_dict

def get_config(variant=''):
  return ConfigDict({
    'variant': variant,
    'steps': 10,
    'quiet': False,
    'recipe': {
      'name': 'jbond',
      'kl_coef': 0.1,
      'clip': config_dict.placeholder(float),
      'betas': (0.9, 0.95),
      'empty': (),
      'rule': (('.*bias', 0.0),),
    },
  })

def jobs(config):
  return []
"""


@pytest.fixture
def file(tmp_path):
  path = tmp_path / 'tiny.py'
  path.write_text(PROGRAM)
  return str(path)


def test_load_program_variant_and_rest(file):
  got, program, rest = config.load([f'--config={file}:big', '--n', '3'])
  assert got.variant == 'big' and rest == ['--n', '3']
  assert program is not None and program.jobs(got) == []
  got, _, rest = config.load(['--config', file])
  assert got.variant == '' and rest == []


@pytest.mark.parametrize(
  'text, field, want',
  [
    ('steps=20', 'steps', 20),
    ('steps=1_000', 'steps', 1000),
    ('quiet=true', 'quiet', True),
    ('variant=None', 'variant', 'None'),
    ('variant=', 'variant', ''),
    ('recipe.name=3', 'recipe.name', '3'),
    ('recipe.kl_coef=2', 'recipe.kl_coef', 2.0),
    ('recipe.kl_coef=1e-3', 'recipe.kl_coef', 1e-3),
    ('recipe.kl_coef=-1', 'recipe.kl_coef', -1.0),
    ('recipe.kl_coef=inf', 'recipe.kl_coef', float('inf')),
    ('recipe.clip=1', 'recipe.clip', 1.0),
    ('recipe.clip=none', 'recipe.clip', None),
    ('recipe.betas=(0, 1)', 'recipe.betas', (0.0, 1.0)),
    ('recipe.betas=[0.5]', 'recipe.betas', (0.5,)),
    ("recipe.empty=('a', 1)", 'recipe.empty', ('a', 1)),
  ],
)
def test_override_is_typed_by_the_field(file, text, field, want):
  flag, _, value = text.partition('=')
  for argv in [[f'--config.{text}'], [f'--config.{flag}', value]]:
    got, _, rest = config.load([f'--config={file}', *argv])
    assert rest == []
    value_got = got
    for part in field.split('.'):
      value_got = value_got[part]
    assert value_got == want and type(value_got) is type(want)


@pytest.mark.parametrize(
  'text, sentence',
  [
    (
      'recipe.kl_coeff=1',
      "no field 'recipe.kl_coeff' in the config;"
      " did you mean 'recipe.kl_coef'?",
    ),
    ('recpie.kl_coef=1', "did you mean 'recipe.kl_coef'?"),
    ('zzzzzzz=1', "no field 'zzzzzzz' in the config (fields: "),
    ('steps.x=1', "no field 'steps.x'"),
    ('recipe=bond', "'recipe' is a section of the config; set one of"),
    ('steps=0.1', "field 'steps' takes a whole number, found 0.1"),
    ('steps=ten', "field 'steps' takes a whole number, found 'ten'"),
    ('steps=true', "field 'steps' takes a whole number"),
    ('quiet=1', "field 'quiet' takes true or false, found '1'"),
    ('recipe.kl_coef=much', "takes a number, found 'much'"),
    ('recipe.kl_coef=none', 'takes a number'),
    ('recipe.clip=x', "field 'recipe.clip' takes a number, found 'x'"),
    ('recipe.betas=3', "field 'recipe.betas' takes a list of values"),
    ("recipe.betas=('a',)", "field 'recipe.betas' takes a number, found 'a'"),
  ],
)
def test_override_refuses_in_one_sentence(file, text, sentence):
  with pytest.raises(UserError) as error:
    config.load([f'--config={file}', f'--config.{text}'])
  assert sentence in str(error.value) and '\n' not in str(error.value)


@pytest.mark.parametrize(
  'name, content, sentence',
  [
    ('absent.py', None, 'No such file'),
    ('absent.json', None, 'No such file'),
    ('a.yaml', 'x: 1', 'a config is F.py, F.py:variant or F.json'),
    ('a.py', 'def get_config(:', 'line 1'),
    ('a.py', 'x = 1', 'defines get_config'),
    ('a.py', 'def get_config():\n  return {}', 'found dict'),
    ('a.py', b'\xff\xfe', 'not UTF-8'),
    ('a.py', b'\x00', 'null bytes'),
    ('a.json', '{"a": ', 'line 1'),
    ('a.json', '[1]', 'a config is a JSON object'),
  ],
)
def test_bad_file(tmp_path, name, content, sentence):
  path = tmp_path / name
  if isinstance(content, bytes):
    path.write_bytes(content)
  elif content is not None:
    path.write_text(content)
  with pytest.raises(UserError) as error:
    config.load([f'--config={path}'])
  assert sentence in str(error.value) and str(path) in str(error.value)


def test_missing_pieces(tmp_path):
  with pytest.raises(UserError, match='--config=F is missing'):
    config.load(['--workdir=w'])
  with pytest.raises(UserError, match='--config.a needs a value'):
    config.load(['--config=f.py', '--config.a'])
  path = tmp_path / 'a.py'
  path.write_text('def get_config(): pass')
  with pytest.raises(UserError, match='has no variants'):
    config.load([f'--config={path}:big'])
  path.write_text("VARIANTS = ('', 'tiny')\ndef get_config(variant): pass")
  with pytest.raises(UserError, match=r"no variant 'big', expected .*'tiny'"):
    config.load([f'--config={path}:big'])


def test_a_programs_own_error_is_not_hidden(tmp_path):
  path = tmp_path / 'a.py'
  path.write_text('def get_config():\n  return 1 / 0\n')
  with pytest.raises(ZeroDivisionError):
    config.load([f'--config={path}'])


def test_json_round_trip(file, tmp_path):
  first, _, _ = config.load([f'--config={file}', '--config.recipe.kl_coef=inf'])
  path = tmp_path / 'resolved.json'
  path.write_text(config.to_json(first))
  again, program, _ = config.load(
    [f'--config={path}', '--config.recipe.clip=2.5']
  )
  assert program is None
  assert again.recipe.rule == (('.*bias', 0.0),)
  assert again.recipe.clip == 2.5
  again.recipe.clip = None
  assert again.to_dict() == first.to_dict()
  assert config.to_json(again) == config.to_json(first)


def test_json_does_not_depend_on_the_order_of_fields():
  a = config.to_json({'b': {'y': 1, 'x': 2}, 'a': 0.1})
  b = config.to_json(ConfigDict({'a': 0.1, 'b': {'x': 2, 'y': 1}}))
  assert a == b
  assert json.loads(a) == {'a': 0.1, 'b': {'x': 2, 'y': 1}}


def test_plain_takes_numpy_and_refuses_functions():
  assert config.plain({'a': np.float32(0.5), 'b': (np.int64(2),)}) == {
    'a': 0.5,
    'b': [2],
  }
  with pytest.raises(UserError, match=r'config\.a\.b\[0\]: .* found builtin'):
    config.plain({'a': {'b': [len]}})


def test_difference():
  old = ConfigDict({'optimizer': {'lr': 1e-3, 'b': 1}, 's': 'x', 't': (1,)})
  new = {'optimizer': {'lr': 2e-3, 'c': None}, 's': 'y', 't': [1]}
  assert config.difference(old, new) == [
    'optimizer.b: 1 -> nothing',
    'optimizer.c: nothing -> null',
    'optimizer.lr: 0.001 -> 0.002',
    's: "x" -> "y"',
  ]
  assert config.difference(old, old) == []


def test_override_reaches_a_shared_field():
  c = ConfigDict({'steps': 10})
  c.schedule = ConfigDict({'steps': c.get_ref('steps')})
  c.hole = config_dict.placeholder(int)
  config.override(c, 'steps', '20')
  config.override(c, 'hole', '3')
  assert c.schedule.steps == 20 and c.hole == 3
