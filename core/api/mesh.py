"""The named mesh: the place of a rank among all ranks. Imports without torch.

An opt adds a *dimension* with a name and a size; what the others leave over is the dimension "data". Ranks are numbered
with the nearest dimension innermost, so that neighbours in it, which exchange the most, are on one node: of 4 ranks as
data 2 x tensor 2, ranks 0 and 1 share their data and hold two parts of the model.

Ranks that differ in a dimension with `splits_data` train on different examples: together they make up the *data ranks*,
and those are all that a workload sees. The others work on the same examples.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from core.api.errors import ConflictError, UsageError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["Dimension", "Mesh"]


@dataclass(frozen=True, kw_only=True)
class Dimension:
    """One direction of the mesh."""

    name: str
    size: int | None  # ranks along it; None takes all that the other dimensions leave over
    splits_data: bool  # whether ranks along it train on different examples
    nearness: int  # the higher, the closer together its ranks are numbered: pipeline 0, data 10, shard 20, tensor 30
    reports: Literal["first", "last"] = "first"  # which rank along it knows the loss (the last stage of a pipeline)


DATA = Dimension(name="data", size=None, splits_data=True, nearness=10)


def arrange(dimensions: Iterable[Dimension], world_size: int) -> tuple[Dimension, ...]:
    """The dimensions, outermost first and with sizes; "data" is always among them, with size 1 where nothing is left
    over. ConflictError for one name twice or for two that take the rest, UsageError where sizes do not divide."""
    named: dict[str, Dimension] = {}
    for dimension in dimensions:
        if dimension.name in named:
            raise ConflictError(f"two opts add the mesh dimension '{dimension.name}'; leave one out")
        named[dimension.name] = dimension
    fixed = math.prod(d.size for d in named.values() if d.size is not None)
    open_ended = [name for name, d in named.items() if d.size is None]
    if len(open_ended) > 1:
        raise ConflictError(f"mesh dimensions {', '.join(open_ended)} both take all remaining ranks; give one a size")
    sizes = " x ".join(f"{name} {d.size}" for name, d in named.items() if d.size is not None)
    if world_size % fixed:
        raise UsageError(f"{world_size} ranks cannot be arranged as {sizes}: start a multiple of {fixed} ranks")
    rest = world_size // fixed
    named.setdefault("data", replace(DATA, size=1 if open_ended else rest))
    sized = (replace(d, size=rest) if d.size is None else d for d in named.values())
    return tuple(sorted(sized, key=lambda d: (d.nearness, d.name)))


@dataclass(frozen=True)
class Mesh:
    """The place of `rank` among all ranks. `dimensions` come from `arrange`: outermost first, each with its size."""

    dimensions: tuple[Dimension, ...]
    rank: int = 0

    def size(self, name: str) -> int:
        """Ranks along a dimension; 1 for one that nobody added."""
        return next((d.size or 1 for d in self.dimensions if d.name == name), 1)

    def coordinate(self, name: str) -> int:
        """This rank's place along a dimension, counted from 0."""
        return self._coordinates(self.rank).get(name, 0)

    @property
    def world_size(self) -> int:
        return math.prod(d.size or 1 for d in self.dimensions)

    @property
    def data_size(self) -> int:
        """How many shares a global batch is cut into."""
        return math.prod(d.size or 1 for d in self.dimensions if d.splits_data)

    @property
    def data_rank(self) -> int:
        """Which of these shares is this rank's."""
        return self._data_rank(self.rank)

    @cached_property
    def speakers(self) -> tuple[int, ...]:
        """For each data rank the rank that speaks for it: the one that knows its loss."""
        ends = {d.name: (d.size or 1) - 1 if d.reports == "last" else 0 for d in self.dimensions if not d.splits_data}
        ranks = (r for r in range(self.world_size) if ends.items() <= self._coordinates(r).items())
        return tuple(sorted(ranks, key=self._data_rank))

    @cached_property
    def data_peers(self) -> tuple[int, ...]:
        """The ranks, this one among them, that hold the same part of the model and differ in their data."""
        mine = self._elsewhere(self.rank)
        return tuple(r for r in range(self.world_size) if self._elsewhere(r) == mine)

    def device_mesh(self, device_type: str) -> DeviceMesh:
        """The same as a DeviceMesh of torch's, for its parallel packages. All ranks ask for it together, the first
        time; needs a process group."""
        made = _DEVICE_MESHES.get((self.dimensions, device_type))
        if made is None:
            from torch.distributed.device_mesh import init_device_mesh

            sizes = tuple(d.size or 1 for d in self.dimensions)
            made = init_device_mesh(device_type, sizes, mesh_dim_names=tuple(d.name for d in self.dimensions))
            _DEVICE_MESHES[self.dimensions, device_type] = made
        return made

    def _coordinates(self, rank: int) -> dict[str, int]:
        found: dict[str, int] = {}
        for dimension in reversed(self.dimensions):
            rank, found[dimension.name] = divmod(rank, dimension.size or 1)
        return found

    def _data_rank(self, rank: int) -> int:
        coordinates, number = self._coordinates(rank), 0
        for dimension in self.dimensions:
            if dimension.splits_data:
                number = number * (dimension.size or 1) + coordinates[dimension.name]
        return number

    def _elsewhere(self, rank: int) -> list[int]:
        coordinates = self._coordinates(rank)
        return [coordinates[d.name] for d in self.dimensions if not d.splits_data]


_DEVICE_MESHES: dict[tuple[tuple[Dimension, ...], str], DeviceMesh] = {}
"""One for each process: making one creates process groups, which all ranks have to do together."""
