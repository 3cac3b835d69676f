import jax
import jax.numpy as jnp
import optax
import pytest

from alignjax import train
from alignjax.core.errors import UserError
from alignjax.core.types import Mean, Recipe
from alignjax.step import init_state
from alignjax.system import checkpoint, corruption
from tests.test_train import steps_source


def recipe(noise):
  """A quadratic; `noise()` comes from the host, as from a chip that errs."""

  def objective(bundle, batch, key):
    error = jax.pure_callback(noise, jax.ShapeDtypeStruct((), jnp.float32))
    x = bundle['policy']['x'] * (1 + jax.lax.stop_gradient(error))
    return {'x': (1.0, Mean.of(x + batch['id'], jnp.ones(1)))}, {}

  return Recipe(objective, {'policy': lambda key: {'x': jnp.zeros(())}})


def run(noise, workdir, **numbers):
  tx, method = optax.sgd(1.0), recipe(noise)
  schedule = train.Schedule(steps=8, save_every=2, **numbers)
  state = init_state(method, tx, 0)
  return train.train(
    method, tx, steps_source(), state, schedule, workdir=workdir
  )


def test_a_bit_that_differs_stops_the_run_before_anything_is_saved(tmp_path):
  calls = []

  def noise():
    calls.append(1)
    # The last bit of a float32, once: the second probe of step 6.
    return jnp.float32(2**-23 if len(calls) == wrong else 0)

  wrong = -1
  run(noise, tmp_path / 'clean', verify_every=3)
  # Each step evaluates loss and gradient; each probe the gradient alone.
  probes = len(calls)
  calls.clear()
  run(noise, tmp_path / 'off')
  each = len(calls) // 8
  assert probes == 8 * each + 2 * 2 * (probes - 8 * each) // 4 > 8 * each
  calls.clear()
  wrong = 5 * each + 3 * (probes - 8 * each) // 4 + 1
  with pytest.raises(
    UserError, match='step 6: the gradients .*policy/x'
  ) as error:
    run(noise, tmp_path / 'wrong', verify_every=3)
  assert '\n' not in str(error.value)
  kept = checkpoint.reader(tmp_path / 'wrong' / 'checkpoints').all_steps()
  assert sorted(kept) == [2, 4]


def test_off_compiles_and_runs_nothing(tmp_path, monkeypatch):
  monkeypatch.setattr(
    corruption.fingerprint, 'words', lambda x: pytest.fail('not off')
  )
  monkeypatch.setattr(checkpoint.fingerprint, 'of', lambda x: dict.fromkeys(x))
  _, finished = run(lambda: jnp.float32(0), tmp_path)
  assert finished
