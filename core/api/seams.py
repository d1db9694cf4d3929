"""Seams: typed places where an opt may put something in place of what the workload or core has there.

A workload publishes its seams as constants in its module `seams.py`, which imports without torch, and offers what it
has while it builds itself: `encode = ctx.offer(ENCODER, model.encode)`. An opt that acts on a seam names it in its spec
(`replaces`) and says what it makes of it in the hook `replace`: `[ENCODER.by(self._unpadded)]`. Several opts may act on
one seam; each is given what the opts inside it made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    from torch import nn

    from core.api.batch import Batch, Evaluate, Outputs, Purpose

__all__ = [
    "EVALUATE",
    "FEED",
    "GRADIENT_BUCKETS",
    "GRADIENT_EXCHANGE",
    "INFER",
    "LOSS",
    "TENSOR_PLAN",
    "Replacement",
    "Seam",
]

T = TypeVar("T")


@dataclass(frozen=True)
class Seam(Generic[T]):
    """A place of the type `T`. `name` is unique among all installed plugins, such as "bert.encoder"."""

    name: str

    def by(self, make: Callable[[T], T]) -> Replacement[T]:
        """What an opt returns from `replace`: `make` is given what is at the seam and returns what is put there."""
        return Replacement(self, make)


@dataclass(frozen=True)
class Replacement(Generic[T]):
    """What one opt does at one seam."""

    seam: Seam[T]
    make: Callable[[T], T]


LOSS: Seam[Callable[[nn.Module, Any], Outputs]] = Seam("core.loss")
"""`loss(model, data)` of training."""

INFER: Seam[Callable[[nn.Module, Any], Any]] = Seam("core.infer")
"""`infer(model, data)` of evaluation and self-play."""

FEED: Seam[Callable[[Iterable[Batch], Purpose], Iterator[Batch]]] = Seam("core.feed")
"""Moves batches to the device, one after the other and in order."""

EVALUATE: Seam[Evaluate] = Seam("core.evaluate")
"""The evaluation of the whole evaluation set. Not offered on synthetic data, which has no quality."""

GRADIENT_BUCKETS: Seam[dict[str, Any]] = Seam("core.gradient_buckets")
"""Keyword arguments of torch's DistributedDataParallel, offered by the opt that wraps the model in it, and
"bucket_at_least_mb": what `bucket_cap_mb` is raised to in the end, for an opt that large buckets serve."""

GRADIENT_EXCHANGE: Seam[tuple[Any, Callable[..., Any]] | None] = Seam("core.gradient_exchange")
"""`(state, hook)` for DistributedDataParallel's `register_comm_hook`; None is its own all-reduce. An opt that exchanges
gradients itself, instead of acting on what another one exchanges, also claims "gradient_exchange.hook"."""

TENSOR_PLAN: Seam[Mapping[str, str]] = Seam("core.tensor_plan")
"""How the layers of a workload's model may be split over ranks that work on the same examples. Name -> what is done to
it. Names are those of submodules (of an attribute for "divide"), in which a part between dots may be a pattern, such as
"encoder.layer.*.attention.self.query".

- "column", of an `nn.Linear`: its output features are split; the input is whole.
- "row", of an `nn.Linear`: its input features are split, as a column-wise layer leaves them; the output is whole.
- "random", of a module that draws random numbers for activations that are split, such as a dropout between the two:
  each rank draws its own, which are not those that one rank would draw. Modules that are not named draw the same on
  each rank, and the same as one rank. Only for a dropout above 0: it costs some microseconds.
- "divide", of an integer attribute that counts what is split, such as the number of heads. It makes sure that each rank
  gets a whole number of them.
"""
