"""Object stores: a file there is written from its first byte to its last."""

import errno
import io

import fsspec
import numpy as np
import pytest
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem

from alignjax.cli import convert, merge
from alignjax.core.spec import Spec
from alignjax.interop import safetensors, safetensors_write
from alignjax.interop.open import open as open_model
from tests.interop import hf_tiny


class Upload(io.BytesIO):
  """What is written becomes an object when it is closed; it cannot seek."""

  def __init__(self, store, path):
    super().__init__()
    self._place = store, path

  def seekable(self):
    return False

  def seek(self, *place):
    raise OSError(errno.ESPIPE, 'Seek only available in read mode')

  def close(self):
    if not self.closed:
      store, path = self._place
      MemoryFileSystem.open(store, path, 'wb', data=self.getvalue()).close()
    super().close()


class Store(MemoryFileSystem):
  """Google's as fsspec has it, but for the network."""

  protocol = ('gcs', 'gs')
  store: dict = {}
  pseudo_dirs = ['']

  @classmethod
  def _strip_protocol(cls, path):
    path = str(path).removeprefix('gs://').removeprefix('gcs://')
    return MemoryFileSystem._strip_protocol(path)

  def open(self, path, mode='rb', **options):
    if 'w' in mode:
      stream = Upload(self, path)
      return stream if 'b' in mode else io.TextIOWrapper(stream, 'utf-8')
    return super().open(path, mode, **options)


@pytest.fixture
def bucket():
  fsspec.register_implementation('gcs', Store, clobber=True)
  backend.fsspec_backend._get_filesystem.cache_clear()
  store = fsspec.filesystem('gcs')
  store.mkdir('bucket')
  yield 'gs://bucket'
  store.rm('bucket', recursive=True)
  backend.fsspec_backend._get_filesystem.cache_clear()
  fsspec.register_implementation('gcs', 'gcsfs.GCSFileSystem', clobber=True)


def test_tensors_are_put_in_any_order(bucket):
  values = {
    name: np.full((3, 2), i, np.float32) for i, name in enumerate('abcd')
  }
  specs = {name: Spec(x.shape, x.dtype) for name, x in values.items()}
  with safetensors_write.writer(bucket, specs, shard_bytes=50) as put:
    for name in 'dbac':
      put(name, values[name])
  found = {}
  for file in ('model-00001-of-00002', 'model-00002-of-00002'):
    found |= safetensors.header(f'{bucket}/{file}.safetensors')
  assert sorted(found) == sorted(values)
  for name, tensor in found.items():
    assert np.array_equal(safetensors.read(tensor), values[name])


def test_models_are_converted_and_merged_there(bucket, tmp_path):
  draw = np.random.default_rng(0).normal
  tensors = {
    name: draw(size=shape).astype(np.float32)
    for name, shape in hf_tiny.shapes('gemma2').items()
  }
  local = hf_tiny.write(tmp_path / 'a', hf_tiny.CONFIGS['gemma2'], tensors)
  there, back = f'{bucket}/a', tmp_path / 'back'
  assert convert.main([str(local), there, '--to', 'hf']) == 0
  out = f'{bucket}/merged'
  words = ['linear', '--models', there, str(local), '--out', out]
  assert merge.main(words) == 0
  assert convert.main([out, str(back), '--to', 'hf']) == 0
  one, other = open_model(local), open_model(back)
  for name in one.leaves:
    assert np.array_equal(one.load(name), other.load(name)), name
