"""Merging of weights: methods, trees in memory, model directories on disk."""

import sys
import types


class _Room(types.ModuleType):
  """`alignjax.merge` names this package and, called, `memory.merge`."""

  def __call__(self, *args, **numbers):
    # Here, as it imports JAX, which merging files does not need.
    from alignjax.merge.memory import merge

    return merge(*args, **numbers)


sys.modules[__name__].__class__ = _Room
