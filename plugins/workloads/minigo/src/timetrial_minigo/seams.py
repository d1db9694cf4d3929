"""Where opts may act on self-play, and what they find there. Imports without torch.

Letters: T positions of all games, K of them to learn from, G games of a generation, P points, A moves (the last is the
pass).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypedDict

from core.api.seams import Seam

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Playouts = Callable[[int, int, int], "tuple[Tensor, Tensor]"]
"""`playouts(generation, ply, games) -> (simulations int64 [G], recorded bool [G])`, on the host: how many simulations
the next move of each game of the generation gets, and whether its position is one to learn from. Only such a move gets
noise."""

PLAYOUTS: Seam[Playouts] = Seam("minigo.playouts")
"""How much is searched for a move of each game."""

GENERATION: Seam[Callable[[int], Examples]] = Seam("minigo.generation")
"""`play(generation)`: this data rank's share of a generation's games, by the network as it is now."""


class Examples(NamedTuple):
    """Games, one after the other, each as the positions in which a move was made. A position's history is in the rows
    before it, which takes an eighth of the memory that examples with their own history would."""

    stones: Tensor
    """[T, P] int8."""
    ply: Tensor
    """[T] int16: how many moves were made before; black moves first, so it tells who is to play."""
    outcome: Tensor
    """[T] int8: 1 where black won the game, -1 where white did, 0 for a draw."""
    learn: Tensor
    """[T] bool: whether it is one of the K that are trained on."""
    policy: Tensor
    """[K, A] float16: the policy that the search found."""

    def to(self, device: torch.device) -> Examples:
        return Examples(*(tensor.to(device) for tensor in self))


class Player(Protocol):
    """The workload, as one that only plays sees it."""

    generation: Callable[[int], Examples]
    """What the opts made of GENERATION."""


class Searched(TypedDict):
    """Counts of all moves that a rank has searched for since its process began."""

    searches: int
    recorded: int
    """Searches whose position is one to learn from."""
    simulations: int
    """Of all searches together."""


FIGURE = "selfplay"
"""Where `Searched` is in `ctx.figures`, and in result.json. An opt that has games played elsewhere brings it."""


def searched(figures: Mapping[str, Any]) -> Searched:
    """The counts so far; zeros before the first game."""
    return figures.get(FIGURE, Searched(searches=0, recorded=0, simulations=0))
