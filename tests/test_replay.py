"""A past step, again: the same bits, or what is different."""

import json
import shutil

import pytest

from alignjax import replay, train
from alignjax.core.errors import UserError
from alignjax.recipes.jbond import jbond
from alignjax.step import init_state
from alignjax.system import metrics
from alignjax.system.optimizer import optimizer
from tests import tiny

RECIPE = jbond(tiny.model(), tiny.evenness, max_new_tokens=4)
SCHEDULE = train.Schedule(steps=7, save_every=2, keep=3, log_every=2)


def parts():
  tx = optimizer(7, lr=1e-2)
  return RECIPE, tx, tiny.prompt_source(), init_state(RECIPE, tx, 0), SCHEDULE


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('run')
  train.train(*parts(), workdir=workdir)
  return workdir


@pytest.fixture
def workdir(finished, tmp_path):
  return shutil.copytree(finished, tmp_path / 'w')


def again(workdir, step):
  return replay.replay(*parts(), workdir=workdir, step=step)


def test_from_the_nearest_checkpoint_bit_for_bit(finished):
  before = {p: p.stat().st_mtime_ns for p in finished.rglob('*')}
  done = again(finished, 7)
  assert (done.origin, done.differences) == (6, [])
  assert done.logged == metrics.read(finished / 'metrics.jsonl')[-1]
  assert set(done.row) == set(done.logged)
  assert {p: p.stat().st_mtime_ns for p in finished.rglob('*')} == before


def test_a_step_that_was_not_logged_has_nothing_to_compare_with(finished):
  done = again(finished, 5)
  assert (done.origin, done.row['step'], done.logged) == (4, 5, None)


def test_steps_that_cannot_be_made_again(finished):
  with pytest.raises(UserError, match=r'before step 4 .* are \[4, 6, 7\]'):
    again(finished, 4)
  with pytest.raises(UserError, match=r'found 8, expected a step from 1 to 7'):
    again(finished, 8)


def test_what_is_different_is_named(workdir):
  file = workdir / 'metrics.jsonl'
  rows = metrics.read(file)
  rows[-1]['reward'] += 1e-7
  file.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  done = again(workdir, 7)
  (told,) = done.differences
  assert told.startswith('reward ') and ' -> ' in told


def test_a_damaged_checkpoint_is_passed_over_and_left(workdir, capfd):
  shutil.rmtree(workdir / 'checkpoints' / '6' / 'meta')
  done = again(workdir, 7)
  assert (done.origin, done.differences) == (4, [])
  assert 'checkpoint 6' in capfd.readouterr().err
  assert (workdir / 'checkpoints' / '6').exists()
