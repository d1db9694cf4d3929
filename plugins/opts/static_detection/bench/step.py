"""Host synchronisations and time of a training step, of the workload and opts that the overrides choose.

    python plugins/opts/static_detection/bench/step.py workload=maskrcnn                            the baseline
    python plugins/opts/static_detection/bench/step.py workload=maskrcnn +opt=static_detection
    python plugins/opts/static_detection/bench/step.py --compare [--rounds 5] workload=maskrcnn     both, interleaved

A host synchronisation is an operation whose result, or the size of whose result, the host must know to go on. They are
counted as they are dispatched, so that a machine without an accelerator finds them, too.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

STEPS = 12
"""Timed, after one to warm up and one that is counted."""
WAITS = (
    "_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "torchvision.nms", "repeat_interleave.Tensor",
)  # fmt: skip


def measure(overrides: list[str]) -> dict[str, Any]:
    """Runs core's own command up to the loop, and there the composed step."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    import core.run
    import core.worker

    class Counted(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.found: Counter[str] = Counter()

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = str(func)
            indices = args[1] if name.startswith(("aten.index.", "aten.index_put")) else ()
            masks = [i for i in indices if i is not None and i.dtype in (torch.bool, torch.uint8)]
            if masks or any(part in name for part in WAITS):
                self.found[name] += 1
            return func(*args, **(kwargs or {}))

    report: dict[str, Any] = {}

    def train(ctx: Any, watch: Any, step: Callable[..., Any], batches: Callable[..., Iterable[Any]], _: Any) -> str:
        several = itertools.islice((b for epoch in itertools.count(1) for b in batches(epoch, 0)), STEPS + 2)
        step(next(several))
        counted = next(several)
        with Counted() as mode:
            step(counted)
        seconds: list[float] = []
        for batch in several:
            ctx.backend.synchronize()
            started = time.perf_counter()
            step(batch)
            ctx.backend.synchronize()
            seconds.append(time.perf_counter() - started)
        report["host_synchronisations"] = dict(mode.found)
        report["step_ms"] = statistics.median(seconds) * 1e3
        return "throughput"

    core.worker.train = train
    with tempfile.TemporaryDirectory() as folder:
        sys.argv = ["core.run", *overrides, "checkpoint.at_end=false", f"run_dir={folder}/run"]
        stdout, sys.stdout = sys.stdout, sys.stderr
        code = core.run.main()
        sys.stdout = stdout
    if not report:
        raise SystemExit(code)
    return report


def compare(overrides: list[str], rounds: int) -> None:
    found: dict[str, list[dict[str, Any]]] = {"baseline": [], "static_detection": []}
    for _ in range(rounds):
        for name, runs in found.items():
            more = [] if name == "baseline" else ["+opt=static_detection"]
            command = [sys.executable, __file__, *overrides, *more]
            env = {"OMP_NUM_THREADS": "1", **os.environ}
            done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
            runs.append(json.loads(done.stdout.splitlines()[-1]))
    print("| | host synchronisations a step | ms a step: median (minimum to maximum), n | ratio |\n|---|---|---|---|")
    for name, runs in found.items():
        times = [run["step_ms"] for run in runs]
        ratios = [b["step_ms"] / r["step_ms"] for b, r in zip(found["baseline"], runs, strict=True)]
        waits = sum(runs[0]["host_synchronisations"].values())
        spread = f"{statistics.median(times):.0f} ({min(times):.0f} to {max(times):.0f}), {rounds}"
        print(f"| {name} | {waits} | {spread} | {statistics.median(ratios):.2f} |")


def main() -> None:
    arguments = sys.argv[1:]
    if arguments[:1] == ["--compare"]:
        rounds = int(arguments.pop(2)) if arguments[1:2] == ["--rounds"] else 5
        compare([a for a in arguments[1:] if a != "--rounds"], rounds)
    else:
        print(json.dumps(measure(arguments)))


if __name__ == "__main__":
    main()
