"""Which utterances each rank reads, in which order: batches of about equally long ones.

As in the reference (common/data/dali/sampler.py, BucketingSampler): utterances are sorted by duration into buckets,
shuffled within each, cut into batches, and the batches shuffled. A function of seed, epoch and rank alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from core.api.data import EpochSampler, Share


@dataclass(frozen=True, kw_only=True)
class BucketSampler:
    """Each utterance once an epoch. `durations` in any unit; the batches are core's `EpochSampler`'s otherwise: batch k
    holds the same utterances for every world size, and the last global batch may be a smaller or larger one."""

    durations: NDArray[np.float64]
    buckets: int
    global_batch: int
    rank: int
    world_size: int

    def __post_init__(self) -> None:
        _ = self._plain

    @property
    def _plain(self) -> EpochSampler:
        """Checks the sizes and counts the batches."""
        return EpochSampler(
            examples=len(self.durations),
            global_batch=self.global_batch,
            rank=self.rank,
            world_size=self.world_size,
        )

    @property
    def batches(self) -> int:
        return self._plain.batches

    def epoch(self, seed: int, first_batch: int = 0) -> Iterator[Share]:
        """This rank's shares, from batch number `first_batch` on; `seed` must differ from epoch to epoch."""
        rng = np.random.default_rng(seed)
        by_length = np.argsort(self.durations, kind="stable")
        order = np.concatenate([rng.permutation(bucket) for bucket in np.array_split(by_length, self.buckets)])
        # What does not fill a batch is drawn from everywhere, so that no bucket is always the one cut short.
        last = np.sort(rng.choice(len(order), len(order) % self.global_batch, replace=False))
        full = np.delete(order, last).reshape(-1, self.global_batch)
        whole = [*full[rng.permutation(len(full))], order[last]]
        whole[self.batches - 1 :] = [np.concatenate(whole[self.batches - 1 :])]
        for number in range(first_batch, self.batches):
            batch = whole[number]
            # Strided over the sorted batch: the ranks' shares are about equally long.
            batch = batch[np.argsort(self.durations[batch], kind="stable")]
            mine = batch[self.rank :: self.world_size]
            yield Share(number, mine, len(batch), len(mine) * self.world_size / len(batch))
