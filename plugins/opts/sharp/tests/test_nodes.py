"""Which ranks share a node, and where two levels are refused."""

from __future__ import annotations

import pytest

from core.api.errors import UsageError
from timetrial_sharp.nodes import declared, launched, launcher_node, refuse_two_levels


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
    with pytest.raises(UsageError, match="the launcher put 1 on one and 2 on another"):
        launched([0, 0, 1])


@pytest.mark.parametrize(
    ("ranks_per_node", "reason"),
    [(4, "all 4 ranks are on one node .*ranks_per_node=4"), (1, "one rank on each of 4 nodes")],
)
def test_two_levels_are_refused_where_they_are_one(ranks_per_node: int, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
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
