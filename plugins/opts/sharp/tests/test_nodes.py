"""Which ranks share a node, and where two levels are refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from core.api.errors import NotHereError, UsageError
from core.api.mesh import Dimension, Mesh, arrange
from timetrial_sharp.nodes import declared, launched, launcher_node, refuse_two_levels, sets_of_peers

TENSOR = Dimension(name="tensor", size=2, splits_data=False, nearness=30)


def test_declared_nodes_hold_consecutive_ranks() -> None:
    nodes = declared(6, 2)
    assert nodes.ranks == ((0, 1), (2, 3), (4, 5))
    assert nodes.across == ((0, 2, 4), (1, 3, 5))
    assert (nodes.count, nodes.ranks_per_node, nodes.world_size) == (3, 2, 6)


def test_launched_nodes_may_hold_alternating_ranks() -> None:
    nodes = launched([0, 1, 0, 1])
    assert nodes.ranks == ((0, 2), (1, 3))
    assert nodes.across == ((0, 1), (2, 3))


def test_a_size_that_does_not_divide_the_ranks_is_refused() -> None:
    with pytest.raises(UsageError, match=r"ranks_per_node=3 does not divide 4 ranks"):
        declared(4, 3)


def test_unequal_nodes_are_refused() -> None:
    with pytest.raises(NotHereError, match="the launcher puts 1 on one and 2 on another"):
        launched([0, 0, 1])


def test_without_a_split_model_all_ranks_exchange_with_one_another() -> None:
    nodes = launched([0, 1, 0, 1])
    assert sets_of_peers(nodes, Mesh(arrange([], 4))) == [nodes]


def test_parts_of_a_split_model_lie_on_the_nodes_alike() -> None:
    one, other = sets_of_peers(declared(8, 4), Mesh(arrange([TENSOR], 8)))
    assert one.ranks == ((0, 2), (4, 6))
    assert other.ranks == ((1, 3), (5, 7))
    assert (one.count, one.ranks_per_node, one.world_size) == (2, 2, 4)


def test_parts_of_a_split_model_that_lie_otherwise_are_refused() -> None:
    """The third part of the model is on one node, the others on two nodes each."""
    scattered = launched([1, 1, 0, 1, 1, 0, 2, 2, 0, 2, 2, 0])
    with pytest.raises(NotHereError, match="in the same way for every part"):
        sets_of_peers(scattered, Mesh(arrange([replace(TENSOR, size=3)], 12)))


@pytest.mark.parametrize(
    ("ranks_per_node", "reason"),
    [(4, "all 4 ranks are on one node .*ranks_per_node=4"), (1, "one rank on each of 4 nodes")],
)
def test_two_levels_are_refused_where_they_are_one(ranks_per_node: int, reason: str) -> None:
    with pytest.raises(NotHereError, match=reason):
        refuse_two_levels(declared(4, ranks_per_node))


def test_the_launcher_says_the_node_of_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GROUP_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "5")
    with pytest.raises(UsageError, match=r"set opt\.sharp\.ranks_per_node"):
        launcher_node()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert launcher_node() == 2
    monkeypatch.setenv("GROUP_RANK", "7")
    assert launcher_node() == 7
