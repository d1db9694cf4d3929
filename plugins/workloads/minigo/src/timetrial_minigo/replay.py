"""Games as training examples, the window of recent generations, and how ranks come to hold the same one.

Letters: T positions of all games, K of them to learn from, B examples of a batch, H positions of history, P points, A
moves (the last is the pass).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from timetrial_minigo.features import symmetries
from timetrial_minigo.go import BLACK, WHITE
from timetrial_minigo.seams import Examples


def nothing(points: int) -> Examples:
    shapes = {"stones": (0, points), "ply": (0,), "outcome": (0,), "learn": (0,), "policy": (0, points + 1)}
    return Examples(*(torch.zeros(shape, dtype=_DTYPES[name]) for name, shape in shapes.items()))


_DTYPES = {
    "stones": torch.int8, "ply": torch.int16, "outcome": torch.int8, "learn": torch.bool, "policy": torch.float16,
}  # fmt: skip


def join(parts: Iterable[Examples]) -> Examples:
    """The games of all parts, in order."""
    return Examples(*(torch.cat(column) for column in zip(*parts, strict=True)))


def exchange(mine: Examples) -> Examples:
    """The examples of all ranks, in rank order, on each of them. Through host memory, as bytes: gloo has no int16."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return mine
    ranks = dist.get_world_size()
    lengths = [torch.zeros(len(mine), dtype=torch.int64) for _ in range(ranks)]
    dist.all_gather(lengths, torch.tensor([len(tensor) for tensor in mine]))
    everyone = [_gathered(tensor, [int(row[i]) for row in lengths]) for i, tensor in enumerate(mine)]
    return Examples(*everyone)


def _gathered(mine: Tensor, lengths: list[int]) -> Tensor:
    padded = mine.new_zeros(max(lengths), *mine.shape[1:], device="cpu")
    padded[: len(mine)] = mine.cpu()
    parts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather([part.view(torch.uint8) for part in parts], padded.view(torch.uint8))
    return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)]).to(mine.device)


class Window:
    """The last `generations` generations of games, on one device, the same on every rank."""

    def __init__(self, generations: int, size: int, history: int, device: torch.device) -> None:
        self.generations, self.size, self.device = generations, size, device
        self._back = torch.arange(history, device=device)
        maps = symmetries(size)
        passes = torch.full((8, 1), size * size)
        self._maps, self._move_maps = maps.to(device), torch.cat([maps, passes], 1).to(device)
        self._held: dict[int, tuple[int, int]] = {}  # T and K of each generation, the oldest first
        self._set(nothing(size * size))

    def _set(self, examples: Examples) -> None:
        self._examples = examples.to(self.device)
        self._rows = self._examples.learn.nonzero().squeeze(1)

    @property
    def newest(self) -> int:
        """The newest generation; 0 where there is none yet."""
        return max(self._held, default=0)

    def __len__(self) -> int:
        """How many positions there are to learn from."""
        return len(self._rows)

    def add(self, generation: int, examples: Examples) -> None:
        """Takes in a generation, and drops the oldest beyond the window."""
        self._held[generation] = len(examples.ply), len(examples.policy)
        positions = learnt = 0
        for old in list(self._held)[: -self.generations]:
            t, k = self._held.pop(old)
            positions, learnt = positions + t, learnt + k
        old = self._examples
        kept = Examples(*(tensor[positions:] for tensor in old[:-1]), old.policy[learnt:])
        self._set(join([kept, examples.to(self.device)]))

    def draw(self, count: int, seed: int) -> tuple[Tensor, Tensor]:
        """Which positions an epoch learns from, [count] below `len(self)`, and under which symmetry, [count]: each
        position as often as any other, to within one."""
        generator = torch.Generator().manual_seed(seed)
        rounds = -(-count // len(self))
        order = torch.cat([torch.randperm(len(self), generator=generator) for _ in range(rounds)])[:count]
        return order, torch.randint(8, (count,), generator=generator)

    def take(self, chosen_B: Tensor, symmetry_B: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """stones [B, H, P] int8, to_play [B] int8, policy [B, A] float32, and value [B] float32 for the player to
        move, of the chosen positions."""
        chosen, symmetry = chosen_B.to(self.device), symmetry_B.to(self.device)
        examples, rows = self._examples, self._rows[chosen]
        ply = examples.ply[rows]
        before = ply[:, None] >= self._back
        stones = examples.stones[(rows[:, None] - self._back).clamp(min=0)] * before[:, :, None]
        stones = stones.gather(2, self._maps[symmetry][:, None].expand_as(stones))
        policy = examples.policy[chosen].float().gather(1, self._move_maps[symmetry])
        to_play = torch.where(ply % 2 == 0, BLACK, WHITE).to(torch.int8)
        return stones, to_play, policy, (examples.outcome[rows] * to_play).float()

    # -------------------------------------------------------------------------------------------------- checkpoints

    def state_dict(self, hold: bool) -> dict[str, Any]:
        """What a checkpoint needs; of several ranks, which hold the same, only one need `hold` it."""
        examples = self._examples if hold else nothing(self.size**2)
        return {"held": {str(g): list(sizes) for g, sizes in self._held.items()}, "examples": examples._asdict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Every rank calls it together: what one of them holds comes to all."""
        self._held = {int(generation): (t, k) for generation, (t, k) in state["held"].items()}
        mine = Examples(**{name: tensor.to(_DTYPES[name]) for name, tensor in state["examples"].items()})
        self._set(exchange(mine))
