"""Merging of weights: methods, trees in memory, model directories on disk."""

import sys
import types

from alignjax.merge.memory import merge as merge


class _Room(types.ModuleType):
  """`alignjax.merge` names this package and, called, the function."""

  def __call__(self, *args, **numbers):
    return merge(*args, **numbers)


sys.modules[__name__].__class__ = _Room
