"""Leaves in blocks: whatever their shape, every item stays in its place."""

import ml_dtypes
import numpy as np
import pytest

from alignjax.core.errors import UserError
from alignjax.merge import blocks, inputs, method

BF16 = np.dtype(ml_dtypes.bfloat16)


def leaf(inputs, rows, columns):
  return blocks.Leaf(
    'layer_0/x', rows, columns, lambda a, b: [x[a:b] for x in inputs]
  )


@pytest.mark.parametrize('shape', [(2, 6), (3, 5), (1, 8), (4, 3), (1, 1)])
@pytest.mark.parametrize('name', ['linear', 'dare.linear'])
def test_items_stay_in_their_places(shape, name):
  draw = np.random.default_rng(1)
  x = [draw.normal(size=shape).astype(BF16) for _ in range(3)]
  base, *models = map(np.float64, x)
  how, one = method.method(name), leaf(x, *shape)
  numbers, expected = {}, sum(models) / 2
  if name != 'linear':
    numbers = {'density': 1.0}
    expected = base + sum(model - base for model in models)
  setting = blocks.settled(how, one, numbers)
  (found,) = blocks.merged(how, one, [setting], (0, shape[0]), [BF16])
  assert found.shape == shape
  assert np.allclose(np.float64(found), expected, rtol=2**-7, atol=2**-7)


def test_models_of_another_dtype_are_merged_in_order():
  draw = np.random.default_rng(2)
  x = [draw.normal(size=(4, 6)).astype(dtype) for dtype in (BF16, BF16, 'f4')]
  how, one = method.method('linear'), leaf(x, 4, 6)
  setting = blocks.settled(how, one, {})
  (found,) = blocks.merged(how, one, [setting], (0, 4), [np.float32])
  mean = (np.float32(x[1]) + x[2]) / 2
  assert np.allclose(found, mean, rtol=1e-6, atol=1e-7)


def test_rows_are_read_from_the_file_where_they_lie_together(tmp_path):
  x = np.random.default_rng(3).standard_normal((50, 6), np.float32)
  path = tmp_path / 'x'
  path.write_bytes(b'head' + x.tobytes())
  window = np.memmap(path, np.uint8, 'r', 4, (x.nbytes,))
  there = window.view(np.ndarray).view(np.float32).reshape(x.shape)
  for matrix in (there, there[7:], there.T, there[:, ::2], x):
    read = inputs.reader(matrix)
    for rows in ((0, len(matrix)), (1, 4), (2, 2)):
      assert np.array_equal(read(*rows), matrix[slice(*rows)])
  read = inputs.reader(there)
  path.write_bytes(b'head' + x.tobytes()[: 10 * 24])
  with pytest.raises(UserError, match='x has become shorter'):
    read(8, 12)
