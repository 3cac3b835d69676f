"""Rows between hosts and mesh: whole, in order, each with one owner."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from alignjax.system import mesh as meshes
from alignjax.system import rows
from tests.system.test_hosts import port

ROOT = Path(__file__).parents[2]

# 'tensor' spans both processes, so that each of them holds every row; 'data'
# gives each its own half.
SCRIPT = """
import sys
import jax
import numpy as np
from alignjax.system import hosts, mesh, rows

with hosts.session(hosts.Hosts(sys.argv[1], 2, int(sys.argv[2]), 60, 20)):
  me = jax.process_index()
  for axis, count in ('tensor', (4, 1)[me]), ('data', 2):
    place = mesh.rows(mesh.make({axis: 2}))
    whole = {'id': np.arange(4), 'prompt': np.arange(8).reshape(4, 2)}
    batch = rows.to_mesh(whole, place)
    mine = rows.to_host(batch, ('id', 'prompt', 'response'))
    assert sorted(mine) == ['id', 'prompt']
    assert len(mine['id']) == count, mine
    np.testing.assert_array_equal(mine['prompt'], whole['prompt'][mine['id']])
    # What another process says about a row that is not its own is not heard.
    values = mine['id'] + (100 if axis == 'tensor' and me else 0.5)
    back = rows.from_host(values.astype(np.float32), batch['id'])
    assert back.sharding.is_equivalent_to(place, 1)
    np.testing.assert_array_equal(hosts.whole(back), np.arange(4) + 0.5)
"""


def test_every_row_has_one_owner():
  address = f'127.0.0.1:{port()}'
  environment = os.environ | {'XLA_FLAGS': '', 'PYTHONPATH': str(ROOT)}
  running = [
    subprocess.Popen(
      [sys.executable, '-c', SCRIPT, address, str(i)],
      env=environment,
      stderr=subprocess.PIPE,
      text=True,
    )
    for i in range(2)
  ]
  said = [process.communicate(timeout=240)[1] for process in running]
  assert [process.returncode for process in running] == [0, 0], said


@pytest.mark.parametrize('axes', [{'data': 4}, {'data': 2, 'tensor': 2}])
def test_one_process_owns_all_rows(axes):
  place = meshes.rows(meshes.make(axes))
  whole = {'id': np.arange(4), 'mask': np.eye(4, dtype=bool)}
  batch = rows.to_mesh(whole, place)
  assert batch['mask'].sharding == place
  mine = rows.to_host(batch, ('id', 'mask'))
  np.testing.assert_array_equal(mine['mask'], whole['mask'])
  back = rows.from_host(mine['id'] * 2.0, batch['mask'])
  assert isinstance(back, jax.Array) and back.sharding == place
  np.testing.assert_array_equal(back, whole['id'] * 2.0)
