"""What is planned is what runs: shapes, places and bytes of real arrays."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from alignjax import train
from alignjax.core import lookup
from alignjax.core.errors import UserError
from alignjax.data.tokenizer import ByteTokenizer
from alignjax.models import sharding
from alignjax.plan import programs, stand_ins
from alignjax.plan.batch import source_batch
from alignjax.recipes.jbond import jbond
from alignjax.recipes.sft import sft
from alignjax.step import init_state
from alignjax.system import mesh as meshes
from alignjax.system.optimizer import optimizer
from tests import tiny

AXES = {'data': 2, 'fsdp': 2}
SCHEDULE = train.Schedule(steps=3)
# Odd prompt and response lengths, so that no two dimensions are alike.
PROMPTS = {'name': 'sources.prompts', 'prompt_tokens': 12}
TEXT = {'name': 'sources.text', 'length': 16}


def planned(recipe, source, mesh, which='all', rows=8):
  tx = optimizer(SCHEDULE.steps)
  state = programs.state(recipe, tx, {}, mesh, sharding.TABLE)
  batch = source_batch(source, rows)
  return programs.programs(
    recipe, tx, state, batch, SCHEDULE, mesh, tiny.config(), which=which
  )


def online(chunks=1):
  return jbond(
    tiny.model(),
    stand_ins.unscored(),
    max_new_tokens=5,
    rollout_chunks=chunks,
  )


@pytest.fixture(scope='module')
def mesh():
  return meshes.make(AXES)


@pytest.fixture(scope='module')
def found(mesh):
  return planned(online(), PROMPTS, mesh)


def test_state_is_that_of_a_run(mesh):
  recipe, tx = sft(tiny.model()), optimizer(3)
  abstract = programs.state(recipe, tx, {}, mesh, sharding.TABLE)
  real = init_state(recipe, tx, 0, mesh=mesh, table=sharding.TABLE)

  def same(a, b):
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
    assert a.sharding.is_equivalent_to(b.sharding, len(a.shape))

  jax.tree.map(same, abstract, real)


def test_an_abstract_mesh_gives_the_same_bytes(mesh):
  recipe = sft(tiny.model())
  flat = programs.abstract_mesh(AXES, 4)
  assert isinstance(flat, AbstractMesh)
  (real,), (shapes,) = (planned(recipe, TEXT, m) for m in (mesh, flat))
  assert real.arguments == shapes.arguments
  rest = programs.abstract_mesh({'data': 2, 'fsdp': -1}, 4)
  assert dict(rest.shape) == AXES


def test_argument_bytes_are_the_compilers(mesh):
  (step,) = planned(sft(tiny.model()), TEXT, mesh)
  assert (step.name, step.rows, step.length) == ('train', 8, 16)
  with programs.using(mesh):
    found = step.fn.lower(*step.args).compile().memory_analysis()
  # `id` is no part of the step, which jit drops: 4 bytes of each row.
  unused = 8 // 4 * 4
  assert sum(step.arguments.values()) - unused == found.argument_size_in_bytes
  assert found.alias_size_in_bytes > 0  # the state is donated


def test_programs_of_an_online_recipe(found):
  names = [program.name for program in found]
  assert names == ['rollout', 'stage ref_logp', 'train']
  rollout, scored, step = found
  # Three responses are drawn, one is scored, two are learned from.
  assert (rollout.rows, rollout.length, rollout.new) == (24, 17, 5)
  assert step.rows == 16
  assert rollout.cache > 0 and scored.cache == 0
  # Both roles decode; the optimizer waits in memory.
  assert rollout.arguments['frozen'] == step.arguments['frozen'] > 0
  assert rollout.resident == {'optimizer': step.arguments['optimizer']}
  assert scored.arguments['parameters'] == 0


def test_a_rollout_is_the_program_that_runs(mesh, found):
  rollout = found[0]
  with programs.using(mesh):
    compiled = rollout.fn.lower(*rollout.args).compile()
  known = sum(rollout.arguments.values())
  memory = compiled.memory_analysis()
  np.testing.assert_allclose(known, memory.argument_size_in_bytes, rtol=0.01)


def test_chunks_are_one_program(mesh, found):
  whole = found[0]
  (part,) = planned(online(chunks=2), PROMPTS, mesh, 'rollout')
  assert (part.count, part.rows) == (2, whole.rows // 2)
  # But for the counter of columns.
  assert 0 <= part.cache * 2 - whole.cache <= 4


def test_batches_are_those_of_the_source():
  tokens = ByteTokenizer()
  for name, field in (('text', 'length'), ('prompts', 'prompt_tokens')):
    section = lookup.defaults('data', f'sources.{name}', **{field: 32})
    source = lookup.build('data', section, tokens, 4, 0)
    shapes = source_batch(section, 4)
    real = {k: (x.shape, x.dtype) for k, x in source.batch(0).items()}
    assert {k: (x.shape, x.dtype) for k, x in shapes.items()} == real


def test_batches_of_guidance_and_of_segments():
  tokens = ByteTokenizer()
  for name, numbers in (
    ('sources.prompts', {'prompt_tokens': 32, 'uncond': ''}),
    ('segments', {'length': 16, 'documents': 3}),
  ):
    section = lookup.defaults('data', name, max_bytes=200_000, **numbers)
    source = lookup.build('data', section, tokens, 4, 0)
    real = {k: (x.shape, x.dtype) for k, x in source.batch(0).items()}
    shapes = source_batch(section, 4)
    assert {k: (x.shape, x.dtype) for k, x in shapes.items()} == real


def test_batches_of_other_kinds(tmp_path):
  shapes = source_batch(PROMPTS | {'response_tokens': 5}, 4)
  assert shapes['response'].shape == shapes['mask'].shape == (4, 1, 5)
  facts = {'format': 1, 'k': 7, 'rows': 3, 'shard_rows': 2}
  (tmp_path / 'teacher.json').write_text(json.dumps(facts))
  section = {'name': 'teacher.recorded', 'rows': TEXT, 'path': str(tmp_path)}
  shapes = source_batch(section, 4)
  for name in ('teacher_ids', 'teacher_probs'):
    assert shapes[name].shape == (4, 15, 7)


def test_an_unknown_source_is_told():
  with pytest.raises(UserError, match="'my.source'.*neither `length`"):
    source_batch({'name': 'my.source'}, 4)


def test_no_rollout_is_told(mesh):
  with pytest.raises(UserError, match='no rollout'):
    planned(sft(tiny.model()), TEXT, mesh, 'rollout')


def test_a_mesh_that_does_not_divide_names_leaf_and_axis():
  mesh = programs.abstract_mesh({'tensor': 3}, 3)
  with pytest.raises(UserError, match=r'tensor of size 3.*policy/'):
    planned(sft(tiny.model()), TEXT, mesh)


@pytest.mark.parametrize(
  'axes, words', [({'rows': 4}, "no axis 'rows'"), ({'data': 3}, 'not fill')]
)
def test_a_mesh_that_is_none(axes, words):
  with pytest.raises(UserError, match=words):
    programs.abstract_mesh(axes, 4)


def test_a_stage_of_the_host_is_run_on_zeros():
  def host(bundle, batch, key):
    del bundle, key
    length = [len(set(row)) for row in np.asarray(batch['prompt'])]
    return batch | {'value': jnp.asarray(length, jnp.float32)[:, None]}

  fields = source_batch(PROMPTS, 8)
  mesh = programs.abstract_mesh({'data': 1}, 1)
  args = ({}, programs._on_rows(fields, mesh), jax.random.key(0))
  after, calls = programs._traced(host, args, mesh)
  assert after['value'].shape == (8, 1) and calls == []
