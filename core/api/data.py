"""Which examples each rank reads, in which order: a function of seed, epoch and rank alone, so that it can be resumed.

Every example is used exactly once an epoch (v1.1 rules, section 6.2). The last global batch of an epoch is smaller
where the batch size does not divide the number of examples; `Batch.weight` makes its loss the global mean.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from core.api.config import EvalConfig
from core.api.errors import DataError, UsageError
from core.api.types import EvalCadence

__all__ = ["EpochSampler", "Share", "eval_cadence", "eval_share"]


@dataclass(frozen=True)
class Share:
    """One rank's part of one global batch: `indices` into the data set, and what `Batch` needs to know."""

    number: int  # number of the batch in its epoch, counted from 0; for seeding its augmentation.
    indices: NDArray[np.int64]
    samples: int
    weight: float


@dataclass(frozen=True, kw_only=True)
class EpochSampler:
    """Shuffles, batches and shards `examples` over ranks.

    A last batch that would leave a rank with fewer than `min_per_rank` examples joins the one before it (batch
    normalisation, say, needs 2). The union over ranks of batch k is the same for every world size.
    """

    examples: int
    global_batch: int
    rank: int
    world_size: int
    min_per_rank: int = 1

    def __post_init__(self) -> None:
        if self.global_batch % self.world_size:
            uneven = f"the global batch size {self.global_batch} is not divisible by {self.world_size} ranks"
            raise DataError(f"{uneven}: choose a multiple of {self.world_size}")
        if self.examples < self.global_batch:
            few = f"the training set has {self.examples} examples, fewer than one global batch of {self.global_batch}"
            raise DataError(f"{few}: choose a smaller batch size or more data")

    @property
    def batches(self) -> int:
        """Global batches, and so steps, in an epoch."""
        full, rest = divmod(self.examples, self.global_batch)
        return full + (rest >= self.min_per_rank * self.world_size)

    def order(self, seed: int) -> NDArray[np.int64]:
        """All examples as one epoch reads them. A subclass may group them, such as images by their shape."""
        return np.random.default_rng(seed).permutation(self.examples)

    def epoch(self, seed: int, first_batch: int = 0) -> Iterator[Share]:
        """This rank's shares of an epoch's batches, from `first_batch` on; `seed` must differ from epoch to epoch."""
        order, last = self.order(seed), self.batches - 1
        for number in range(first_batch, self.batches):
            start = number * self.global_batch
            batch = order[start:] if number == last else order[start : start + self.global_batch]
            share = eval_share(len(batch), self.rank, self.world_size)
            mine = batch[share.start : share.stop]
            yield Share(number, mine, len(batch), weight=len(mine) * self.world_size / len(batch))


def eval_cadence(config: EvalConfig, every: int = 1, unit: Literal["epochs", "samples"] = "epochs") -> EvalCadence:
    """When to evaluate. `every` and its `unit` are what the workload derives where the configuration has null."""
    if config.every is None and config.unit != unit:
        raise UsageError(f"workload.eval.unit={config.unit} needs workload.eval.every: null is in {unit} here")
    every = config.every or every
    return EvalCadence(every, config.first or every, "samples" if config.unit == "samples" else "epochs")


def eval_share(examples: int, rank: int, world_size: int) -> range:
    """The evaluation examples of one rank: contiguous, disjoint, and together all of them."""
    return range(examples * rank // world_size, examples * (rank + 1) // world_size)
