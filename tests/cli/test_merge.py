import json
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

from alignjax.cli import merge
from alignjax.core import tree
from alignjax.core.errors import UserError
from alignjax.merge import method
from alignjax.models import decoder
from alignjax.models.config import to_json
from alignjax.models.gemma import gemma
from alignjax.system import model_dir

CONFIG = gemma(
  family='gemma2',
  vocab_size=10,
  width=4,
  hidden=6,
  layers=2,
  heads=2,
  kv_heads=1,
  head_dim=2,
)


@pytest.fixture(autouse=True)
def models(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for seed, name in enumerate(['base', 'a', 'b']):
    weights = jax.tree.map(
      np.asarray, tree.unstack(decoder.init(CONFIG, jax.random.key(seed)))
    )
    model_dir.write(
      name,
      config=to_json(CONFIG),
      params={'policy': weights},
      provenance={'by': name},
    )


SLERP = ['slerp', '--base', 'base', '--models', 'a', 'b']


def test_one_value_gives_one_result(tmp_path, capsys):
  where = '.*:t=0.0'
  argv = [*SLERP, '--out', 'o', '--t', '.5', '--where', where]
  assert merge.main(argv) == 0
  a, o = model_dir.read('a'), model_dir.read('o')
  assert model_dir.digest(o) == model_dir.digest(a)
  said = capsys.readouterr().out
  assert 'peak memory' in said and f'wrote {tmp_path}/o' in said


def test_several_values_give_several_results(tmp_path):
  liti = ['liti', '--base', 'base', '--models', 'a', '--out', 'front']
  assert merge.main([*liti, '--liti_rate', '0', '0.3', '1']) == 0
  results = [f'front/liti_{rate}' for rate in ('0.00', '0.30', '1.00')]
  digests = [model_dir.digest(model_dir.read(path)) for path in results]
  assert digests[0] == model_dir.digest(model_dir.read('base'))
  assert digests[2] == model_dir.digest(model_dir.read('a'))


def test_several_lists_give_all_combinations(tmp_path):
  argv = ['ties', *SLERP[1:], '--out', 'o', '--scale', '.5', '1']
  assert merge.main([*argv, '--density', '.2', '.6']) == 0
  found = sorted(path.name for path in (tmp_path / 'o').iterdir())
  assert len(found) == 4 and 'density_0.20_scale_1.00' in found
  alone = ['ties', *SLERP[1:], '--out', 'p', '--scale', '1', '--density', '.2']
  assert merge.main(alone) == 0
  one, two = (
    model_dir.digest(model_dir.read(path))
    for path in ('o/density_0.20_scale_1.00', 'p')
  )
  assert one == two
  with pytest.raises(UserError, match='scale has the value 1 twice'):
    merge.main([*argv, '1'])


def test_a_config_is_the_same_as_flags(tmp_path):
  fields = {'method': 'slerp', 'base': 'base', 'models': ['a', 'b']}
  (tmp_path / 'm.json').write_text(
    json.dumps({**fields, 'out': 'o1', 't': 0.3})
  )
  assert merge.main(['--config=m.json']) == 0
  assert merge.main([*SLERP, '--out', 'o2', '--t', '0.3']) == 0
  assert merge.main(['--config=m.json', '--out', 'o3', '--t', '0.6']) == 0
  one, two, three = (
    model_dir.digest(model_dir.read(o)) for o in ('o1', 'o2', 'o3')
  )
  assert one == two != three


def test_a_job_writes_into_its_folder_and_may_be_repeated(tmp_path):
  fields = {'method': 'slerp', 'base': 'base', 'models': ['a', 'b']}
  (tmp_path / 'm.json').write_text(json.dumps(fields))
  for _ in range(2):
    assert merge.main(['--config=m.json', '--workdir=w/merge']) == 0
  model_dir.read('w/merge/model')
  (tmp_path / 'm.json').write_text(json.dumps({**fields, 't': [0.1, 0.2]}))
  for _ in range(2):
    assert merge.main(['--config=m.json', '--workdir=w/sweep']) == 0
  assert sorted(p.name for p in (tmp_path / 'w/sweep').iterdir()) == [
    't_0.10',
    't_0.20',
  ]


def test_a_dry_run_writes_nothing(tmp_path, capsys):
  before = sorted(tmp_path.iterdir())
  assert merge.main([*SLERP, '--out', 'o', '--dry-run']) == 0
  assert sorted(tmp_path.iterdir()) == before
  said = capsys.readouterr().out
  assert f'would write {tmp_path}/o\n' in said
  assert re.search(r'about [\d.]+ s to read and merge', said)


@pytest.mark.parametrize(
  ('argv', 'message'),
  [
    ([], 'METHOD is missing'),
    (['slerp'], '--models is missing'),
    ([*SLERP[:1], *SLERP[3:], '--out', 'o'], 'slerp needs --base'),
    ([*SLERP], '--out is missing'),
    ([*SLERP, '--out', 'a'], 'a is an input'),
    ([*SLERP, '--out', 'full'], 'full exists already'),
    ([*SLERP, 'c', '--out', 'o'], 'no model at .*/c'),
    ([*SLERP, '.', '--out', 'o'], 'no model at .*looked for model.json'),
    ([*SLERP, '--out', 'base/o'], 'base/o lies inside an input'),
    (['slrp', *SLERP[1:], '--out', 'o'], "did you mean 'slerp'"),
    ([*SLERP, '--out', 'o', '--t', '7'], 't must be a number from 0 to 1'),
    ([*SLERP, '--out', 'o', '--liti_rate', '.5'], "no number 'liti_rate'"),
    ([*SLERP, '--out', 'o', '--where', 'x:t=0.5'], 'matches no leaf'),
    (['--config=bad.json'], "no field 'modles'; did you mean 'models'"),
    (['--config=text.json'], "models must be a list of strings, found 'a'"),
    (['--config=absent.json'], 'absent.json'),
  ],
)
def test_bad_input_is_named(tmp_path, argv, message):
  (tmp_path / 'bad.json').write_text('{"method": "slerp", "modles": ["a"]}')
  (tmp_path / 'text.json').write_text(
    '{"method": "liti", "base": "base", "models": "a", "out": "o"}'
  )
  (tmp_path / 'full').mkdir()
  (tmp_path / 'full' / 'x').touch()
  before = sorted(tmp_path.iterdir())
  with pytest.raises(UserError, match=message):
    merge.main(argv)
  assert sorted(tmp_path.iterdir()) == before


def test_help_lists_every_method_and_number():
  listed = merge._methods()
  assert len(listed) > 15
  for name, about, numbers in listed:
    how = method.method(name)
    assert about == how.about
    declared = [*(['weights'] if how.weighted else []), *how.numbers]
    assert list(numbers) == declared, name


@pytest.mark.parametrize('words', [[], ['search'], ['stack']])
def test_help_needs_no_jax(words):
  command = [sys.executable, '-X', 'importtime', '-m', 'alignjax.cli', 'merge']
  said = subprocess.run(
    [*command, *words, '--help'], capture_output=True, text=True, check=True
  )
  assert 'usage: alignjax merge' in said.stdout
  imported = {line.split('|')[-1].strip() for line in said.stderr.splitlines()}
  assert 'alignjax.cli.merge_others' in imported
  assert not imported & {'jax', 'numpy', 'flax'}


def test_layers_are_stacked(capsys):
  words = ['stack', '--models', 'a', 'b', '--layers', '0:0:2', '1:1:2']
  assert merge.main([*words, '--out', 'tall']) == 0
  tall, b = model_dir.read('tall'), model_dir.read('b')
  assert tall.config['layers'] == 3
  assert tall.provenance['merge']['layers'] == ['0:0:2', '1:1:2']
  sums = tall.checksums['policy'], b.checksums['policy']
  assert sums[0]['layer_2/ffw/up'] == sums[1]['layer_1/ffw/up']
  with pytest.raises(UserError, match='b has layers 0 to 1'):
    merge.main([*words[:-1], '1:1:3', '--out', 'taller'])
  with pytest.raises(UserError, match='is an input'):
    merge.main([*words, '--out', 'a', '--overwrite'])


def test_an_adapter_is_cut_out_and_folded_in(capsys):
  words = ['lora.extract', '--base', 'base', '--models', 'a', '--rank', '8']
  assert merge.main([*words, '--out', 'adapter']) == 0
  said = capsys.readouterr().out
  assert 'rank 8 holds 100.0%' in said and 'have no adapter: embedding' in said
  words = ['lora.fold', '--base', 'base', '--adapter', 'adapter']
  assert merge.main([*words, '--out', 'folded']) == 0
  found, a = (
    model_dir.load_leaf(model_dir.read(x), 'policy', 'layer_1/attn/o')
    for x in ('folded', 'a')
  )
  np.testing.assert_allclose(found, a, atol=1e-5)
