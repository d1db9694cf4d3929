"""Where opts may act on self-play. Imports without torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from core.api.seams import Seam

if TYPE_CHECKING:
    from torch import Tensor

    from timetrial_minigo.replay import Examples

    Playouts = Callable[[int, int, int], tuple[Tensor, Tensor]]

GENERATION: Seam[Callable[[int], Examples]] = Seam("minigo.generation")
"""`play(generation)`: this data rank's share of a generation's games, by the network as it is now."""

PLAYOUTS: Seam[Playouts] = Seam("minigo.playouts")
"""`playouts(generation, ply, games) -> (simulations int64 [games], recorded bool [games])`: how much is searched for a
move of each game, and whether its position is trained on."""
