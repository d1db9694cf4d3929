"""What the core loop costs on top of a bare PyTorch loop, and what other frameworks cost.

    uv run python tools/bench_overhead.py                        core against bare
    uv run --group bench python tools/bench_overhead.py          and against Accelerate, Lightning, Hugging Face Trainer
    uv run python tools/bench_overhead.py --contenders core --sizes '1 ms' --rounds 1 --steps 200        a quick look

The figures mean something only on a machine that is otherwise idle.

Every contender trains the same network on the same batches with the same optimizer (the workload `toy`, three sizes),
in a separate process with one torch thread. Rounds are interleaved; differences and ratios are taken within a round.
The core runs by its own command line with its normal logging and progress on, the others with theirs off. A contender
whose final parameters do not have the bare loop's bits is an error, unless its framework changes them (column `bits`).
The core leaves Python's collector off until its clock starts, the others do as Python does: torch's import makes many
objects, and going through them takes longer than all that the core does before its first step.
The column `CPU` is user and system time of the whole process, its start and its end included, and so less than the
others at the mercy of what else runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Size of the network for a bare step of about this many milliseconds on one thread, and how many steps to take.
SIZES = {
    "1 ms": {"features": 256, "hidden": 640, "steps": 2000},
    "10 ms": {"features": 1024, "hidden": 1792, "steps": 200},
    "100 ms": {"features": 2048, "hidden": 9216, "steps": 24},
}
EXAMPLES, CLASSES, BATCH, SEED, LEARNING_RATE, MOMENTUM = 2048, 4, 64, 1, 0.001, 0.9
PACKAGES = {"accelerate": "accelerate", "lightning": "lightning", "hf_trainer": "transformers"}
CONTENDERS = ("bare", "core", *PACKAGES)


def settle_after(steps: int) -> int:
    """Steps that are not timed: the first fifth, in which caches and allocators fill."""
    return steps // 5


# ------------------------------------------------------------------- one contender, in a separate process


def seed_for(*names: object) -> int:
    """As RunContext.seed_for, written out so that the bare loop imports nothing of the core."""
    text = "/".join(str(n) for n in (SEED, *names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def build(features: int, hidden: int) -> tuple[Any, Any, Callable[[], Iterator[Any]]]:
    """The toy workload's network, optimizer and endless batches."""
    import numpy as np
    import torch
    from torch import nn

    generator = torch.Generator().manual_seed(seed_for("points"))
    centres = torch.randn(CLASSES, features, generator=generator)
    labels = torch.arange(EXAMPLES + BATCH) % CLASSES
    points = centres[labels] + 1.5 * torch.randn(len(labels), features, generator=generator)
    torch.manual_seed(seed_for("init"))
    model = nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), nn.Dropout(0.0), nn.Linear(hidden, CLASSES))
    torch.manual_seed(seed_for("torch", 0))
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)

    def batches() -> Iterator[Any]:
        epoch = 1
        while True:
            order = np.random.default_rng(seed_for("shuffle", epoch)).permutation(EXAMPLES)
            for start in range(0, EXAMPLES, BATCH):
                rows = torch.from_numpy(order[start : start + BATCH])
                yield points[rows], labels[rows]
            epoch += 1

    return model, optimizer, batches


class Stopwatch:
    """Times the steps between two calls of `tick`, and notes when the first was done."""

    def __init__(self, steps: int) -> None:
        self.steps, self.done, self.first, self.begin, self.end = steps, 0, 0.0, 0.0, 0.0

    def tick(self) -> None:
        self.done += 1
        if self.done == 1:
            self.first = time.time()
        if self.done == settle_after(self.steps):
            self.begin = time.perf_counter()
        if self.done == self.steps:
            self.end = time.perf_counter()

    def report(self, model: Any) -> dict[str, Any]:
        timed = self.steps - settle_after(self.steps)
        return {
            "step_us": (self.end - self.begin) / timed * 1e6,
            "first_step_at": self.first,
            "parameters": parameters_hash(model),
        }


def parameters_hash(model: Any) -> str:
    """As core.state.checkpoint.parameters_hash, written out for the same reason: an import would count as CPU time."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def run_bare(features: int, hidden: int, steps: int) -> dict[str, Any]:
    from torch.nn import functional as F

    model, optimizer, batches = build(features, hidden)
    watch = Stopwatch(steps)
    for points, labels in batches():
        loss = F.cross_entropy(model(points), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        watch.tick()
        if watch.done == steps:
            break
    return watch.report(model)


def run_accelerate(features: int, hidden: int, steps: int) -> dict[str, Any]:
    from accelerate import Accelerator
    from torch.nn import functional as F

    accelerator = Accelerator(cpu=True)
    bare, optimizer, batches = build(features, hidden)
    model, optimizer = accelerator.prepare(bare, optimizer)
    watch = Stopwatch(steps)
    for points, labels in batches():
        loss = F.cross_entropy(model(points), labels)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        watch.tick()
        if watch.done == steps:
            break
    return watch.report(bare)


def iterable_loader(batches: Callable[[], Iterator[Any]]) -> Any:
    """A DataLoader that hands ready-made batches on: the frameworks below want one."""
    from torch.utils.data import DataLoader, IterableDataset

    class Stream(IterableDataset):
        def __iter__(self) -> Iterator[Any]:
            return batches()

    return DataLoader(Stream(), batch_size=None)


def run_lightning(features: int, hidden: int, steps: int) -> dict[str, Any]:
    import lightning
    from torch.nn import functional as F

    net, optimizer, batches = build(features, hidden)
    watch = Stopwatch(steps)

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def training_step(self, batch: Any, index: int) -> Any:
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def on_train_batch_end(self, *_: Any) -> None:
            watch.tick()

        def configure_optimizers(self) -> Any:
            return optimizer

    trainer = lightning.Trainer(
        accelerator="cpu", max_steps=steps, logger=False, enable_progress_bar=False, enable_checkpointing=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Module(), iterable_loader(batches))
    return watch.report(net)


def run_hf_trainer(features: int, hidden: int, steps: int) -> dict[str, Any]:
    import torch
    from torch.nn import functional as F
    from transformers import Trainer, TrainerCallback, TrainingArguments

    model, optimizer, batches = build(features, hidden)
    watch = Stopwatch(steps)

    class Tick(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            watch.tick()

    class Plain(Trainer):
        def get_train_dataloader(self) -> Any:
            return iterable_loader(lambda: ({"points": p, "labels": t} for p, t in batches()))

        def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
            return F.cross_entropy(model(inputs["points"]), inputs["labels"])

    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            output_dir=folder, max_steps=steps, per_device_train_batch_size=BATCH, logging_strategy="no",
            save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True, max_grad_norm=0.0,
        )  # fmt: skip
        constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
        Plain(model, settings, train_dataset=[0], optimizers=(optimizer, constant), callbacks=[Tick()]).train()
    return watch.report(model)


# ------------------------------------------------------------------------------------------------ the race


def measure(contender: str, size: dict[str, int], folder: Path) -> dict[str, Any]:
    """Runs one contender once: added to its report, seconds from process start to the end of the first step."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    started, spent = time.time(), children_cpu_s()
    if contender == "core":
        report = measure_core(size, folder, env)
    else:
        command = [sys.executable, __file__, "--worker", contender, "--size", json.dumps(size)]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{contender} failed:\n{done.stderr}")
        report = json.loads(done.stdout.splitlines()[-1])
    return {**report, "first_step_s": report["first_step_at"] - started, "cpu_s": children_cpu_s() - spent}


def children_cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def measure_core(size: dict[str, int], folder: Path, env: dict[str, str]) -> dict[str, Any]:
    run_dir = Path(tempfile.mkdtemp(dir=folder)) / "run"
    settings = {
        "workload": "toy", "workload.features": size["features"], "workload.hidden": size["hidden"],
        "workload.examples": EXAMPLES, "workload.eval_examples": BATCH, "workload.classes": CLASSES,
        "workload.global_batch_size": BATCH, "workload.learning_rate": LEARNING_RATE, "workload.momentum": MOMENTUM,
        "workload.eval.every": 10**6, "workload.max_epochs": 10**6, "stop.steps": size["steps"], "seed": SEED,
        "checkpoint.at_end": "false", "run_dir": run_dir,
    }  # fmt: skip
    command = [sys.executable, "-m", "core.run", *(f"{key}={value}" for key, value in settings.items())]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode != 4:  # the run ends at stop.steps, without an evaluation: not converged
        raise SystemExit(f"core failed:\n{done.stderr}")
    events = [json.loads(line.partition(" ")[2]) for line in (run_dir / "result_0.txt").read_text().splitlines()]
    run_start = next(e["time_ms"] for e in events if e["key"] == "run_start") / 1e3
    looks = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    begin = next(look for look in looks if look["step"] >= settle_after(size["steps"]))
    if begin is looks[-1]:  # fewer looks than that: time all but the first step
        begin = looks[0]
    timed = looks[-1]["step"] - begin["step"]
    return {
        "step_us": (looks[-1]["time_s"] - begin["time_s"]) / timed * 1e6,
        "first_step_at": run_start + looks[0]["time_s"],
        "parameters": json.loads((run_dir / "result.json").read_text())["parameters_sha256"],
    }


def race(contenders: list[str], sizes: dict[str, dict[str, int]], rounds: int) -> list[dict[str, Any]]:
    """One row per size and contender, of spreads over the rounds."""
    from core.api.statistics import ratios, rotated, spread  # not above: a contender imports nothing of the core

    runs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds):
            for name, size in sizes.items():
                for contender in rotated(contenders, number):
                    runs.setdefault((name, contender), []).append(measure(contender, size, Path(folder)))
            print(f"round {number + 1} of {rounds} done", file=sys.stderr, flush=True)
    rows = []
    for (size, contender), mine in sorted(runs.items(), key=lambda item: list(sizes).index(item[0][0])):
        pairs = list(zip(mine, runs[size, "bare"], strict=True))
        same = all(a["parameters"] == b["parameters"] for a, b in pairs)
        if contender == "core" and not same:
            raise SystemExit("the core's parameters differ from the bare loop's: the comparison is void")
        row: dict[str, Any] = {"size": size, "contender": contender, "n": len(mine), "bits": same}
        row["step_us"] = spread([a["step_us"] for a, _ in pairs])
        row["added_us"] = spread([a["step_us"] - b["step_us"] for a, b in pairs])
        row["ratio"] = spread(ratios([a["step_us"] for a, _ in pairs], [b["step_us"] for _, b in pairs]))
        row["added_start_s"] = spread([a["first_step_s"] - b["first_step_s"] for a, b in pairs])
        row["first_step_s"] = spread([a["first_step_s"] for a, _ in pairs])
        row["cpu_s"] = spread([a["cpu_s"] for a, _ in pairs])
        row["added_cpu_s"] = spread([a["cpu_s"] - b["cpu_s"] for a, b in pairs])
        rows.append(row)
    return rows


def summary(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    from core.api.statistics import table

    columns = (
        "step", "contender", "n", "us a step", "added us a step", "ratio", "start to first step, s", "added, s",
        "CPU, s", "added, s", "bits",
    )  # fmt: skip
    cells = [
        [
            row["size"], row["contender"], row["n"], f"{row['step_us']:,.0f}", f"{row['added_us']:+,.0f}",
            f"{row['ratio']:.3f}", f"{row['first_step_s']:.2f}", f"{row['added_start_s']:+.2f}",
            f"{row['cpu_s']:.2f}", f"{row['added_cpu_s']:+.2f}", "same" if row["bits"] else "other",
        ]
        for row in rows
    ]  # fmt: skip
    return table(columns, cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="default: %(default)s")
    parser.add_argument("--sizes", default=",".join(SIZES), help="default: %(default)s")
    parser.add_argument("--contenders", default=",".join(CONTENDERS), help="beside bare; default: %(default)s")
    parser.add_argument("--steps", type=int, help="in place of each size's own number of steps")
    parser.add_argument("--out", type=Path, help="also write the figures as JSON")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--size", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        import torch

        torch.set_num_threads(1)
        print(json.dumps(globals()[f"run_{arguments.worker}"](**arguments.size)))
        return
    more = {"steps": arguments.steps} if arguments.steps else {}
    sizes = {name: {**SIZES[name], **more} for name in arguments.sizes.split(",")}
    contenders = ["bare", *(c for c in arguments.contenders.split(",") if c != "bare")]
    missing = [c for c in contenders if c in PACKAGES and importlib.util.find_spec(PACKAGES[c]) is None]
    contenders = [c for c in contenders if c not in missing]
    rows = race(contenders, sizes, arguments.rounds)
    installed = {c: importlib.metadata.version(PACKAGES[c]) for c in contenders if c in PACKAGES}
    versions = {"torch": importlib.metadata.version("torch"), "python": platform.python_version(), **installed}
    print(summary(rows))
    print(f"\n{os.cpu_count()} cores, {platform.machine()}, one torch thread; versions: {versions}")
    for contender in missing:
        print(f"{contender}: not installed (uv run --group bench ...)")
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        figures = {"versions": versions, "command": sys.argv, "rows": rows}
        arguments.out.write_text(json.dumps(figures, indent=1, default=dataclasses.asdict))


if __name__ == "__main__":
    main()
