"""Package metadata: the one home of names, versions and dependencies."""

from pathlib import Path

from setuptools import Extension, find_packages, setup

SEARCH = ['cmaes']
TEST = [
  *SEARCH,
  'basedpyright',
  'hypothesis',
  'pytest',
  'pytest-xdist',
  'ruff',
]

setup(
  name='alignjax',
  version='0.1.0',
  description=(
    'Alignment methods for Gemma-class models in JAX, one short file each, '
    'on one training loop, with weight-space merging.'
  ),
  long_description=Path(__file__).with_name('README.md').read_text('utf-8'),
  long_description_content_type='text/markdown',
  license='Apache-2.0',
  python_requires='>=3.11,<3.14',
  packages=find_packages(include=['alignjax', 'alignjax.*']),
  package_data={'alignjax.report': ['*.css', '*.js', '*.html']},
  # Loaded with ctypes, so that it needs a compiler and no headers of Python's;
  # without a compiler the same is computed by NumPy.
  ext_modules=[
    Extension(
      'alignjax.merge._fused',
      ['alignjax/merge/fused.c'],
      extra_compile_args=['-O3', '-ffp-contract=off'],
      optional=True,
    )
  ],
  install_requires=[
    'absl-py',
    'array_record',
    'chex',
    'etils[epath]',
    'flax>=0.12',
    'grain',
    'importlib_resources',
    'jax>=0.10',
    'jaxtyping',
    'matplotlib',
    'ml-collections',
    'numpy',
    'optax',
    'orbax-checkpoint',
    'rich',
    'safetensors',
    'scipy',
    'sentencepiece',
    'tensorflow-datasets',
  ],
  extras_require={
    'tpu': ['jax[tpu]'],
    'gcs': ['gcsfs'],  # gs:// paths
    'plan': ['jax[tpu]'],  # with the libtpu that this jaxlib can read
    'search': SEARCH,  # alignjax merge search
    'test': TEST,
  },
  entry_points={'console_scripts': ['alignjax = alignjax.cli.__main__:main']},
)
