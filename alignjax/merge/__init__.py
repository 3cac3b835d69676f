"""Merging of weights: methods, trees in memory, model directories on disk."""

from alignjax.merge.memory import merge as merge
