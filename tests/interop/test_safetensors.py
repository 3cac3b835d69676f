import json
import struct
import weakref

import ml_dtypes
import numpy as np
import pytest
from safetensors import numpy as peer

from alignjax.core.errors import UserError
from alignjax.core.spec import Spec
from alignjax.interop import safetensors, safetensors_write

BF16 = ml_dtypes.bfloat16


def arrays() -> dict[str, np.ndarray]:
  rng = np.random.default_rng(0)
  # Random bits: NaNs and infinities survive as well.
  bits = rng.integers(0, 2**16, (4, 6), dtype=np.uint16)
  return {
    'b.half': bits.view(BF16),
    'a.half': bits.view(np.float16),
    'wide': rng.normal(size=(3, 2, 5)).astype(np.float32),
    'double': rng.normal(size=7),
    'count': rng.integers(-9, 9, (2, 2)),
    'byte': rng.integers(0, 9, 5, dtype=np.uint8),
    'flag': np.array([True, False, True]),
    'scalar': np.array(2.5, np.float32),
  }


def specs(values):
  return {k: Spec(x.shape, x.dtype) for k, x in values.items()}


def raw(header, data: bytes = b'') -> bytes:
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  return struct.pack('<Q', len(text)) + text + data


def entry(dtype='F32', shape=(2,), offsets=(0, 8)):
  return {'dtype': dtype, 'shape': list(shape), 'data_offsets': list(offsets)}


def test_reads_what_the_package_writes(tmp_path):
  peer.save_file(arrays(), tmp_path / 'x.safetensors', {'format': 'pt'})
  found = safetensors.header(tmp_path / 'x.safetensors')
  assert set(found) == set(arrays())
  for name, expected in arrays().items():
    array = safetensors.read(found[name])
    assert array.dtype == expected.dtype and array.shape == expected.shape
    assert array.tobytes() == expected.tobytes()
    assert array.flags.writeable and array.flags.c_contiguous


def test_writes_the_file_that_the_package_writes(tmp_path):
  # Byte for byte, so that a file that is read and written stays as it was.
  values = arrays() | {'ä"\n': np.ones(3, np.float32)}
  peer.save_file(values, tmp_path / 'x.safetensors', {'format': 'pt'})
  with safetensors_write.writer(tmp_path, specs(values)) as put:
    for name in sorted(values):
      put(name, values[name])
  ours = (tmp_path / 'model.safetensors').read_bytes()
  assert ours == (tmp_path / 'x.safetensors').read_bytes()
  assert not (tmp_path / 'model.safetensors.index.json').exists()


def test_rows_read_only_these(tmp_path):
  table = np.arange(40, dtype=np.float32).reshape(10, 2, 2)
  peer.save_file({'a': table, 'b': table}, tmp_path / 'x.safetensors')
  tensor = safetensors.header(tmp_path / 'x.safetensors')['b']
  assert (safetensors.rows(tensor, 3, 5) == table[3:5]).all()
  assert safetensors.rows(tensor, 4, 4).shape == (0, 2, 2)
  with pytest.raises(IndexError):
    safetensors.rows(tensor, 3, 11)


def test_same_compares_bytes(tmp_path):
  a = np.arange(6, dtype=np.float32)
  b = a.copy()
  b[-1] = 7
  values = {'a': a, 'a2': a.copy(), 'b': b, 'bits': a.view(np.int32)}
  peer.save_file(values, tmp_path / 'x.safetensors')
  x = safetensors.header(tmp_path / 'x.safetensors')
  assert safetensors.same(x['a'], x['a2'], piece_bytes=7)
  assert not safetensors.same(x['a'], x['b'], piece_bytes=7)
  assert not safetensors.same(x['a'], x['bits'])


def test_shards_and_index(tmp_path):
  values = {f't{i}': np.full((10,), i, np.float32) for i in range(5)}
  with safetensors_write.writer(tmp_path, specs(values), shard_bytes=80) as put:
    for name in reversed(values):
      put(name, values[name])
  index = json.loads((tmp_path / 'model.safetensors.index.json').read_text())
  assert index['metadata'] == {'total_size': 200}
  files = [f'model-0000{i}-of-00003.safetensors' for i in (1, 2, 3)]
  assert [index['weight_map'][f't{i}'] for i in range(5)] == [
    files[0],
    files[0],
    files[1],
    files[1],
    files[2],
  ]
  found = {}
  for file in files:
    found |= peer.load_file(tmp_path / file)
  assert all((found[name] == x).all() for name, x in values.items())


def test_a_tensor_larger_than_a_shard_has_its_own(tmp_path):
  values = {'a': np.zeros(30, np.uint8), 'b': np.ones(2, np.uint8)}
  with safetensors_write.writer(tmp_path, specs(values), shard_bytes=8) as put:
    for name, x in values.items():
      put(name, x)
  assert len(list(tmp_path.glob('*.safetensors'))) == 2


@pytest.mark.parametrize(
  'puts, message',
  [
    ([('a', np.zeros(2, np.float32))] * 2, 'twice'),
    ([('a', np.zeros(3, np.float32))], 'announced'),
    ([('a', np.zeros(2, np.float64))], 'announced'),
    ([], 'never put'),
  ],
)
def test_writer_is_held_to_its_announcement(tmp_path, puts, message):
  announced = {'a': Spec((2,), np.float32)}
  with pytest.raises(ValueError, match=message):
    with safetensors_write.writer(tmp_path, announced) as put:
      for name, x in puts:
        put(name, x)


def test_truncated_file_names_the_tensor_and_the_bytes(tmp_path):
  file = tmp_path / 'x.safetensors'
  file.write_bytes(
    raw({'a': entry(), 'late': entry(offsets=(8, 16))}, b'\0' * 15)
  )
  size = file.stat().st_size
  with pytest.raises(UserError, match='truncated') as caught:
    safetensors.header(file)
  for part in (str(file), "'late'", f'{size - 7} to {size + 1}', f'has {size}'):
    assert part in str(caught.value)


def test_file_cut_after_its_header_was_read(tmp_path):
  file = tmp_path / 'x.safetensors'
  file.write_bytes(raw({'a': entry()}, b'\0' * 8))
  tensor = safetensors.header(file)['a']
  file.write_bytes(file.read_bytes()[:-3])
  with pytest.raises(UserError, match="truncated: tensor 'a'"):
    safetensors.read(tensor)


@pytest.mark.parametrize(
  'data, message',
  [
    (b'', 'header'),
    (b'\x80\x04', 'header'),
    (struct.pack('<Q', 1 << 40) + b'{}', 'header'),
    (struct.pack('<Q', 50) + b'{}', 'truncated: its header needs 58 bytes'),
    (raw(b'\x80\x04'), 'not JSON'),
    (raw(b'[' * 10000), 'not JSON'),
    (raw([]), 'no object'),
    (raw(b'{"a": 1, "a": 2}'), 'occurs twice'),
    (raw({'a': 3}), "'a' has no description"),
    (raw({'a': entry(dtype='Q4')}, b'0' * 8), "dtype 'Q4'"),
    (raw({'a': entry(dtype=['F32'])}, b'0' * 8), 'dtype'),
    (raw({'a': entry(shape=[2, -1])}, b'0' * 8), r'shape \[2, -1\]'),
    (raw({'a': entry(shape=[True])}, b'0' * 8), 'shape'),
    (raw({'a': entry(shape=[2.0])}, b'0' * 8), 'shape'),
    (raw({'a': entry(shape=[3])}, b'0' * 8), 'has 8 bytes, expected 12'),
    (raw({'a': entry(shape=[2**62, 2**62])}, b'0' * 8), 'expected'),
    (raw({'a': entry(offsets=(8, 0))}, b'0' * 8), 'has -8 bytes'),
    (raw({'a': entry(offsets=(0, 8, 9))}, b'0' * 8), 'data_offsets'),
    (raw({'a': {'dtype': 'F32'}}, b'0' * 8), 'shape None'),
    (raw({'a': entry(offsets=(8, 16))}, b'0' * 16), 'begins at byte'),
    (raw({'a': entry(), 'b': entry()}, b'0' * 8), 'begins at byte'),
    (raw({'a': entry()}, b'0' * 9), 'describes'),
  ],
)
def test_unsound_headers_are_refused(tmp_path, data, message):
  file = tmp_path / 'x.safetensors'
  file.write_bytes(data)
  with pytest.raises(UserError, match=message) as caught:
    safetensors.header(file)
  assert str(file) in str(caught.value)


def test_arrays_are_freed_when_they_are_let_go(tmp_path):
  peer.save_file({'a': np.zeros(4, np.float32)}, tmp_path / 'x.safetensors')
  array = safetensors.read(safetensors.header(tmp_path / 'x.safetensors')['a'])
  gone = weakref.ref(array)
  del array
  assert gone() is None
