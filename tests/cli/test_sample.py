"""Text from the command line, and conversations: scripted, typed, cut short."""

import io
import os
import pty
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from alignjax import api
from alignjax.cli import chat
from alignjax.cli import sample as cli
from alignjax.core.errors import UserError
from alignjax.data.format import chat_tokens
from alignjax.data.tokenizer import train
from alignjax.models import decoder
from alignjax.models.config import to_json
from alignjax.models.shapes import shapes
from alignjax.policies import conditioned
from alignjax.system import model_dir
from tests import tiny
from tests.data.test_tokenizer import lookalike


@pytest.fixture(scope='module')
def path(tmp_path_factory):
  """A model directory of random weights with a tokenizer of its own."""
  folder = tmp_path_factory.mktemp('models')
  text = ['user model Hi there, hello\nTwo lines of text\n'] * 20
  tokens = train(text, folder / 'tokenizer.model', vocab_size=400)
  write(folder / 'model', tokens.size + 3, folder / 'tokenizer.model')
  return folder / 'model'


def write(path, rows, tokenizer=None):
  config = tiny.config(vocab_size=rows, layers=2)
  draw = np.random.default_rng(0).normal
  # A tied table is kept small, or the last token would be the likeliest.
  params = {
    name: draw(
      scale=0.05 if name == 'embedding' else 0.7, size=leaf.shape
    ).astype(np.float32)
    for name, leaf in shapes(config).items()
  }
  model_dir.write(
    path,
    config=to_json(config),
    params={'policy': params.items()},
    provenance={},
    tokenizer=tokenizer,
  )


@pytest.fixture(scope='module')
def model(path):
  return api.load(path)


def process(*argv, **options):
  return subprocess.Popen(
    [sys.executable, '-m', 'alignjax.cli', 'sample', *map(str, argv)],
    **options,
  )


def test_a_scripted_conversation(path):
  argv = [
    '--chat',
    '--temperature=0',
    '--max_new_tokens=9',
    '--system=Be brief',
  ]
  done = process(
    path,
    *argv,
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  out, err = done.communicate(
    'Hi\n\nAnd you?\n/reset\nHi\n/exit\nnever read\n', timeout=120
  )
  assert done.returncode == 0 and err == ''
  # The same as the library says, and again when all is forgotten.
  model = api.load(path)
  messages = [
    {'role': 'system', 'content': 'Be brief'},
    {'role': 'user', 'content': 'Hi'},
  ]
  first = greedy(model, messages, 9)
  messages += [
    {'role': 'model', 'content': first},
    {'role': 'user', 'content': 'And you?'},
  ]
  second = greedy(model, messages, 9)
  assert first != second
  assert out == f'{first}\n{second}\n{first}\n'


def greedy(model, messages, length):
  """The full pass again for every token."""
  tokens = model.tokenizer
  ids = chat_tokens(tokens, messages, generate=True).ids
  start = len(ids)
  for _ in range(length):
    # One length for all, so that one program is compiled.
    row = np.zeros((1, 128), np.int32)
    row[0, : len(ids)] = ids
    logits = np.array(api.apply(model, row))[0, len(ids) - 1]
    logits[list(tokens.illegal)] = -np.inf
    logits[tokens.size :] = -np.inf
    ids.append(int(logits.argmax()))
    if ids[-1] in tokens.stop:
      break
  return tokens.decode(ids[start:])


@pytest.mark.parametrize('copied', ['full', 'logits'])
def test_a_conversation_with_a_mixture(
  copied, model, tmp_path, monkeypatch, capsys
):
  params = decoder.stacked(model.config, model.params)
  role = conditioned.split(params, 2, copied)
  role['copies']['1'] = jax.tree.map(lambda x: -x, role['copies']['1'])
  model_dir.write(
    tmp_path / 'both',
    config=to_json(model.config),
    params=conditioned.roles(role, decoder.canonical),
    view='conditioned',
    head='untied' if copied == 'logits' else 'tied',
    provenance={'condition': ['kind', 'brief']},
    tokenizer=model.files[0],
  )
  argv = [str(tmp_path / 'both'), '--chat', '--temperature=0']
  argv.append('--max_new_tokens=6')
  said = []
  for weights in ((1.0, 0.0), (0.3, 0.7)):
    monkeypatch.setattr(sys, 'stdin', io.StringIO('Hi\n'))
    words = ','.join(map(str, weights))
    assert cli.main([*argv, f'--weights={words}']) == 0
    said.append(capsys.readouterr().out)
    messages = [{'role': 'user', 'content': 'Hi'}]
    mixed = api.load(tmp_path / 'both', weights=weights)
    assert said[-1] == f'{greedy(mixed, messages, 6)}\n'
  assert said[0] != said[1]
  with pytest.raises(UserError, match=r"\['kind', 'brief'\], so it needs 2"):
    cli.main(argv)
  with pytest.raises(UserError, match='outside the simplex'):
    cli.main([*argv, '--weights=0.3,0.3'])


def until(terminal, word, limit=120):
  """What a terminal shows, up to and including `word`."""
  seen, end = b'', time.monotonic() + limit
  while word not in seen:
    assert time.monotonic() < end, seen
    try:
      seen += os.read(terminal, 4096)
    except OSError:
      raise AssertionError(f'it ended after {seen!r}') from None
  return seen


def test_control_c_ends_the_answer_and_not_the_program(path):
  terminal, other = pty.openpty()
  # Would write for hours by itself.
  argv = ['--chat', '--temperature=0.01', '--max_new_tokens=100000']
  running = process(
    path, *argv, stdin=other, stdout=other, stderr=other, start_new_session=True
  )
  os.close(other)
  try:
    seen = until(terminal, b'> ')
    assert b'reading' in seen and b'Ctrl-D' in seen
    os.write(terminal, b'Hi\n')
    # A remark, its removal, and an answer.
    seen = until(terminal, b'\x1b[0m\r\x1b[2K')
    assert b'compiling' in seen
    answer = b''
    while len(answer) < 60:  # a speed needs two blocks, the first is one token
      answer += os.read(terminal, 60)
    running.send_signal(signal.SIGINT)
    seen = until(terminal, b'> ')
    assert b'interrupted' in seen and b'tokens/s' in seen
    assert seen.count(b'\x1b[2K') == 1  # no line of the answer was cleared
    assert running.poll() is None
    os.write(terminal, b'\x04')
    assert running.wait(60) == 0
  finally:
    running.kill()
    os.close(terminal)


def scripted(model, monkeypatch, messages, answers, **options):
  """The prompts of a conversation whose answers are given."""
  prompts, coming = [], iter(answers)

  def writer(*_, **__):
    def write(ids, key):
      prompts.append(ids)
      for block in next(coming):
        if block is KeyboardInterrupt:
          raise block
        yield model.tokenizer.encode(block)

    return write

  monkeypatch.setattr(chat, 'writer', writer)
  chat.converse(model, messages, **options)
  return prompts


def test_the_whole_conversation_is_the_prompt(model, monkeypatch, capsys):
  prompts = scripted(
    model,
    monkeypatch,
    ['a', 'b', ' /reset ', 'c', '/exit', 'd'],
    [['1', '2'], ['3'], ['4']],
    system='S',
  )
  turns = [
    {'role': 'system', 'content': 'S'},
    {'role': 'user', 'content': 'a'},
    {'role': 'model', 'content': '12'},
    {'role': 'user', 'content': 'b'},
  ]

  def expected(messages):
    return chat_tokens(model.tokenizer, messages, generate=True).ids

  assert prompts == [
    expected(turns[:2]),
    expected(turns),
    expected([turns[0], {'role': 'user', 'content': 'c'}]),
  ]
  assert capsys.readouterr().out == '12\n3\n4\n'


def test_an_interrupted_answer_is_remembered(model, monkeypatch, capsys):
  prompts = scripted(
    model, monkeypatch, ['a', 'b'], [['one', KeyboardInterrupt, 'two'], ['x']]
  )
  turns = [('user', 'a'), ('model', 'one'), ('user', 'b')]
  messages = [{'role': role, 'content': text} for role, text in turns]
  assert prompts[1] == chat_tokens(model.tokenizer, messages, generate=True).ids
  assert capsys.readouterr().out == 'one\nx\n'


def test_the_writer_streams_what_the_sampler_draws(model):
  prompt = chat_tokens(
    model.tokenizer, [{'role': 'user', 'content': 'Hi there'}], generate=True
  ).ids
  write = chat.writer(model, max_new_tokens=40, temperature=1.0)
  key = jax.random.key(3)
  blocks = [*write(prompt, key)]
  assert len(blocks) > 2 and len(blocks[0]) == 1
  ids = [i for block in blocks for i in block]
  assert len(ids) == 40 or ids[-1] in model.tokenizer.stop
  assert ids == [i for block in write(prompt, key) for i in block]
  assert ids != [i for block in write(prompt, jax.random.key(4)) for i in block]


def test_prompts_come_in_few_widths():
  widths = {chat._bucket([5] * n, 0).shape[1] for n in range(1, 1001)}
  assert widths == {64, 128, 256, 512, 1024}
  row = chat._bucket([7, 8, 9], 0)[0]
  assert row[-3:].tolist() == [7, 8, 9] and not row[:-3].any()


def test_bad_chats_are_told_before_the_weights(tmp_path, path, monkeypatch):
  monkeypatch.setattr(api, 'load', None)  # never reached
  write(tmp_path / 'bytes', 272)
  with pytest.raises(UserError, match='no tokenizer.model'):
    cli.main([str(tmp_path / 'bytes'), '--chat'])
  (tmp_path / 'gemma2.model').write_bytes(lookalike(2))
  write(tmp_path / 'gemma2', 5000, tmp_path / 'gemma2.model')
  with pytest.raises(UserError, match="--system: .*'system'.*Gemma 2"):
    cli.main([str(tmp_path / 'gemma2'), '--chat', '--system=x'])
  for more in ('--prompt=x', '--n=2', '--best-of=3'):
    with pytest.raises(UserError, match='--chat reads'):
      cli.main([str(path), '--chat', more])
  with pytest.raises(UserError, match='--system needs --chat'):
    cli.main([str(path), '--prompt=x', '--system=x'])


def test_a_tokenizer_without_turn_marks_is_told(tmp_path):
  (tmp_path / 't.model').write_bytes(
    lookalike(3).replace(b'<start_of_turn>', b'<start_of_tune>')
  )
  write(tmp_path / 'model', 5000, tmp_path / 't.model')
  with pytest.raises(UserError, match='no <start_of_turn> piece'):
    cli.main([str(tmp_path / 'model'), '--chat'])


def test_plain_prompts(path, capsys):
  argv = [str(path), '--prompt=Hi', '--prompt=Two', '--max_new_tokens=5']
  assert cli.main([*argv, '--temperature=0', '--n=2']) == 0
  out, err = capsys.readouterr()
  texts = out.split('\n' + '-' * 72 + '\n')
  assert [text[:2] for text in texts] == ['Hi', 'Hi', 'Tw', 'Tw', '']
  assert texts[0] == texts[1] and texts[2] == texts[3] and err == ''


@pytest.mark.parametrize(
  'argv, words',
  [
    (['--max_new_tokens=0'], '--max_new_tokens'),
    (['--temperature=-1'], '--temperature'),
    (['--n=3', '--best-of=2'], '--best-of=2'),
  ],
)
def test_bad_arguments(argv, words):
  with pytest.raises(UserError, match=words):
    cli.main(['nowhere', '--prompt=x', *argv])


def test_guidance_leads_away_from_a_text(model, path, capsys):
  words = [str(path), '--prompt=Hi there', '--max_new_tokens=8', '--seed=3']

  def said(*more):
    assert cli.main([*words, *more]) == 0
    return capsys.readouterr().out

  plain = said()
  assert said('--guidance=1') == plain
  # Led away from nothing but its own prompt, it is where it was.
  assert said('--guidance=3', '--uncond=Hi there') == plain
  led = said('--guidance=3', '--uncond=Two lines')
  assert led != plain
  texts = api.sample(
    model,
    ['Hi there'],
    max_new_tokens=8,
    guidance_scale=3.0,
    uncond='Two lines',
    key=jax.random.key(3),
  )
  assert led == f'Hi there{texts[0][0]}\n'
  with pytest.raises(UserError, match='--uncond needs --guidance'):
    cli.main([*words, '--uncond=x'])
  with pytest.raises(UserError, match='or --guidance'):
    cli.main([str(path), '--chat', '--guidance=3'])
