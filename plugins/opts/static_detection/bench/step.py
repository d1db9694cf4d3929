"""Host synchronisations and time of a training step, of the workload and opts that the overrides choose.

    python plugins/opts/static_detection/bench/step.py workload=maskrcnn                            the baseline
    python plugins/opts/static_detection/bench/step.py workload=maskrcnn +opt=static_detection
    python plugins/opts/static_detection/bench/step.py --untimed workload=maskrcnn                  counted only
    python plugins/opts/static_detection/bench/step.py --compare [--rounds 5] workload=maskrcnn     both, interleaved

A host synchronisation is an operation whose result, or the size of whose result, the host must know to go on, or one
that copies a host's number to the device and waits until it is there. They are counted as they are called, so that a
machine without an accelerator finds them, too; on a GPU torch's own count (`torch.cuda.set_sync_debug_mode`) stands
beside it. The time on the CPU is what to compare on a machine without an accelerator whose cores are shared.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from statistics import median
from typing import Any

from core.api.statistics import race, ratios, spread, table

STEPS = 12
"""Timed, after two to warm up and one that is counted."""
WAITS = (
    "_local_scalar_dense", "nonzero", "masked_select", "unique", "equal.default", "torchvision.nms",
    "repeat_interleave.Tensor", "lift_fresh",
)  # fmt: skip
"""Parts of names of operations; `lift_fresh` is a tensor made of the host's numbers, as by `torch.tensor`."""
READS = ("tolist", "numpy", "__array__", "cpu")
"""Methods that bring a tensor to the host without an operation, where it is there already."""


class Waits(Counter[str]):
    """Counts host synchronisations, by operation, of what runs within `with`."""

    def __enter__(self) -> Waits:
        from torch.overrides import TorchFunctionMode
        from torch.utils._python_dispatch import TorchDispatchMode

        count = self.update

        class Operations(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                name = str(func)
                if any(part in name for part in WAITS) or _by_mask(name, args):
                    count([name])
                return func(*args, **(kwargs or {}))

        class Methods(TorchFunctionMode):
            def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                if getattr(func, "__name__", "") in READS:
                    count([f"Tensor.{func.__name__}"])
                return func(*args, **(kwargs or {}))

        self._modes = contextlib.ExitStack()
        self._modes.enter_context(Operations())
        self._modes.enter_context(Methods())
        return self

    def __exit__(self, *error: object) -> None:
        self._modes.close()


def _by_mask(name: str, args: Any) -> bool:
    """Whether the operation indexes with a mask, so that the size of its result depends on the mask's content."""
    if not name.startswith(("aten.index.", "aten.index_put")):
        return False
    return any(index is not None and str(index.dtype) in ("torch.bool", "torch.uint8") for index in args[1])


def cuda_waits(step: Callable[[], object]) -> int:
    """What torch counts on a GPU."""
    import torch

    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in found)


def instead_of_the_loop(overrides: list[str], train: Callable[..., str]) -> int:
    """Runs core's own command up to the loop, and `train` in the loop's place. Returns the exit status."""
    import core.engine.worker
    import core.run

    core.engine.worker.train = train
    with tempfile.TemporaryDirectory() as folder:
        sys.argv = ["core.run", *overrides, "checkpoint.at_end=false", f"run_dir={folder}/run"]
        with contextlib.redirect_stdout(sys.stderr):
            return core.run.main()


def measure(overrides: list[str], timed: int) -> dict[str, Any]:
    """Of the composed step, once counted and so often `timed`."""
    report: dict[str, Any] = {}

    def train(ctx: Any, watch: Any, step: Callable[..., Any], batches: Callable[..., Iterable[Any]], _: Any) -> str:
        several = itertools.islice((b for epoch in itertools.count(1) for b in batches(epoch, 0)), timed + 3)
        for _ in range(2):  # the optimizer's state comes with the first
            step(next(several))
        counted = next(several)
        if ctx.device.type == "cuda":
            report["cuda_synchronisations"] = cuda_waits(lambda: step(counted))
        with Waits() as waits:
            step(counted)
        seconds, on_cpu = list[float](), list[float]()
        for batch in several:
            ctx.backend.synchronize()
            started, started_cpu = time.perf_counter(), time.process_time()
            step(batch)
            ctx.backend.synchronize()
            seconds.append(time.perf_counter() - started)
            on_cpu.append(time.process_time() - started_cpu)
        report["host_synchronisations"] = dict(waits)
        if seconds:
            report["step_ms"] = median(seconds) * 1e3
            report["cpu_ms"] = median(on_cpu) * 1e3
            report["images_per_s"] = ctx.workload.global_batch_size / median(seconds)
        return "throughput"

    code = instead_of_the_loop(overrides, train)
    if not report:
        raise SystemExit(code)
    return report


def report_of(*command: str) -> dict[str, Any]:
    """What this Python program prints on its last line, run with one thread."""
    env = {"OMP_NUM_THREADS": "1", **os.environ}
    done = subprocess.run([sys.executable, *command], env=env, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def compare(overrides: list[str], rounds: int) -> None:
    baseline = partial(report_of, __file__, *overrides)
    found = race({"baseline": baseline, "static_detection": partial(baseline, "+opt=static_detection")}, rounds)
    rows: list[list[object]] = []
    for name, runs in found.items():
        waits = sum(runs[0]["host_synchronisations"].values())
        times = [f"{spread([run[key] for run in runs]):.1f}" for key in ("step_ms", "images_per_s", "cpu_ms")]
        slower = spread(ratios([run["cpu_ms"] for run in runs], [run["cpu_ms"] for run in found["baseline"]]))
        rows.append([name, waits, *times, f"{slower:.2f}"])
    columns = ["", "host synchronisations a step", "ms a step", "images/s", "CPU ms a step", "of the baseline's"]
    print(table(columns, rows))
    print(f"\nMedian (least to most), n = {rounds} processes of {STEPS} steps each.")


def main() -> None:
    arguments = sys.argv[1:]
    if arguments[:1] == ["--compare"]:
        rounds = int(arguments.pop(2)) if arguments[1:2] == ["--rounds"] else 5
        compare([a for a in arguments[1:] if a != "--rounds"], rounds)
    else:
        timed = 0 if "--untimed" in arguments else STEPS
        print(json.dumps(measure([a for a in arguments if a != "--untimed"], timed)))


if __name__ == "__main__":
    main()
