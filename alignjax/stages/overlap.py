"""Drawing and scoring at the same time, on chunks of the prompts.

While the host scores the responses of one chunk, the device decodes the next
ones. Every chunk is dispatched before the first is scored, and the device
takes them in order: the reward is called by the thread that trains, one chunk
after the other, so rewards that talk to other hosts stay in step and errors
come out where they belong. It scores nothing itself.
"""

from functools import partial

import jax
import jax.numpy as jnp

from alignjax.core.errors import UserError
from alignjax.core.types import Batch, Stage
from alignjax.system import ledger


def overlap(draw: Stage, score: Stage, *, chunks: int) -> tuple[Stage, ...]:
  """`draw`, then `score`, on `chunks` parts of the rows; one chunk is both.

  Both keep the rows of B and treat each by itself, with randomness from its
  `id`; the batch does not depend on `chunks`, unless `score` draws, which gets
  another key in chunks. Chunk m is rows m::chunks, as a contiguous split of a
  sharded batch would move data.

  Raises:
    UserError: `chunks` is not positive or does not divide the rows. An error
      of `score` names the rows of its chunk.
  """
  if chunks < 1:
    raise UserError(
      f'recipe.rollout_chunks: found {chunks}, expected 1 or more'
    )

  if chunks == 1:
    return draw, score

  def stage(bundle, batch, key):
    parts = []
    for part in split(batch, chunks):
      with ledger.phase('rollout'):
        parts.append(draw(bundle, part, key))
      ledger.watch('rollout', parts[-1])
    key = jax.random.fold_in(key, 1)
    scored = []
    for part in parts:
      with ledger.phase('score'):
        scored.append(_told(score, bundle, part, key))
      ledger.watch('score', scored[-1])
    return join(scored)

  return (stage,)


def split(batch: Batch, chunks: int) -> list[Batch]:
  """Chunk m is rows m::chunks. UserError unless all have the same size."""
  rows = len(next(iter(batch.values())))
  if rows % chunks:
    raise UserError(
      f'recipe.rollout_chunks = {chunks} does not divide the {rows} rows of a '
      'batch'
    )
  return _split(batch, chunks)


def join(parts: list[Batch]) -> Batch:
  """The batch that `split` made `parts` of."""
  return _join(parts)


@partial(jax.jit, static_argnums=1)
def _split(batch, chunks):
  def part(m):
    return {
      name: x.reshape(-1, chunks, *x.shape[1:])[:, m]
      for name, x in batch.items()
    }

  return [part(m) for m in range(chunks)]


@jax.jit
def _join(parts):
  return jax.tree.map(
    lambda *x: jnp.stack(x, axis=1).reshape(-1, *x[0].shape[1:]), *parts
  )


def _told(score: Stage, bundle, part: Batch, key) -> Batch:
  try:
    return score(bundle, part, key)
  except UserError as error:
    raise UserError(f'{error} ({_rows(part)})') from error
  except Exception as error:
    error.add_note(_rows(part))
    raise


def _rows(part: Batch) -> str:
  """Which prompts this process was scoring, by the source's row numbers."""
  # Never a collective: the other processes may be somewhere else.
  shards = jnp.asarray(part['id']).addressable_shards
  ids = sorted({int(i) for shard in shards for i in shard.data})
  more = f' and {len(ids) - 16} more' if len(ids) > 16 else ''
  return f'while scoring the prompts of rows {ids[:16]}{more} of the source'
