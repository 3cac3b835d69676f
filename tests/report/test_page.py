import re
from html.parser import HTMLParser

import pytest

from alignjax.cli import console
from alignjax.cli import report as verb
from alignjax.core.errors import UserError
from alignjax.report import ink, report
from tests.report import synthetic

VOID = {'meta', 'br', 'link', 'img'}


class Page(HTMLParser):
  """Tags and attributes; fails on tags that do not nest."""

  def __init__(self, text):
    super().__init__()
    self.open, self.tags, self.attributes, self.text = [], [], [], ''
    self.feed(text)
    assert not self.open

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.attributes += attrs
    if tag not in VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.tags.append(tag)
    self.attributes += attrs

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    self.text += data


@pytest.fixture(scope='module')
def page(tmp_path_factory):
  work = synthetic.workdir(tmp_path_factory.mktemp('page'))
  lines = report([work], work / 'report.html')
  text = (work / 'report.html').read_text('utf-8')
  return work, lines, text, Page(text)


def test_nothing_is_fetched(page):
  _, _, text, parsed = page
  assert not {'script', 'link', 'img', 'iframe', 'base'} & set(parsed.tags)
  for name, value in parsed.attributes:
    assert name not in ('src', 'srcset', 'action', 'data') and name[:2] != 'on'
    if 'href' in name:
      assert value.startswith('#'), value
    if name != 'content':
      assert 'http:' not in value and 'https:' not in value, value
  assert all(u.startswith('#') for u in re.findall(r'url\(["\']?([^)]*)', text))
  assert '@import' not in text
  # What is left are addresses that a model wrote, as text.
  addresses = set(re.findall(r'https?://[^\s"<]*', text))
  assert addresses <= {'http://example.com/x'}
  assert "default-src 'none'" in text


def test_sections_come_in_order(page):
  _, lines, text, _ = page
  assert len(lines) == 3
  order = ['<h1>quickstart', 'class="findings"', 'What alignment gains']
  order += ['All models', 'Training curves', 'Where the time went']
  order += [
    'Completions side by side',
    '<h2>Configs',
    'How the numbers are computed',
  ]
  places = [text.index(o) for o in order]
  assert places == sorted(places)
  assert '128 held-out prompts' in text and 'pretrain (600 steps)' in text


def test_text_of_models_is_escaped(page):
  _, _, text, parsed = page
  assert '&quot;&quot;&quot;&lt;script&gt;' in text
  assert 'expected an int <not a str> & more' in parsed.text
  assert '(empty)' in text


def test_ids_are_unique(page):
  ids = [v for k, v in page[3].attributes if k == 'id']
  assert ids and len(ids) == len(set(ids))
  used = re.findall(r'(?:url\(|href=")#([\w-]+)', page[2])
  assert set(used) <= set(ids)


def test_the_best_is_bold(page):
  table = page[2][page[2].index('<table') : page[2].index('</table>')]
  # SLERP and LITI at rate 1 are the same model here.
  assert re.findall(r'<td><b>([^<]*)</b><small>\[0', table) == ['0.715'] * 2


def test_the_same_inputs_give_the_same_bytes(page, tmp_path):
  work, lines, text, _ = page
  assert report([work], tmp_path / 'again.html') == lines
  assert (tmp_path / 'again.html').read_text('utf-8') == text


def test_odd_text_survives(tmp_path):
  data = synthetic.evaluation()
  data['samples'] = [
    {
      'id': 1,
      'prompt': '\n\x00\ud800</pre>',
      'responses': {'init': {'text': '\nfirst', 'reward': None}},
    }
  ]
  data['models'][3]['name'] = '<anchor> & co'
  data['models'][4]['win_rate'] = None
  data['models'][5]['kind'] = 'ties'
  synthetic.write_evaluation(tmp_path, data)
  report([tmp_path], tmp_path / 'r.html')
  text = (tmp_path / 'r.html').read_text('utf-8')
  Page(text)
  # HTML drops the first newline of a <pre>; the text's own must stay.
  assert '>\n\n␀\ufffd&lt;/pre&gt;</pre>' in text
  assert '>\n\nfirst</pre>' in text and '&lt;anchor&gt; &amp; co' in text


def test_arms_and_diversity_are_on_the_page(tmp_path):
  data = synthetic.evaluation()
  for i, model in enumerate(data['models']):
    model['diversity'] = synthetic.bar(0.1 + 0.02 * i, 0.01)
    if model['kind'] == 'run':
      model['series'] = f'<arm {i}>'
  synthetic.write_evaluation(tmp_path, data)
  report([tmp_path], tmp_path / 'r.html')
  text = (tmp_path / 'r.html').read_text('utf-8')
  parsed = Page(text)
  assert text.index('All models') < text.index('<h2>Diversity')
  assert 'Models of one arm share a colour' in text
  assert '&lt;arm 1&gt;' in text and '<arm' not in text
  ids = [v for k, v in parsed.attributes if k == 'id']
  assert len(ids) == len(set(ids))
  # One colour per arm, in charts, table and samples.
  second = ink.looks(data['models'])['align_2'].fill
  assert f'background:{second}' in text


def test_curves_alone_make_no_claim_about_models(tmp_path):
  synthetic.write_run(tmp_path / 'w' / 'align', 50, 0, synthetic.ALIGN)
  lines = report([tmp_path / 'w'], tmp_path / 'r.html')
  assert len(lines) == 3
  assert '50 steps' in lines[0] and 'Training reward' in lines[1]
  assert 'No evaluation was found' in lines[2]
  assert 'All models' not in (tmp_path / 'r.html').read_text('utf-8')


def test_a_failure_leaves_the_old_report(tmp_path):
  synthetic.write_evaluation(tmp_path, synthetic.evaluation())
  out = tmp_path / 'r.html'
  out.write_text('old')
  (tmp_path / 'metrics.jsonl').write_text('{"step": 1}\noops\n{"step": 3}\n')
  with pytest.raises(UserError, match='line 2'):
    report([tmp_path], out)
  assert out.read_text() == 'old'
  (tmp_path / 'metrics.jsonl').unlink()
  with pytest.raises(UserError, match='cannot be written'):
    report([tmp_path], out / 'below' / 'a file.html')
  assert sorted(p.name for p in tmp_path.iterdir()) == ['evaluate', 'r.html']


def test_the_verb(tmp_path, capsys):
  work = tmp_path / 'w'
  synthetic.write_evaluation(work, synthetic.evaluation())
  png = tmp_path / 'front.png'
  assert verb.main([str(work), '--png', str(png)]) == 0
  told = capsys.readouterr().out.splitlines()
  assert len(told) == 4 and told[-1].endswith('report.html')
  assert (work / 'report.html').is_file() and png.is_file()


def test_the_verb_refuses_a_picture_of_nothing(tmp_path, capsys):
  synthetic.write_run(tmp_path / 'w' / 'sft', 5, 0, synthetic.SFT)
  argv = [str(tmp_path / 'w'), '--png', str(tmp_path / 'front.png')]
  assert console.call('report', verb.main, argv) == 2
  assert 'found none' in capsys.readouterr().err
  assert not (tmp_path / 'w' / 'report.html').exists()
