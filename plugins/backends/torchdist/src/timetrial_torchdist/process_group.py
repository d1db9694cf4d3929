"""A torch.distributed process group as a `core.api.types.Backend`."""

from __future__ import annotations

import os
import threading
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from core.api.errors import TimetrialError

SHUTDOWN_SECONDS = 10.0
"""How long to wait for outstanding collectives at the end: those that a failed peer never joins do not complete."""


class ProcessGroup:
    """This rank's place in the default process group. `all_gather` and `broadcast` use CPU memory, never the device."""

    def __init__(self, rank: int, world_size: int, device: torch.device) -> None:
        self.rank = rank
        self.world_size = world_size
        self.device = device

    def all_gather(self, values: list[float]) -> list[list[float]]:
        mine = torch.tensor(values, dtype=torch.float64, device="cpu")
        everyone = [torch.empty_like(mine) for _ in range(self.world_size)]
        dist.all_gather(everyone, mine)
        return [row.tolist() for row in everyone]

    def broadcast(self, value: Any) -> Any:
        box = [value]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def synchronize(self) -> None:
        if self.device.type != "cpu":  # work on the CPU is done when its call returns
            torch.accelerator.synchronize(self.device)

    def shutdown(self) -> None:
        """Leaves the group, within `SHUTDOWN_SECONDS` even where a peer has died or hangs."""
        if not dist.is_initialized():
            return
        # Destroying a group waits for its queued collectives. A daemon thread, so that the process can end without it.
        leaving = threading.Thread(target=self._leave, daemon=True)
        leaving.start()
        leaving.join(SHUTDOWN_SECONDS)

    def _leave(self) -> None:
        if self.device.index is not None and self.device.type != "cpu":
            torch.accelerator.set_device_index(self.device.index)  # the current device belongs to a thread
        dist.destroy_process_group()


def local_rank() -> int:
    """This rank's number among those on its machine; 0 without a launcher."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def join(backend: str, device: torch.device, timeout_s: float) -> ProcessGroup:
    """Joins the default process group, numbered by the launcher's RANK and WORLD_SIZE, and tests one sum over it.

    `backend` is torch's name for it; `timeout_s` (seconds) bounds a collective. TimetrialError if a rank is missing.
    """
    rank, world_size = (int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
    store = dist.HashStore() if world_size == 1 else None  # with more ranks the launcher names a place to meet
    device_id = None if device.type == "cpu" else device
    try:
        dist.init_process_group(
            backend,
            timeout=timedelta(seconds=timeout_s),
            store=store,
            rank=rank,
            world_size=world_size,
            device_id=device_id,
        )
        total = torch.tensor(float(rank + 1), device=device)
        dist.all_reduce(total)
    except (RuntimeError, ValueError) as error:  # torch's own: the store, the network, a missing variable
        raise TimetrialError(
            f"rank {rank} of {world_size} could not join the others: {error}; start all ranks with one launcher, "
            "which sets MASTER_ADDR and MASTER_PORT",
            rank=rank,
        ) from error
    expected = world_size * (world_size + 1) / 2
    if total.item() != expected:
        raise TimetrialError(
            f"{backend} summed 1..{world_size} over the ranks to {total.item():g}, not {expected:g}: "
            "check the network and the drivers",
            rank=rank,
        )
    return ProcessGroup(rank, world_size, device)


def ranks_joined() -> int:
    """Ranks of the default process group."""
    return dist.get_world_size()
