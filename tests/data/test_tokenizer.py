import json
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2 as protobuf

from alignjax.cli import tokenizer as cli
from alignjax.core.errors import UserError
from alignjax.data import tokenizer as tokenizers
from alignjax.data.text import documents
from alignjax.data.tokenizer import ByteTokenizer, Tokenizer, streamed, train

TRAPS = [
  '',
  ' ',
  '\n',
  '\n\n\n\n\n',
  '  \n \n\t\tx  ',
  ' leading and trailing \n',
  '     five\n      six\n' + ' ' * 40 + 'forty',
  '\r\n\x00\x01\x0b\x0c\x7f',
  'a\u2581b \u2581\u2581 \u2585',  # the mark that SentencePiece has for ' '
  'caf\xe9 e\u0301 \u65e5\u672c \U0001f389 \ufeff\u2028\u200b',
  '<start_of_turn>user\nhi<end_of_turn>\n<bos><eos><pad><unk><mask>',
  '<end_of_turn<end_of_turn>>< end_of_turn >',
  '<0x0A><unused3>[multimodal] \u2047 ',
  'def f(self, x):\n\tif x == 1234:\n        return x\n\n\n',
]


NORMAL, UNKNOWN, CONTROL, USER, BYTE = 1, 2, 3, 4, 6
# Where the real files have what the chat format uses.
PLACES = {2: {'user': 1645, 'model': 2516}, 3: {'user': 2364, 'model': 4368}}


def lookalike(generation, size=5000):
  """A model file laid out as Gemma's: kinds, ids and settings, other text.

  As in the real files only pad, eos and bos are control pieces; turn marks,
  `<unused0>`, newlines, spaces and '<table>' are user-defined.
  """
  model = protobuf.ModelProto()

  def add(piece, kind=NORMAL):
    score = -len(model.pieces) if kind == NORMAL else 0.0
    model.pieces.add(piece=piece, type=kind, score=score)

  for piece in ('<pad>', '<eos>', '<bos>'):
    add(piece, CONTROL)
  add('<unk>', UNKNOWN)
  first = {2: ['<mask>', '<2mass>', '[@BOS@]'], 3: ['<mask>', '[multimodal]']}
  for piece in first[generation]:
    add(piece, USER)
  for n in range(99):
    add(f'<unused{n}>', USER)
  for piece in ('<start_of_turn>', '<end_of_turn>'):
    add(piece, USER)
  for run in ['\n' * n for n in range(1, 32)]:
    add(run, USER)
  for run in ['\u2581' * n for n in range(2, 32)]:
    add(run, USER)
  add('<table>', USER)
  for byte in range(256):
    add(f'<0x{byte:02X}>', BYTE)
  for piece in ('us', 'er', 'mo', 'de', 'mode', *map(chr, range(33, 127))):
    add(piece)
  add('\u2581')
  places = {i: piece for piece, i in PLACES[generation].items()}
  tail = 6145 if size > 6145 * 2 and generation == 3 else 0
  while len(model.pieces) < size - tail:
    add(places.get(len(model.pieces), f'\u2581x{len(model.pieces)}'))
  for n in range(99, 99 + tail):
    add(f'<unused{n}>', USER)
  trainer = model.trainer_spec
  trainer.model_type, trainer.vocab_size = 2, size
  trainer.byte_fallback = trainer.split_digits = True
  for i, name in enumerate(['pad', 'eos', 'bos', 'unk']):
    setattr(trainer, f'{name}_id', i)
    setattr(trainer, f'{name}_piece', f'<{name}>')
  normalizer = model.normalizer_spec
  normalizer.name, normalizer.escape_whitespaces = 'identity', True
  normalizer.add_dummy_prefix = normalizer.remove_extra_whitespaces = False
  return model.SerializeToString()


@pytest.fixture(scope='module')
def texts():
  return [d.text for d in documents(max_bytes=500_000)]


@pytest.fixture(scope='module')
def trained(texts, tmp_path_factory):
  path = tmp_path_factory.mktemp('tokenizer') / 'tokenizer.model'
  return train(texts, path, vocab_size=800)


@pytest.fixture(params=['trained', 'bytes'])
def tokenizer(request, trained):
  return trained if request.param == 'trained' else ByteTokenizer()


@pytest.mark.parametrize('text', TRAPS)
def test_round_trip_without_control_tokens(tokenizer, text):
  ids = tokenizer.encode(text)
  assert tokenizer.decode(ids) == text
  assert not {*tokenizer.stop, *tokenizer.illegal} & {*ids}


@settings(max_examples=200, deadline=None)
@given(
  st.text() | st.lists(st.sampled_from([*'<>_ \n\u2581', *TRAPS])).map(''.join)
)
def test_round_trip_of_any_text(trained, text):
  ids = trained.encode(text)
  assert trained.decode(ids) == text
  assert not trained.special & {*ids}


def test_round_trip_of_source_files(tokenizer, texts):
  encoded = tokenizer.encode_batch(texts, threads=1)
  assert [tokenizer.decode(ids) for ids in encoded] == texts
  assert encoded[3] == tokenizer.encode(texts[3])


def test_special_ids_are_gemmas(tokenizer):
  t = tokenizer
  assert (t.pad, t.eos, t.bos, t.unk) == (0, 1, 2, 3)
  assert t.stop == (t.eos, t.end_of_turn)
  assert t.illegal == (t.pad, t.bos, t.unk, t.start_of_turn)
  assert t.decode([t.bos, *t.encode('x'), t.start_of_turn, *t.stop, t.pad]) == (
    'x'
  )


def test_broken_bytes_decode(tokenizer):
  ids = tokenizer.encode('\U0001f389')
  assert isinstance(tokenizer.decode(ids[:2]), str)


def test_half_a_surrogate_pair_is_told(tokenizer):
  with pytest.raises(UserError, match='Unicode'):
    tokenizer.encode('\ud800')


def test_whitespace_and_digits_are_pieces_of_their_own(trained):
  def pieces(text):
    return [trained.processor.IdToPiece(i) for i in trained.encode(text)]

  space = '\u2581'
  assert pieces('\n\n        return') == ['\n\n', space * 8, 'return']
  assert pieces('2026') == ['2', '0', '2', '6']
  assert len(pieces('def __init__(self):')) < 6


def test_the_same_input_gives_the_same_file(trained, texts, tmp_path):
  again = train(texts, tmp_path / 'a.model', vocab_size=800)
  with open(trained.path, 'rb') as one, open(again.path, 'rb') as other:
    assert one.read() == other.read()


def test_the_seed_chooses_the_sample(texts, tmp_path, monkeypatch):
  monkeypatch.setattr(tokenizers, '_TRAIN_BYTES', 50_000)
  models = [
    train(texts, tmp_path / f'{seed}.model', vocab_size=500, seed=seed)
    for seed in (0, 0, 1)
  ]
  files = [m.processor.serialized_model_proto() for m in models]
  assert files[0] == files[1] != files[2]


def test_training_is_quiet_and_leaves_one_file(tmp_path, capfd):
  model = train(['some words\n' * 9], tmp_path / 'new' / 't.model')
  assert [p.name for p in (tmp_path / 'new').iterdir()] == ['t.model']
  assert 365 <= model.size < 1536  # too little text for more
  assert model.decode(model.encode('a\n    b')) == 'a\n    b'
  assert capfd.readouterr() == ('', '')


@pytest.mark.parametrize(
  'texts, size, words',
  [([], 500, 'no text'), (['', '\n'], 500, 'no text'), (['a'], 99, '365')],
)
def test_bad_training(tmp_path, texts, size, words):
  with pytest.raises(UserError, match=words):
    train(texts, tmp_path / 't.model', vocab_size=size)
  assert not any(tmp_path.iterdir())


def test_bad_files(tmp_path):
  with pytest.raises(UserError, match='no such'):
    Tokenizer.load(tmp_path / 'none.model')
  for data in (b'', b'not a model'):
    (tmp_path / 'bad.model').write_bytes(data)
    with pytest.raises(UserError, match='not a SentencePiece model'):
      Tokenizer.load(tmp_path / 'bad.model')


@pytest.mark.parametrize('generation', [2, 3])
def test_gemmas_own_files_load(tmp_path, generation):
  path = tmp_path / 'tokenizer.model'
  path.write_bytes(lookalike(generation))
  found = Tokenizer.load(path)
  turn = {2: (106, 107), 3: (105, 106)}[generation]
  assert (found.pad, found.eos, found.bos, found.unk) == (0, 1, 2, 3)
  assert (found.start_of_turn, found.end_of_turn) == turn
  assert found.stop == (1, turn[1])
  assert found.system == (generation == 3)
  for text in (*TRAPS, '<table>\n\n<unused7>'):
    ids = found.encode(text)
    assert found.decode(ids) == text
    assert not found.special & {*ids}
  # What is not a control piece by its kind is one by its name.
  marks = ['<mask>', '<unused0>', '<unused98>', '<start_of_turn>']
  assert {*map(found.processor.PieceToId, marks)} <= found.special
  assert found.processor.PieceToId('<table>') not in found.special
  assert len(found.encode('<table>')) == 1


def test_the_real_size_loads_quickly(tmp_path):
  path = tmp_path / 'tokenizer.model'
  path.write_bytes(lookalike(3, size=262_144))
  start = time.monotonic()
  found = Tokenizer.load(path)
  assert time.monotonic() - start < 2
  assert found.size == 262_144 and len(found.special) > 6_000


@settings(max_examples=100, deadline=None)
@given(
  st.lists(st.text(max_size=5) | st.binary(max_size=6)),
  st.randoms(use_true_random=False),
)
def test_streamed_text_is_the_whole_text(trained, parts, rng: random.Random):
  """Characters and broken bytes, cut anywhere."""
  for tokenizer in (trained, ByteTokenizer()):
    first = tokenizer.encode('\x00')[0]  # ids of the 256 bytes follow it
    ids = []
    for part in parts:
      wild = isinstance(part, bytes)
      ids += [first + b for b in part] if wild else tokenizer.encode(part)
    blocks, i = [], 0
    while i < len(ids):
      step = rng.randint(0, 3)
      blocks.append(ids[i : i + step])
      i += step
    said = [*streamed(tokenizer.decode, blocks)]
    assert ''.join(said) == tokenizer.decode(ids)
    assert all(said)


def test_streamed_text_waits_for_whole_characters(tokenizer):
  ids = tokenizer.encode('a\U0001f389b')
  said = [*streamed(tokenizer.decode, [[i] for i in ids])]
  assert said == ['a', '\U0001f389', 'b']


def write_source(folder):
  (folder / 'source').mkdir()
  (folder / 'source' / 'a.py').write_text('def f(x):\n    return x\n' * 99)
  return str(folder / 'source')


def test_the_verb_trains_and_shows(tmp_path, capsys):
  out = tmp_path / 'out.model'
  source = write_source(tmp_path)
  assert cli.main(['train', '--source', source, '--out', str(out)]) == 0
  assert 'characters a token' in capsys.readouterr().out
  text = 'return x\n'
  assert cli.main(['show', str(out), '--text', text, '--ids', '6', '1']) == 0
  shown = capsys.readouterr().out
  assert 'same text: yes' in shown and "'\\n'" in shown
  with pytest.raises(UserError, match='id 99999'):
    cli.main(['show', str(out), '--ids', '99999'])


def test_the_job_runs_once(tmp_path, capsys):
  config, workdir = tmp_path / 'job.json', tmp_path / 'work'
  settings = {'source': {'path': write_source(tmp_path)}, 'vocab_size': 400}
  config.write_text(json.dumps(settings))
  argv = [f'--config={config}', f'--workdir={workdir}']
  assert cli.main(argv) == 0
  model = workdir / 'tokenizer.model'
  made = model.stat().st_mtime_ns
  assert Tokenizer.load(model).size <= 400
  assert cli.main(argv) == 0
  assert 'done before' in capsys.readouterr().out
  assert model.stat().st_mtime_ns == made
  with pytest.raises(UserError, match='vocab_size: 400 -> 500'):
    cli.main([*argv, '--config.vocab_size=500'])
  model.write_bytes(model.read_bytes()[:-1])  # cut short: made again
  assert cli.main(argv) == 0
  assert Tokenizer.load(model).size <= 400


@pytest.mark.parametrize(
  'settings, words',
  [
    ({'source': {'path': 'nowhere'}}, 'nowhere: no such'),
    ({'source': {'pathh': ''}}, "source.pathh.*'path'"),
    ({'vocab': 3}, "'vocab'.*'vocab_size'"),
    ({'vocab_size': 'many'}, 'vocab_size'),
  ],
)
def test_a_bad_job_leaves_nothing(tmp_path, settings, words):
  config = tmp_path / 'job.json'
  config.write_text(json.dumps(settings))
  with pytest.raises(UserError, match=words):
    cli.main([f'--config={config}', f'--workdir={tmp_path / "work"}'])
  assert not (tmp_path / 'work').exists()
