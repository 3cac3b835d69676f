"""Model Stock (arXiv 2403.19522): from the mean of models towards the base.

Fine-tuned models lie on a sphere around a centre; the point nearest to it on
the plane of base and models follows from the angle between task vectors alone.
"""

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float

from alignjax.merge import arrays
from alignjax.merge.arrays import Array
from alignjax.merge.combination import weighted_sum
from alignjax.merge.gram import recorded, task_gram
from alignjax.merge.method import Pass, merging
from alignjax.merge.sphere import directions


def ratio(gram: Float[Array, 'M M'], stats: Any = None, **numbers) -> Any:
  """t = M c / (1 + (M - 1) c), c the mean cosine between task vectors.

  c is bounded by 0 from below; a task vector of 0 has the cosine 0.
  """
  del stats, numbers
  xp, models = arrays.namespace(gram), len(gram)
  _, cosines = directions(gram)
  pairs = [cosines[i, j] for j in range(models) for i in range(j)]
  mean = xp.clip(sum(pairs) / len(pairs), 0, 1)
  return models * mean / (1 + (models - 1) * mean)


@merging(
  'between the base and the mean of the models, by the angle of the task'
  ' vectors, layer by layer',
  models=(2, None),
  passes=(Pass(task_gram, ratio),),
  grouped=True,
  report=recorded,
  as_stored=True,
)
def model_stock(
  base: Float[Array, '...'],
  leaves: Sequence[Float[Array, '...']],
  *,
  stats: Float[Array, ''],
) -> Float[Array, '...']:
  """t mean(leaves) + (1 - t) base, t = 2 c / (1 + c) for two models.

  Args:
    base: the pretrained weights.
    leaves: M >= 2 models.
    stats: t, the `ratio` of the group.

  Deviations from the paper: it has one angle for all pairs; this takes the mean
  of the pairwise cosines. Negative ones, which the paper does not meet, count
  as right angles, for which the base stays, rather than extrapolate.
  """
  share = stats / len(leaves)
  return weighted_sum([base, *leaves], [1 - stats, *[share] * len(leaves)])
