"""An encoder of text, for distances between responses (arXiv 2410.06084).

The diversity reward of that paper needs an embedding in which two pieces of one
recording are near each other and pieces of different recordings are not; it is
trained by semi-hard triplets. Here a decoder's features are averaged over the
tokens of a text and mapped to `size` dimensions of unit norm. Two segments of
one document are a positive pair; the negatives are the other documents of the
same row of the batch (`sources.segments` gives rows of them). The model that
comes out is what the section `embedding` of `cfg_distill` and of `evaluate`
names.

Deviations from the paper: text in the place of sound, and a causal decoder in
that of a 25M-parameter ViT over mel-spectrograms; distances are 1 - cos, those
of the reward. Numbers that the paper does not give: margin, size (192 there is
a sibling's), the negatives per anchor, which are those of a row here.
"""

import functools
import math

import jax

from alignjax.core.errors import UserError
from alignjax.core.types import Mean, Model, Recipe
from alignjax.losses.contrastive import semi_hard_triplets
from alignjax.stages import arrange


def embed(model: Model, *, size: int = 64, margin: float = 0.2) -> Recipe:
  """Semi-hard triplets of segments; `size` of the vectors.

  Raises UserError where the source gives no pools of segments.
  """
  arrange.check_numbers(size=(size, 1, math.inf), margin=(margin, 1e-6, 2))
  encode = model.embed('policy')

  def objective(bundle, batch, key):
    del key
    count = batch['response'].shape[1] if 'response' in batch else 0
    if count < 4 or count % 2:
      raise UserError(
        f'recipe embed: found {count} texts in a row, expected pairs of two or '
        "more documents (source 'sources.segments')"
      )
    found = semi_hard_triplets(encode(bundle, batch), margin)
    # Segments without a token are nobody's.
    weight = batch['mask'].any(-1)
    loss = {'triplet': (1.0, Mean.of(found.loss, weight))}
    return loss, jax.lax.stop_gradient(
      {
        'positive': Mean.of(found.positive, weight),
        'negative': Mean.of(found.negative, weight),
        'nearest_is_partner': Mean.of(found.first, weight),
        'active': Mean.of(found.loss > 0, weight),
      }
    )

  return Recipe(
    objective=objective,
    init={'policy': functools.partial(model.embed_init, size=size)},
  )
