"""A job graph of seconds: pretraining, two alignments, their SLERP."""

from ml_collections import ConfigDict

from alignjax.cloud.jobs import Job
from tests.chaos.programs import settings


def get_config():
  return ConfigDict({'text': ''})


def jobs(c):
  yield Job('pretrain', 'train', settings(c.text, 'sft', steps=16))
  runs = ('align_1', 'align_2')
  for seed, name in enumerate(runs):
    start = {'policy': '@pretrain/model'}
    config = settings(c.text, 'jbond', steps=12, seed=seed, start=start)
    yield Job(name, 'train', config, needs=('pretrain',))
  models = [f'@{name}/model' for name in runs]
  yield Job(
    'slerp',
    'merge',
    {'base': '@pretrain/model', 'method': 'slerp', 'models': models, 't': 0.5},
    needs=('pretrain', *runs),
  )
