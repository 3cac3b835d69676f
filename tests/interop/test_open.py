import dataclasses
import json

import numpy as np
import pytest

from alignjax.core import naming
from alignjax.core.errors import UserError
from alignjax.interop import hf
from alignjax.interop.open import open as open_
from alignjax.models.config import to_json
from alignjax.system import model_dir
from tests.interop import trees

CONFIG = trees.CONFIGS['gemma2']
LEAVES = trees.leaves(CONFIG)


def ours(path, **more):
  arguments = {
    'config': to_json(CONFIG),
    'params': {'policy': naming.nested(LEAVES)},
    'provenance': {'by': 'test'},
  }
  model_dir.write(path, **(arguments | more))
  return path


def hugging_face(path):
  from alignjax.core.spec import Spec

  specs = {name: Spec(x.shape, x.dtype) for name, x in LEAVES.items()}
  with hf.writer(path, CONFIG, specs) as put:
    for name, leaf in LEAVES.items():
      put(name, leaf)
  return path


def deepmind(path):
  names = trees.nested(CONFIG, LEAVES, transposed=True)
  return trees.save(path, naming.nested(names))


@pytest.mark.parametrize(
  'write, format',
  [(ours, 'alignjax'), (hugging_face, 'hf'), (deepmind, 'deepmind')],
)
def test_a_format_is_seen_from_its_files(tmp_path, monkeypatch, write, format):
  write(tmp_path / 'm')
  monkeypatch.chdir(tmp_path)
  opened = open_('m')
  assert (opened.format, str(opened.path)) == (format, str(tmp_path / 'm'))
  assert opened.leaves.keys() == LEAVES.keys() == opened.origin.keys()
  for name, leaf in LEAVES.items():
    assert opened.load(name).tobytes() == leaf.tobytes(), name
  span = open_('m', window_self=False).config.span
  assert span == opened.config.span + 1


def test_our_own_directory(tmp_path):
  (tmp_path / 'chat_template.jinja').write_text('x')
  roles = {'policy': LEAVES.items(), 'value': [('head', np.ones((2, 1)))]}
  path = ours(
    tmp_path / 'm', params=roles, files=[tmp_path / 'chat_template.jinja']
  )
  (path / 'certificate.txt').write_text('about something else')
  opened = open_(path)
  assert opened.config == CONFIG
  assert opened.provenance == {'by': 'test'}
  assert opened.tokenizer is None and opened.extra == {}
  assert [f.name for f in opened.files] == ['chat_template.jinja']
  assert list(open_(path, role='value').leaves) == ['head']
  with pytest.raises(UserError, match="no role 'anchor'"):
    open_(path, role='anchor')
  with pytest.raises(UserError, match='has no roles'):
    open_(hugging_face(tmp_path / 'h'), role='value')


@pytest.mark.parametrize('format, joint', [('hf', '.'), ('deepmind', '/')])
def test_extra_tensors_keep_their_names(tmp_path, format, joint):
  image = np.arange(3, dtype=np.float32)
  path = ours(
    tmp_path / 'm',
    params={
      'policy': LEAVES.items(),
      'extra': [('vision_tower/post/weight', image)],
    },
    provenance={'source': {'format': format}},
  )
  opened = open_(path)
  (name,) = opened.extra
  assert name == joint.join(('vision_tower', 'post', 'weight'))
  np.testing.assert_array_equal(opened.load_extra(name), image)


def test_other_heads_and_views_are_refused(tmp_path):
  for what in ({'head': 'scalar(1)'}, {'view': 'lora'}):
    path = ours(tmp_path / str(len(what)), **what, overwrite=True)
    with pytest.raises(UserError, match='not a plain language model'):
      open_(path)


@pytest.mark.parametrize(
  'files, message',
  [
    ({}, 'no model at .*found nothing'),
    ({'notes.txt': ''}, 'looked for model.json.*found notes.txt'),
    ({'config.json': '{}'}, 'safetensors.*found config.json'),
    ({'pytorch_model.bin': ''}, 'pytorch_model.bin, which is a pickle'),
    ({'config.json': '{}', 'a.pt': ''}, 'a.pt, which is a pickle'),
    ({'checkpoints/3/state/x': ''}, 'a training run or one of its checkpoints'),
  ],
)
def test_what_is_no_model(tmp_path, files, message):
  for name, text in files.items():
    file = tmp_path / 'm' / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
  (tmp_path / 'm').mkdir(exist_ok=True)
  with pytest.raises(UserError, match=message):
    open_(tmp_path / 'm')


def test_a_file_is_no_directory(tmp_path):
  for name, message in {
    'model.safetensors': 'one file of a model; give its directory',
    'model.ckpt': 'a pickle, which may run code: it is not opened',
    'notes.txt': 'is a file, expected the directory of a model',
    'nothing': 'there is no such file or directory',
  }.items():
    if name != 'nothing':
      (tmp_path / name).write_bytes(b'\x80\x04cposix\nsystem\n')
    with pytest.raises(UserError, match=message):
      open_(tmp_path / name)


def test_a_config_that_contradicts_the_leaves(tmp_path):
  config = to_json(dataclasses.replace(CONFIG, hidden=25))
  path = ours(tmp_path / 'm', config=config)
  with pytest.raises(UserError) as error:
    open_(path)
  assert 'layer_0/ffw/gate is [16, 24], expected [16, 25]' in str(error.value)
  assert 'layer_3/ffw/down is [24, 16], expected [25, 16]' in str(error.value)


def test_a_config_that_is_damaged(tmp_path):
  path = ours(tmp_path / 'm')
  facts = json.loads((path / 'model.json').read_text())
  facts['config']['widht'] = 3
  (path / 'model.json').write_text(json.dumps(facts))
  with pytest.raises(UserError, match='widht'):
    open_(path)
