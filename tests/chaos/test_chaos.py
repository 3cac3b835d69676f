"""Twenty kills over five programs: nothing is different in the end."""

import pytest

from tests.chaos import programs


@pytest.mark.slow
@pytest.mark.parametrize('name', programs.NAMES)
def test_a_killed_run_ends_as_one_that_was_not(name, tmp_path):
  programs.survive(name, tmp_path, seed=0, kills=4)
