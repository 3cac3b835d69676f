"""Errors that are the user's to mend. Imports nothing: help needs no JAX."""


class UserError(Exception):
  """Bad input, told in one sentence. The CLI prints it and exits with 2."""
