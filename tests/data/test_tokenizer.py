import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignjax.cli import tokenizer as cli
from alignjax.core.types import UserError
from alignjax.data import tokenizer as tokenizers
from alignjax.data.text import documents
from alignjax.data.tokenizer import ByteTokenizer, Tokenizer, train

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
