"""The papers' experiments: every graph is whole, and WARP's really runs."""

import importlib
import json
from pathlib import Path

import jax
import numpy as np
import pytest

import alignjax as aj
from alignjax.cli import config as configs
from alignjax.cli import parts, starts
from alignjax.cloud import jobs
from alignjax.core import lookup, tree
from alignjax.data.tokenizer import ByteTokenizer
from alignjax.merge import deferred, inputs
from alignjax.models import decoder
from alignjax.models.config import to_json
from alignjax.system import model_dir
from configs import quickstart
from configs.papers import bond, infalign, jbond, warp
from tests import tiny
from tests.chaos.programs import write_text

GRAPHS = {p.__name__.split('.')[-1]: p for p in (bond, infalign, jbond, warp)}


def graph_of(program, config):
  return jobs.order(
    job._replace(config=configs.plain(job.config))
    for job in program.jobs(config)
  )


def strings(value):
  if isinstance(value, str):
    yield value
  elif isinstance(value, dict):
    for item in value.values():
      yield from strings(item)
  elif isinstance(value, list | tuple):
    for item in value:
      yield from strings(item)


@pytest.mark.parametrize('variant', ['', 'tiny'])
@pytest.mark.parametrize('name', GRAPHS)
def test_every_reference_is_a_job_or_a_role(name, variant):
  config = GRAPHS[name].get_config(variant)
  config.start.policy = 'MODEL'
  graph = graph_of(GRAPHS[name], config)
  known = {job.name for job in graph}
  for job in graph:
    roles = set(job.config.get('start', {}))
    named = {s[1:].split('/')[0] for s in strings(job.config) if s[:1] == '@'}
    assert named <= known | roles, job.name
  assert graph[-1].verb == 'report'
  assert 'COMMAND: alignjax run' in GRAPHS[name].__doc__


@pytest.mark.parametrize('variant', ['', 'tiny'])
@pytest.mark.parametrize('name', GRAPHS)
def test_every_run_is_a_recipe_with_its_roles(name, variant):
  # Recipes check their numbers when they are built; nothing is trained.
  for job in graph_of(GRAPHS[name], GRAPHS[name].get_config(variant)):
    if job.verb != 'train':
      continue
    c = configs.from_json(json.dumps(job.config), job.name)
    assert set(c.recipe) == set(lookup.defaults('recipes', c.recipe.name))
    recipe = parts.recipe(c, tiny.model(), ByteTokenizer())
    assert set(c.start) <= set(recipe.init), job.name
    starts.check(c, recipe)
    lookup.build('system', c.optimizer, c.steps)


@pytest.mark.parametrize('name', GRAPHS)
def test_no_prompt_of_an_evaluation_is_trained_on(name):
  shares = set()
  for job in graph_of(GRAPHS[name], GRAPHS[name].get_config()):
    source = job.config.get('source', {})
    source = source.get('rows', source)
    if source:
      shares.add(source['held_out'])
      assert source['part'] == (
        'held_out' if job.verb == 'evaluate' else 'train'
      )
  assert len(shares) == 1


@pytest.mark.parametrize('variant', ['', 'tiny'])
def test_both_parts_of_the_source_have_prompts(variant):
  c = warp.get_config(variant)
  c.source.prompt_tokens = 100  # bytes, about as much as 32 tokens
  tokens = ByteTokenizer()
  for part, least in (
    ('train', 4 * c.batch_size),
    ('held_out', c.graph.evaluate.prompts),
  ):
    c.source.part = part
    assert len(lookup.build('data', c.source, tokens, 1, 0)) >= least


def test_bond_and_jbond_compare_what_the_paper_compares():
  def recipes(program):
    return [
      job.config['recipe']
      for job in graph_of(program, program.get_config())
      if job.verb == 'train'
    ]

  found = recipes(bond)
  assert len(found) == 3 * 8
  fixed = [r for r in found if not r['anchor_period']]
  assert {r['jeffreys_weight'] for r in fixed} == {0, 0.5, 1}
  assert {r['n'] for r in found if r['anchor_period']} == {2, 4}
  assert {r['quantile'] for r in found} == {'sampled', 'learned'}
  found = recipes(jbond)
  grid = {r['kl_coef'] for r in found if r['name'] == 'reinforce'}
  assert grid == {0.001, 0.01, 0.1, 1}
  own = [r for r in found if r['name'] == 'jbond']
  assert {r['ema_rate'] for r in own} == {0, 0.02, 0.05}
  assert {r['anchor_kl_coef'] for r in own} == {0, 1, 2}
  assert {r['anchor_period'] for r in own} == {0, 25}


def test_warp_starts_every_round_anew():
  config = warp.get_config()
  config.start.policy = 'SFT'
  graph = {job.name: job for job in graph_of(warp, config)}
  runs = {
    n: j.config
    for n, j in graph.items()
    if j.verb == 'train' and n.startswith('seed')
  }
  assert len(runs) == 3 * 9
  assert len({c['seed'] for c in runs.values()}) == 3 * 9  # other prompt orders

  def liti(base, model, rate):
    return {
      'method': 'liti',
      'base': base,
      'models': [model],
      'liti_rate': rate,
    }

  for seed in (1, 2, 3):
    inits = ['SFT']
    for i in (1, 2):
      end = f'@seed_{seed}_round_{i}_slerp/model'
      inits.append(liti(inits[-1], end, 0.3))
    for name, c in runs.items():
      if name.startswith(f'seed_{seed}'):
        i = int(name.split('_')[3])
        assert c['start'] == {'policy': inits[i - 1]}  # and so does the anchor
        assert c['steps'] == (72, 56, 40)[i - 1]
        assert 'graph' not in c
    models = graph['evaluate_rounds'].config['models']
    models = [m for m in models if m['name'].endswith(f'({seed})')]
    for i in (1, 2, 3):
      merge = graph[f'seed_{seed}_round_{i}_slerp'].config
      assert merge['method'] == 'slerp' and merge['base'] == inits[i - 1]
      assert merge['models'] == [
        f'@seed_{seed}_round_{i}_run_{m}/model' for m in (1, 2, 3)
      ]
      front = [m for m in models if m.get('series') == f'round {i}']
      end = f'@seed_{seed}_round_{i}_slerp/model'
      rates = (0.1, 0.3, 0.5, 0.8)
      expected = [*(liti('SFT', end, rate) for rate in rates), end]
      assert [m['path'] for m in front] == expected


def test_warp_compares_its_anchor_with_the_sft_model():
  config = warp.get_config()
  config.start.policy = 'SFT'
  graph = {job.name: job.config for job in graph_of(warp, config)}
  models = graph['evaluate_anchors']['models'][1:]
  assert len(models) == 3 * 3 * (1 + 3)
  found = set()
  for m in models:
    run = graph[m['path'][1:].removesuffix('/model')]
    assert run['steps'] == m['numbers']['steps']
    recipe, moving = run['recipe'], m['series'] == 'EMA anchor'
    assert recipe['name'] == 'warp' and moving == (recipe['ema_rate'] > 0)
    assert moving or run['start']['anchor'] == '@policy'
    found.add((moving, recipe['kl_coef'], run['steps']))
  steps = (36, 72, 144)
  assert found == {(True, 0.1, n) for n in steps} | {
    (False, coef, n) for coef in (0.01, 0.03, 0.1) for n in steps
  }


def test_of_warp_the_last_merge_alone_can_be_written():
  config = warp.get_config()
  config.start.policy = 'SFT'
  config.graph.write_rounds = False
  graph = {job.name: job for job in graph_of(warp, config)}
  assert [n for n, j in graph.items() if j.verb == 'merge'] == [
    f'seed_{seed}_round_3_slerp' for seed in (1, 2, 3)
  ]
  runs = [f'@seed_2_round_1_run_{m}/model' for m in (1, 2, 3)]
  init = graph['seed_2_round_2_run_1'].config['start']['policy']
  slerp = {'method': 'slerp', 'base': 'SFT', 'models': runs}
  assert init['models'] == [slerp] and init['method'] == 'liti'


def test_warp_and_the_quickstart_draw_their_geometry():
  config = warp.get_config()
  config.start.policy = 'SFT'
  for graph, base, runs in (
    (graph_of(warp, config), 'SFT', 'seed_1_round_1_run_{}'),
    (
      graph_of(quickstart, quickstart.get_config()),
      '@pretrain/model',
      'align_{}',
    ),
  ):
    jobs_of = {job.name: job for job in graph}
    job = jobs_of['geometry']
    assert job.verb == 'inspect' and job.config['base'] == base
    count = len(job.config['models'])
    assert job.config['models'] == [
      f'@{runs.format(m)}/model' for m in range(1, count + 1)
    ]
    assert count >= 2 and 'geometry' in jobs_of['report'].needs


@pytest.fixture(scope='module', params=[True, False])
def rounds(request, tmp_path_factory):
  """WARP's graph on a decoder of a few thousand weights: 2 rounds of 2 runs."""
  folder = tmp_path_factory.mktemp('warp')
  params = tiny.bundle(tiny.model(layers=1), 'policy')['policy']
  model_dir.write(
    folder / 'sft',
    config=to_json(tiny.config(layers=1)),
    params={'policy': jax.device_get(decoder.canonical(params))},
    provenance={},
  )
  c = warp.get_config('tiny')
  c.start.policy = str(folder / 'sft')
  c.source.path = str(write_text(folder / 'text'))
  c.source.prompt_tokens = 16
  c.source.held_out = 0.3
  c.recipe.max_new_tokens = 4
  c.optimizer.lr = 0.01
  c.graph.steps, c.graph.rates = (3, 2), (0.5,)
  c.graph.write_rounds = request.param
  c.graph.evaluate.prompts = c.graph.evaluate.batch_size = 8
  graph = graph_of(warp, c)
  names = [job.name for job in graph]
  work = folder / 'work'
  others = ('evaluate_runs', 'evaluate_anchors')
  for job in graph:
    # Others of the kind: their models, and two evaluations of three.
    if job.name in others or 'anchor_' in job.name:
      continue
    where = work / job.name
    where.mkdir(parents=True)
    settings = jobs.resolved(job.config, names, work)
    (where / 'job.json').write_text(json.dumps(settings))
    verb = importlib.import_module(f'alignjax.cli.{job.verb}')
    arguments = [f'--config={where / "job.json"}', f'--workdir={where}']
    assert verb.main(arguments) == 0, job.name
  return folder / 'sft', work


def weights(path: Path):
  return tree.named(aj.load(path).params)


def test_warp_runs_and_its_merges_are_the_papers(rounds):
  sft, work = rounds
  init = aj.load(sft).params
  for i, steps in ((1, 3), (2, 2)):
    runs = [work / f'seed_1_round_{i}_run_{m}' for m in (1, 2)]
    for run in runs:
      lines = (run / 'metrics.jsonl').read_text().splitlines()
      assert [json.loads(line)['step'] for line in lines] == [
        *range(1, steps + 1)
      ]
    # A fresh anchor has not left the init by the first step's sampling.
    first = json.loads((runs[0] / 'metrics.jsonl').read_text().splitlines()[0])
    assert abs(first['anchor_kl']) < 1e-5
    models = [aj.load(run / 'model').params for run in runs]
    one, two = map(tree.named, models)
    assert any(np.any(one[name] != two[name]) for name in one)
    merged = aj.merge('slerp', base=init, models=models, t=0.5)
    if (work / f'seed_1_round_{i}_slerp').exists():
      found = weights(work / f'seed_1_round_{i}_slerp' / 'model')
      for name, leaf in tree.named(merged).items():
        np.testing.assert_allclose(found[name], leaf, atol=1e-6)
    init = aj.merge('liti', base=init, models=[merged], liti_rate=0.3)
  assert 'seed_1_round_2_slerp' in {path.name for path in work.iterdir()}


def test_warp_begins_the_second_round_at_its_liti(rounds):
  sft, work = rounds
  models = [
    aj.load(work / f'seed_1_round_1_run_{m}' / 'model').params for m in (1, 2)
  ]
  base = aj.load(sft).params
  slerp = aj.merge('slerp', base=base, models=models, t=0.5)
  expected = tree.named(
    aj.merge('liti', base=base, models=[slerp], liti_rate=0.3)
  )
  config = json.loads((work / 'seed_1_round_2_run_1' / 'job.json').read_text())
  found = deferred.opened(config['start']['policy'])
  for name, leaf in expected.items():
    np.testing.assert_allclose(found.load(name), leaf, atol=1e-6)
  said = model_dir.read(work / 'seed_1_round_2_run_1' / 'model').provenance[
    'init'
  ]
  assert said['checksum'] == inputs.digest(found, 'policy')
  written = sorted(path.parent.name for path in work.glob('*/model'))
  merged = (
    ['seed_1_round_1_slerp'] if (work / 'seed_1_round_1_slerp').exists() else []
  )
  runs = [f'seed_1_round_{i}_run_{m}' for i in (1, 2) for m in (1, 2)]
  assert written == sorted([*runs, *merged, 'seed_1_round_2_slerp'])


def test_warp_evaluates_a_front_for_every_round(rounds):
  _, work = rounds
  path = work / 'evaluate_rounds' / 'evaluation.json'
  models = json.loads(path.read_text())['models']
  assert [m['series'] for m in models] == [
    '',
    *['round 1'] * 2,
    *['round 2'] * 2,
  ]
  assert abs(models[0]['kl']['mean']) < 1e-6
  page = (work / 'report.html').read_text()
  assert 'LITI, round 1' in page and 'LITI, round 2' in page
  assert 'How the task vectors lie' in page
  assert 'seed_1_round_1_run_1 · seed_1_round_1_run_2' in page
