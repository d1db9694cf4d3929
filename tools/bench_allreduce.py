"""What crosses the link between two hosts when gradients are averaged, and how long a step takes: flat and two-level.

    sudo uv run python tools/bench_allreduce.py                     # 1 Gbit/s, 32 MiB of gradients

The hosts are network namespaces joined by a cable that `tc` slows down (core/testing/hosts.py); ranks are processes
with gloo. A step is the forward and backward pass of a stack of linear layers in DistributedDataParallel, from a
barrier to the last gradient on the slowest rank; it is nearly all exchange. In each round every contender takes a step:

    flat         DistributedDataParallel's own all-reduce
    unpipelined  opt `sharp`, two levels, but one bucket in one chunk: its phases one after the other
    two-level    opt `sharp` as it comes

All must give the same gradients, within float tolerance.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from functools import partial
from typing import Any

from core.api.statistics import race, ratios, row, spread, table
from core.testing.hosts import bytes_sent, problem, start_ranks, two_hosts

MIB = 2**20
WIDTH = 1024
"""Of a layer, which so has 4 MiB of gradients."""

PLACEMENTS = ("0011", "0101", "00001111", "01010101")
CONTENDERS = ("flat", "unpipelined", "two-level")
WARM_UP = 2
"""Steps before those that count: buckets are regrouped after the first."""


# -------------------------------------------------------------------------------------------------- on each rank


def measure(mib: int, rounds: int, chunk_mib: float) -> list[dict[str, Any]]:
    """Of each contender, for this rank: seconds of each step, and bytes this host sent in the last."""
    from datetime import timedelta

    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel

    from timetrial_sharp.nodes import launched
    from timetrial_sharp.two_level import TwoLevel

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, placement = dist.get_rank(), [0] * dist.get_world_size()
    dist.all_gather_object(placement, int(os.environ["GROUP_RANK"]))
    x = torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(rank))

    def model(contender: str) -> Any:
        torch.manual_seed(0)
        layers = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(mib * MIB // (4 * WIDTH * WIDTH))))
        ddp = DistributedDataParallel(layers, bucket_cap_mb=2 * mib if contender == "unpipelined" else 25.0)
        if contender != "flat":
            chunk = 2 * mib if contender == "unpipelined" else chunk_mib
            hook = TwoLevel([launched(placement)], rank, torch.device("cpu"), int(chunk * MIB), timedelta(seconds=60))
            ddp.register_comm_hook(None, hook.exchange)
        return ddp

    models = {contender: model(contender) for contender in CONTENDERS}
    sent, gradients = dict[str, int](), dict[str, Any]()

    def step(contender: str) -> float:
        ddp = models[contender]
        ddp.zero_grad()
        dist.barrier()
        before, start = bytes_sent(), time.perf_counter()
        ddp(x).square().mean().backward()
        seconds = time.perf_counter() - start
        dist.barrier()
        sent[contender] = bytes_sent() - before
        gradients[contender] = torch.cat([p.grad.flatten() for p in ddp.parameters()])
        return seconds

    seconds = race({contender: partial(step, contender) for contender in CONTENDERS}, rounds, warmup=WARM_UP)
    for contender in CONTENDERS[1:]:
        torch.testing.assert_close(gradients[contender], gradients["flat"])
    dist.destroy_process_group()
    return [{"seconds": seconds[contender], "sent": sent[contender]} for contender in CONTENDERS]


# ------------------------------------------------------------------------------------------------- the race


def compare(placement: str, rate: str | None, mib: int, rounds: int, chunk_mib: float) -> list[dict[str, Any]]:
    """One row per contender: bytes over gradient bytes, and seconds of a step (of its slowest rank) by round."""
    worker = (sys.executable, __file__, "--worker", json.dumps([mib, rounds, chunk_mib]))
    with two_hosts(rate) as hosts:
        processes = start_ranks(hosts, placement, *worker)
        ended = [process.communicate() for process in processes]
    for process, (_, errors) in zip(processes, ended, strict=True):
        if process.returncode:
            raise SystemExit(f"a rank failed:\n{errors}")
    ranks = [json.loads(printed) for printed, _ in ended]
    rows: list[dict[str, Any]] = []
    for number, contender in enumerate(CONTENDERS):
        mine = [rank[number] for rank in ranks]
        steps = [max(step) for step in zip(*(rank["seconds"] for rank in mine), strict=True)]
        sent = max(rank["sent"] for rank in mine) / (mib * MIB)  # of the host that sent more
        rows.append({"placement": placement, "contender": contender, "sent": sent, "seconds": steps})
    return rows


def cells(found: dict[str, Any], flat: dict[str, Any]) -> list[object]:
    """The cells of one contender; `flat` is the contender that it is compared with."""
    step, gains = spread(found["seconds"]), spread(ratios(flat["seconds"], found["seconds"]))
    hosts = f"2 x {len(found['placement']) // 2}, {found['placement']}"
    return [hosts, found["contender"], f"{found['sent']:.3f} S", f"{step:.3f}", step.n, f"{gains:.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", default="1gbit", help="of the link, as tc writes it; `none` leaves it as it is")
    parser.add_argument("--mib", type=int, default=32, help="MiB of gradients, a multiple of 4")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--chunk-mib", type=float, default=2.0, help="opt.sharp.chunk_mib")
    parser.add_argument("--placements", nargs="+", default=PLACEMENTS, help="the host of each rank, a digit each")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(measure(*json.loads(arguments.worker))))
        return
    if problem():
        raise SystemExit(f"this machine cannot have two hosts: {problem()}")
    rate = None if arguments.rate == "none" else arguments.rate
    columns = ["hosts x ranks, ranks on hosts", "all-reduce", "bytes on the link, each way"]
    print(table([*columns, "step, s: median (min to max)", "n", "flat / this: median (min to max)"]))
    for placement in arguments.placements:
        rows = compare(placement, rate, arguments.mib, arguments.rounds, arguments.chunk_mib)
        for found in rows:
            print(row(cells(found, flat=rows[0])), flush=True)
    print(
        f"\nS = {arguments.mib} MiB of gradients, link at {arguments.rate}, chunks of {arguments.chunk_mib:g} MiB; ",
        end="",
    )
    print(f"{os.cpu_count()} cores shared by all ranks, {platform.machine()}, Python {platform.python_version()}.")


if __name__ == "__main__":
    main()
