"""Imports every module and takes one training step: `python -m tests.smoke`."""

import importlib
import pkgutil
import sys

import jax

import alignjax
from alignjax import train
from alignjax.recipes.jbond import jbond
from alignjax.step import init_state, make_step
from alignjax.system.optimizer import optimizer
from tests import tiny


def main() -> None:
  modules = [
    info.name
    for info in pkgutil.walk_packages(alignjax.__path__, 'alignjax.')
    # _fused is C for ctypes, no module.
    if not info.name.endswith(('__main__', '._fused'))
  ]
  for module in modules:
    importlib.import_module(module)
  recipe = jbond(tiny.model(), tiny.evenness, max_new_tokens=4)
  tx = optimizer(1)
  state = init_state(recipe, tx, 0)
  batch = train.stage_batch(recipe, state, tiny.batch(), 0)
  state, metrics = jax.jit(make_step(recipe, tx))(state, batch)
  assert metrics['skipped'].number == 0
  print(f'{len(modules)} modules and one step on Python {sys.version[:7]}')


if __name__ == '__main__':
  main()
