"""Which ranks share a node, and which hold the same place on different nodes."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from core.api.errors import NotHereError, UsageError
from core.api.mesh import Mesh


@dataclass(frozen=True)
class Nodes:
    """The ranks of each node, in order; every node holds equally many."""

    ranks: tuple[tuple[int, ...], ...]
    source: str
    """Who said so."""

    @property
    def count(self) -> int:
        return len(self.ranks)

    @property
    def ranks_per_node(self) -> int:
        return len(self.ranks[0])

    @property
    def world_size(self) -> int:
        return self.count * self.ranks_per_node

    @property
    def across(self) -> tuple[tuple[int, ...], ...]:
        """For each place on a node, the ranks that hold it: they exchange one share of the data between the nodes."""
        return tuple(zip(*self.ranks, strict=True))

    def among(self, ranks: Collection[int]) -> Nodes:
        """The nodes of only these ranks. NotHereError where they are not spread equally."""
        chosen = (tuple(rank for rank in node if rank in ranks) for node in self.ranks)
        return _equal(tuple(node for node in chosen if node), self.source)


def declared(world_size: int, ranks_per_node: int) -> Nodes:
    """Consecutive ranks share a node, as `opt.sharp.ranks_per_node` says."""
    setting = f"opt.sharp.ranks_per_node={ranks_per_node}"
    if world_size % ranks_per_node:
        raise UsageError(f"{setting} does not divide {world_size} ranks: give a divisor of it")
    starts = range(0, world_size, ranks_per_node)
    return Nodes(tuple(tuple(range(start, start + ranks_per_node)) for start in starts), setting)


def launched(node_of_rank: Sequence[int]) -> Nodes:
    """Ranks share a node where the launcher gave them the same number."""
    numbers = sorted(set(node_of_rank))
    ranks = tuple(tuple(r for r, node in enumerate(node_of_rank) if node == number) for number in numbers)
    return _equal(ranks, "the launcher")


def _equal(ranks: tuple[tuple[int, ...], ...], source: str) -> Nodes:
    sizes = sorted({len(node) for node in ranks})
    if len(sizes) > 1:
        raise NotHereError(
            f"opt 'sharp' needs equally many ranks that exchange gradients on every node, but {source} puts {sizes[0]} "
            f"on one and {sizes[-1]} on another; start the same number on each"
        )
    return Nodes(ranks, source)


def sets_of_peers(nodes: Nodes, mesh: Mesh) -> list[Nodes]:
    """For each set of ranks that exchange gradients with one another, its place on the nodes; all have the same."""
    peers = {Mesh(mesh.dimensions, rank).data_peers for rank in range(mesh.world_size)}
    found = [nodes.among(ranks) for ranks in sorted(peers)]
    if len({(one.count, one.ranks_per_node) for one in found}) > 1:
        raise NotHereError(
            "opt 'sharp' needs the ranks that exchange gradients to be on the nodes in the same way for every part of "
            "the model; start the ranks in the order of the nodes"
        )
    return found


def launcher_node() -> int:
    """This rank's node, as torchrun numbers them, or from the ranks on each node where another launcher says that."""
    environment = os.environ
    if "GROUP_RANK" in environment:
        return int(environment["GROUP_RANK"])
    if "LOCAL_WORLD_SIZE" in environment:
        return int(environment["RANK"]) // int(environment["LOCAL_WORLD_SIZE"])
    raise UsageError(
        "opt 'sharp' cannot tell which ranks share a node: the launcher sets neither GROUP_RANK nor LOCAL_WORLD_SIZE; "
        "set opt.sharp.ranks_per_node"
    )


def refuse_two_levels(nodes: Nodes) -> None:
    """Where two levels would send as much between nodes as one."""
    if nodes.count == 1:
        raise NotHereError(
            f"opt 'sharp' cannot help: all {nodes.world_size} ranks are on one node (says {nodes.source}), where only "
            "NVLink SHARP with backend=nccl could reduce; start more nodes, give a smaller opt.sharp.ranks_per_node, "
            "or leave the opt out"
        )
    if nodes.ranks_per_node == 1:
        raise NotHereError(
            f"opt 'sharp' cannot help: one rank on each of {nodes.count} nodes (says {nodes.source}) leaves nothing to "
            "reduce before the network; start more ranks on each, or leave the opt out"
        )
