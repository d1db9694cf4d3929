"""Everything that needs a GPU, in one command of under eight minutes: correct, active, composable, fast?

    python tools/gpu_check.py --wheels DIR          on a machine without network; DIR is filled by tools/wheelhouse.sh
    python tools/gpu_check.py --cpu                 what of it runs without a GPU, small

Sections: `ceiling` (measured matrix products), `correctness` (each installed opt against the eager run), `ddp` (NCCL at
world size 1, with a communication hook inside the graph), `tests` (those marked gpu), `throughput` (each installed
workload on synthetic data, as a share of the ceiling) and `matrix` (every pair of opts). Each survives the failure of
another and keeps to its share of the time; what it did not come to says so. All runs take place through the real
command line in processes of their own.

Writes results/gpu_check.json and .md, anew after each section. Nothing has to be installed: plugins are found in the
checkout, and third-party packages that the machine lacks in the folder of wheels. Exit status 1 if anything is broken.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import metadata
from itertools import combinations
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PROBES = {"count_flops": "CountFlops", "plain_hook": "PlainHook"}

CORRECTNESS = {
    # Of its 16 steps an epoch 4 go by before an evaluation may be met.
    # Four steps an epoch: even the few on a CPU have evaluations among them.
    "toy": ("workload=toy", "workload.dropout=0.2", "workload.targets.accuracy=1.0", "workload.examples=256"),
    "resnet": ("workload=resnet", "data=synthetic", "workload.global_batch_size=64"),
    "bert": ("workload=bert", "data=synthetic"),
    "rnnt": ("workload=rnnt", "data=synthetic"),
    # torchvision's fast kernels for the backward pass of RoIAlign add up in an order of their own on a GPU.
    "maskrcnn": ("workload=maskrcnn", "data=synthetic", "deterministic=false"),
    # A run with games, for the opts that act on them; not evaluated, since open_spiel may be missing.
    "minigo": (
        "workload=minigo",
        "workload.games=64",
        "workload.parallel_games=64",
        "workload.epoch_examples=1024",
        "workload.eval.first=99",
    ),
}
"""Tried in this order, until one offers what an opt replaces; workloads not listed come after them, as they are."""
STEPS = {"cuda": 30, "cpu": 8}
"""cuda_graphs makes 12 eager steps, and stream_overlap profiles steps 17 to 19."""

THROUGHPUT: dict[str, dict[str, tuple[str, ...]]] = {
    "cuda": {
        "resnet_mlperf": ("workload.global_batch_size=256",),
        "bert_mlperf": ("workload.global_batch_size=24",),
        "rnnt_mlperf": ("workload.global_batch_size=16",),
        "maskrcnn_mlperf": ("workload.global_batch_size=4", "workload.pretrained=random", "deterministic=false"),
        "maskrcnn": ("deterministic=false",),
    },
    "cpu": {
        "resnet": ("workload.global_batch_size=32", "workload.width=8"),
        "bert": ("workload.global_batch_size=8",),
        "rnnt": ("workload.global_batch_size=8",),
    },
}
"""What fits one device, for the workloads whose own sizes do not. Others run at their own."""
NOT_TIMED = {
    "cuda": ("resnet_fashion",),
    "cpu": ("resnet_fashion", "resnet_mlperf", "bert_mlperf", "rnnt_mlperf", "maskrcnn_mlperf", "minigo_mlperf"),
}
"""The same network as another workload, or too large for a CPU."""

VARIANTS = {
    "eager fp32": (),
    "amp": ("amp",),
    "cuda_graphs": ("cuda_graphs",),
    "compile": ("compile",),
    "all": None,
}
"""`all` is every installed opt that fits, less these, which trade time for memory or need several ranks to pay."""
TRADES_TIME = ("activation_checkpointing", "grad_accumulation", "fsdp", "gradient_compression", "sharp", *PROBES)

SETTINGS = {
    "cuda": {"sharp": ("opt.sharp.ranks_per_node=1",)},
    "cpu": {
        "sharp": ("opt.sharp.ranks_per_node=1",),
        "compile": ("opt.compile.backend=aot_eager",),
        "stream_overlap": ("opt.stream_overlap.profile_after=2",),
    },
}
"""What single opts need in the sections on correctness, and to be quick."""
TRACED_ONLY = "opt.compile.backend=aot_eager"
"""In the matrix, where code generation would take most of the time; the other sections have it."""

RELATIVE = {"tolerance": 1e-2, "changes": 0.25}
"""Largest relative difference of a loss from the eager run's, over the first steps."""

SHARES = {"ceiling": 0.04, "correctness": 0.2, "ddp": 0.08, "tests": 0.2, "throughput": 0.31, "matrix": 0.17}
"""Of the time, by section, in the order in which they run. What one leaves over the next may use."""


# ------------------------------------------------------------------------------------------ a path, not an installation


def make_site(folder: Path, wheels: Path | None) -> list[Path]:
    """Folders to put on the path: metadata of the checkout's plugins, their sources, and unpacked wheels.

    Whatever the machine has installed is left to it, plugins too.
    """
    sources: list[Path] = [folder, ROOT, ROOT / "tools"]
    for project in [ROOT, *sorted((ROOT / "plugins").glob("*/*"))]:
        if not (project / "pyproject.toml").exists():
            continue
        about = tomllib.loads((project / "pyproject.toml").read_text())["project"]
        points = about.get("entry-points", {})
        if installed(about["name"]) is None:
            write_metadata(folder, about["name"], points)
            sources.append(project / "src")
    write_metadata(folder, "gpu-check-probe", {
        "timetrial.opt": {name: f"gpu_check_probe.plugin:{cls}" for name, cls in PROBES.items()}
    })  # fmt: skip
    unpacked = folder / "unpacked"
    for wheel in sorted(wheels.glob("*.whl")) if wheels else []:
        if installed(wheel.name.split("-")[0]) is None:
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(unpacked)
    return [path for path in (*sources, unpacked) if path.exists()]


def installed(distribution: str) -> str | None:
    """Its version, or None."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def write_metadata(folder: Path, name: str, points: dict[str, dict[str, str]]) -> None:
    """What `importlib.metadata` reads of a distribution: its name, version and entry points."""
    info = folder / f"{name.replace('-', '_')}-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0\n")
    lines = [
        line
        for group, entries in points.items()
        for line in (f"[{group}]", *(f"{key} = {target}" for key, target in entries.items()))
    ]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")


# ------------------------------------------------------------------------------------------------------------- one run


@dataclass
class Run:
    """How one command line ended."""

    code: int
    words: str
    """The last line on stderr: the reason, where it was refused or failed."""
    seconds: float
    losses: list[float] = field(default_factory=list[float])
    speeds: list[float] = field(default_factory=list[float])
    """Samples/s between looks."""
    parameters: str = ""
    evidence: dict[str, dict[str, Any]] = field(default_factory=dict[str, Any])

    @property
    def refused(self) -> bool:
        return self.code == 2

    @property
    def not_offered(self) -> bool:
        """Refused since the workload lacks what an opt acts on."""
        return self.refused and any(words in self.words for words in (" which nothing here offers", " does not apply "))


RUN_LIMIT, CUT_OFF = 150.0, 124
"""Seconds after which a run counts as hanging, compilation included; the exit status that means it."""

_ERROR = re.compile(r"[\w.]+(Error|Exception)\b")

ENDED = (0, 4)
"""Exit statuses of a run that made all its steps: a throughput run, or one that did not reach its target."""


def run(overrides: Sequence[str], timeout: float) -> Run:
    """`python -m core.run OVERRIDES`, without checkpoints."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="gpu_check-") as folder:
        place = Path(folder, "run")
        still = ("checkpoint.at_end=false", "checkpoint.every_seconds=null", f"run_dir={place}")
        command = [sys.executable, "-m", "core.run", *overrides, *still]
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        process = subprocess.Popen(command, **pipes, text=True, cwd=folder, start_new_session=True)
        try:
            _, stderr = process.communicate(timeout=max(timeout, 1.0))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its ranks as well
            process.communicate()
            return Run(CUT_OFF, f"not finished after {timeout:.0f} s", time.perf_counter() - start)
        words = (stderr.strip().splitlines() or [""])[-1].removeprefix("timetrial: ").removeprefix("failed: ")
        words = words.partition(" [")[0]  # the run folder, which is gone by now
        if trace := next(place.glob("errors/*.traceback.txt"), None):
            first = next(filter(_ERROR.match, trace.read_text().splitlines()), "")
            words += f"; first cause: {first}" if first and first not in words else ""
        result = Run(process.returncode, words, time.perf_counter() - start)
        if result.code in ENDED:
            rows = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
            result.losses = [loss for row in rows for loss in row.get("losses", [])]
            result.speeds = [row["samples_per_s"] for row in rows if "samples_per_s" in row]
            result.parameters = json.loads((place / "result.json").read_text())["parameters_sha256"]
            evidence = json.loads((place / "evidence.json").read_text())["end"]
            result.evidence = {e["plugin"]: e for e in evidence}
        return result


def judge(mine: Run, eager: Run, opts: Sequence[str], declared: dict[str, str]) -> tuple[str, str]:
    """(verdict, words): whether the opts kept what they declare of the numbers, and proved that they took effect.

    Verdicts: bitwise, tolerance, changes (trained as declared); refused; broken.
    """
    if mine.refused:
        return "refused", mine.words
    if mine.code not in ENDED:
        return "broken", f"exit {mine.code}: {mine.words}"
    silent = [name for name in opts if not mine.evidence.get(name, {}).get("active")]
    if silent:
        return "broken", f"no evidence: {mine.evidence.get(silent[0], {}).get('summary', silent[0])}"
    numerics = {mine.evidence[name].get("numerics") or declared[name] for name in opts}
    kept = "changes" if "changes" in numerics else "tolerance" if "tolerance" in numerics else "bitwise"
    if kept == "bitwise":
        same = mine.parameters == eager.parameters and mine.losses == eager.losses
        return (kept, "") if same else ("broken", f"declared bitwise; losses differ by {worst(mine, eager):.2g}")
    difference = worst(mine, eager)
    words = f"losses differ by {difference:.2g}"
    return (kept, words) if difference <= RELATIVE[kept] else ("broken", f"declared {kept}; {words}")


def worst(mine: Run, eager: Run) -> float:
    """The largest relative difference between losses of the same step; infinite where one is not finite or missing."""
    if len(mine.losses) != len(eager.losses) or not mine.losses:
        return float("inf")
    differences = [abs(a - b) / max(abs(b), 1e-12) for a, b in zip(mine.losses, eager.losses, strict=True)]
    return max(differences) if all(map(math.isfinite, differences)) else float("inf")


# ----------------------------------------------------------------------------------------------------------- the check


class OutOfTime(Exception):
    """A section has used up its time."""


@dataclass
class Check:
    """What the sections share: where they run, what is installed, and how long they may take."""

    device: str
    opts: dict[str, Any]
    """Specs of the opts to check, by name."""
    workloads: list[str]
    jobs: int
    deadline: float = 0.0
    """Of the section under way, as time.monotonic()."""
    ceilings: dict[str, float] = field(default_factory=dict[str, float])
    baselines: dict[tuple[str, ...], Run] = field(default_factory=dict[tuple[str, ...], Run])
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def cuda(self) -> bool:
        return self.device == "cuda"

    @property
    def backend(self) -> tuple[str, ...]:
        """One process. deterministic=true stays, so that equal numbers mean equal code."""
        return ("backend=single", f"backend.device={self.device}")

    def run(self, *overrides: str) -> Run:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise OutOfTime
        result = run(overrides, min(left, RUN_LIMIT))
        if result.code == CUT_OFF and left < RUN_LIMIT:
            raise OutOfTime  # it may be sound
        return result

    def eager(self, *overrides: str) -> Run:
        """The run to compare with, made once."""
        with self.lock:
            if overrides not in self.baselines:
                self.baselines[overrides] = self.run(*overrides)
            return self.baselines[overrides]

    def try_all(self, tasks: Sequence[tuple[str, ...]], work: Callable[..., Any]) -> Iterator[tuple[Any, Any]]:
        """(task, result) for each, several at a time; a result is OutOfTime where the time was over."""

        def attempt(task: tuple[str, ...]) -> Any:
            try:
                return work(*task)
            except OutOfTime as over:
                return over

        with ThreadPoolExecutor(self.jobs) as pool:
            yield from zip(tasks, pool.map(attempt, tasks), strict=True)


Row = dict[str, Any]
NOT_RUN = "not run: out of time"


def ceiling(check: Check) -> list[Row]:
    """The largest rate at which this device multiplies square matrices, in each format that is used."""
    import torch

    size = 8192 if check.cuda else 512
    formats = {"fp32": (torch.float32, False), "bf16": (torch.bfloat16, False)}
    if check.cuda:
        formats["tf32"] = (torch.float32, True)
    rows: list[Row] = []
    for name, (dtype, tf32) in formats.items():
        torch.backends.cuda.matmul.allow_tf32 = tf32
        a, b = (torch.randn(size, size, device=check.device, dtype=dtype) for _ in range(2))
        _seconds(a, b, check.cuda)  # sets up the library
        until, seconds = time.monotonic() + 1.0, float("inf")
        while time.monotonic() < until:
            seconds = min(seconds, _seconds(a, b, check.cuda))
        check.ceilings[name] = rate = 2 * size**3 / seconds / 1e12
        rows.append({"format": name, "size": f"{size}^3", "TFLOP/s": float(f"{rate:.3g}")})
    torch.backends.cuda.matmul.allow_tf32 = False
    return rows


def _seconds(a: Any, b: Any, cuda: bool) -> float:
    """For one product."""
    import torch

    wait = torch.cuda.synchronize if cuda else lambda: None
    wait()
    start = time.perf_counter()
    a @ b
    wait()
    return time.perf_counter() - start


def correctness(check: Check) -> list[Row]:
    """Each opt on the first workload that offers what it acts on; with two ranks on the CPU where it needs several."""
    known = [CORRECTNESS.get(name, (f"workload={name}", "data=synthetic")) for name in check.workloads]
    order = [w for w in CORRECTNESS.values() if w in known] + [w for w in known if w not in CORRECTNESS.values()]
    steps = f"stop.steps={STEPS[check.device]}"

    def place(spec: Any) -> tuple[str, ...]:
        several = spec.requires & {"multi_rank", "multi_node", "process_group"}
        return ("backend=gloo", "launch.nproc=2") if several else check.backend

    def attempt(name: str) -> Row:
        for workload in order:
            arguments = (*workload, *place(check.opts[name]), steps)
            mine = check.run(*arguments, f"+opt={name}", *SETTINGS[check.device].get(name, ()))
            if not mine.not_offered:
                break
        if mine.refused:
            return {"opt": name, "on": arguments[0], "verdict": "refused", "words": mine.words}
        verdict, words = judge(mine, check.eager(*arguments), [name], {name: check.opts[name].numerics})
        evidence = mine.evidence.get(name, {}).get("summary", "")
        on = f"{arguments[0]}{', 2 ranks, CPU' if 'launch.nproc=2' in arguments else ''}"
        return {"opt": name, "on": on, "verdict": verdict, "words": words, "evidence": evidence}

    tasks = [(name,) for name in check.opts]
    return [
        {"opt": name, "verdict": NOT_RUN} if isinstance(row, OutOfTime) else row
        for (name,), row in check.try_all(tasks, attempt)
    ]


def ddp(check: Check) -> list[Row]:
    """DistributedDataParallel over NCCL at world size 1: bare, with a hook, and both inside the graph."""
    place = ("backend=nccl", f"stop.steps={STEPS['cuda']}")
    hooks = [
        "plain_hook",
        *(n for n, s in check.opts.items() if "gradient_exchange.hook" in s.claims and not s.requires),
    ]
    declared = {**{name: spec.numerics for name, spec in check.opts.items()}, "plain_hook": "bitwise"}
    tasks: list[tuple[str, ...]] = [("cuda_graphs",), ("plain_hook",)]
    tasks += [("cuda_graphs", hook) for hook in hooks]
    tasks += [("cuda_graphs", "stream_overlap")] if "stream_overlap" in check.opts else []
    common = ("ddp", "fused_optimizer") if "fused_optimizer" in check.opts else ("ddp",)
    eager = check.run(*CORRECTNESS["toy"], *place, f"opt=[{','.join(common)}]")

    def attempt(*opts: str) -> Row:
        mine = check.run(*CORRECTNESS["toy"], *place, f"opt=[{','.join((*opts, *common))}]")
        verdict, words = judge(mine, eager, opts, declared)
        evidence = "; ".join(mine.evidence.get(name, {}).get("summary", "") for name in opts)
        return {"opts": " + ".join(opts), "verdict": verdict, "words": words, "evidence": evidence}

    return [
        {"opts": " + ".join(task), "verdict": NOT_RUN} if isinstance(row, OutOfTime) else row
        for task, row in check.try_all(tasks, attempt)
    ]


def gpu_tests(check: Check) -> list[Row]:
    """The tests that are marked gpu; modules that this machine cannot import do not count."""
    if installed("pytest") is None:
        return [{"tests": "marked gpu", "verdict": "not run: pytest is not installed"}]
    # The project's own options ask for plugins of pytest that may be missing here.
    options = ["-q", "-m", "gpu", "-o", "addopts=", "--import-mode=importlib", "--continue-on-collection-errors"]
    command = [sys.executable, "-m", "pytest", *options, "-p", "no:cacheprovider", "plugins", "tests"]
    try:
        left = max(check.deadline - time.monotonic(), 1.0)
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=left)
    except subprocess.TimeoutExpired:
        raise OutOfTime from None
    lines = done.stdout.strip().splitlines() or [""]
    kinds = {"FAILED ": "broken", "ERROR ": "not run"}
    rows = [
        {"tests": line.removeprefix(start), "verdict": verdict}
        for line in lines for start, verdict in kinds.items() if line.startswith(start)
    ]  # fmt: skip
    return [*rows, {"tests": "all that are marked gpu", "verdict": lines[-1].strip("= ")}]


def throughput(check: Check) -> list[Row]:
    """Samples/s on synthetic data, one run at a time; the variants that say most come first."""
    names = [w for w in check.workloads if w not in NOT_TIMED[check.device]]
    arguments = {w: (f"workload={w}", *THROUGHPUT[check.device].get(w, ()), "data=synthetic") for w in names}
    seconds = "5" if check.cuda else "2"
    timed = (*check.backend, "deterministic=false", f"stop.seconds={seconds}", "log_seconds=0.5", "prewarm_steps=2")
    flops: dict[str, float] = {}
    rows: list[Row] = []
    for variant, opts in VARIANTS.items():
        if opts and not set(opts) <= check.opts.keys():
            continue
        for name in names:
            row: Row = {"workload": " ".join(arguments[name][:-1]).replace("workload=", "", 1), "variant": variant}
            rows.append(row)
            try:
                if name not in flops:
                    counted = check.run(*arguments[name], *check.backend, "+opt=count_flops", "stop.steps=1")
                    figures = counted.evidence.get("count_flops", {}).get("figures", {})
                    flops[name] = figures.get("flops_per_sample", 0.0)
                chosen = list(opts) if opts is not None else fitting(check)
                row |= _timed(check, [*arguments[name], *timed], chosen, flops[name])
            except OutOfTime:
                row["words"] = NOT_RUN
    eager = {row["workload"]: row.get("samples/s") for row in rows if row["variant"] == "eager fp32"}
    for row in rows:
        base = eager.get(row["workload"])
        row["speed-up"] = round(row["samples/s"] / base, 2) if base and row.get("samples/s") else None
    return rows


def fitting(check: Check) -> list[str]:
    """Every opt that one device can run together with those before it in the alphabet."""
    chosen: list[str] = []
    offered = {"cxx", "cuda"} if check.cuda else {"cxx"}
    for name, spec in check.opts.items():
        clashes = any(
            other in spec.conflicts or name in check.opts[other].conflicts or check.opts[other].claims & spec.claims
            for other in chosen
        )
        if name not in TRADES_TIME and spec.requires <= offered and not clashes:
            chosen.append(name)
    return chosen


def _timed(check: Check, arguments: list[str], opts: list[str], flops: float) -> Row:
    """One timed run; an opt that the workload refuses is left out, and the run is tried again."""
    while True:
        result = check.run(*arguments, f"opt=[{','.join(opts)}]")
        refused = [name for name in opts if re.search(rf"\b{name}\b", result.words)]
        if not (result.refused and len(opts) > 1 and refused):
            break
        opts = [name for name in opts if name != refused[0]]
    row: Row = {"opts": " + ".join(opts)}
    if result.code not in ENDED or not result.speeds:
        return {**row, "verdict": "refused" if result.refused else "broken", "words": result.words}
    speed = statistics.median(result.speeds[len(result.speeds) // 2 :])
    row |= {"samples/s": round(speed, 1)}
    silent = [name for name in opts if not result.evidence[name]["active"]]
    if silent:
        row["words"] = f"no evidence for {', '.join(silent)}"
    if flops:
        tflops = speed * flops / 1e12
        row["TFLOP/s"] = float(f"{tflops:.3g}")
        # cuDNN takes TF32 for convolutions by default, and a device without bf16 arithmetic widens.
        served = [
            name for name in ("fp32", "tf32", "bf16") if name in check.ceilings and (name != "bf16" or "amp" in opts)
        ]
        if served:
            best = max(served, key=check.ceilings.__getitem__)
            row["share of ceiling"] = f"{tflops / check.ceilings[best]:.1%} of {best}"
    return row


def matrix(check: Check) -> list[Row]:
    """Every pair of opts on one GPU: trained as declared, or refused with the reason."""
    arguments = (*CORRECTNESS["toy"], *check.backend, f"stop.steps={STEPS[check.device]}")
    eager = check.eager(*arguments)
    declared = {name: spec.numerics for name, spec in check.opts.items()}
    triple = ("cuda_graphs", "stream_overlap", "amp")
    tasks = [triple] if set(triple) <= check.opts.keys() else []
    # Pairs with what only a GPU can run come first.
    tasks += sorted(combinations(check.opts, 2), key=lambda pair: "cuda_graphs" not in pair)

    def attempt(*opts: str) -> Row:
        more = [setting for name in opts for setting in SETTINGS[check.device].get(name, ())]
        more += [TRACED_ONLY] if "compile" in opts else []
        verdict, words = judge(check.run(*arguments, f"opt=[{','.join(opts)}]", *more), eager, opts, declared)
        return {"opts": " + ".join(opts), "verdict": verdict, "words": words}

    return [
        {"opts": " + ".join(task), "verdict": NOT_RUN} if isinstance(row, OutOfTime) else row
        for task, row in check.try_all(tasks, attempt)
    ]


SECTIONS: dict[str, tuple[Callable[[Check], list[Row]], bool]] = {
    "ceiling": (ceiling, False),
    "correctness": (correctness, False),
    "ddp": (ddp, True),
    "tests": (gpu_tests, True),
    "throughput": (throughput, False),
    "matrix": (matrix, True),
}
"""Each with whether it needs CUDA."""


def run_section(name: str, check: Check, seconds: float) -> dict[str, Any]:
    """The section's rows and how long it took; or why it failed, or was not run."""
    work, needs_cuda = SECTIONS[name]
    if needs_cuda and not check.cuda:
        return {"status": "not run: no CUDA device", "rows": []}
    start = time.monotonic()
    check.deadline = start + seconds
    try:
        rows, status = work(check), "ran"
    except OutOfTime:
        rows, status = [], NOT_RUN
    except Exception as error:  # one section must not take the others along
        rows, status = [], f"failed: {type(error).__name__}: {error}"
    return {"status": status, "rows": rows, "seconds": round(time.monotonic() - start, 1)}


def broken(report: dict[str, Any]) -> list[str]:
    """What is wrong, one line each."""
    found = list(report["problems"])
    for name, section in report["sections"].items():
        if section["status"].startswith("failed"):
            found.append(f"{name}: {section['status']}")
        for row in section["rows"]:
            if row.get("verdict") == "broken":
                what = row.get("opts") or row.get("opt") or row.get("tests") or "no opt"
                found.append(f"{name}: {row['workload'] + ', ' if 'workload' in row else ''}{what}: {row['words']}")
    return found


def load_specs(registry: Any, names: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Specs of the opts, and why the others cannot be loaded."""
    from core.api.errors import PluginError

    specs: dict[str, Any] = {}
    problems: list[str] = []
    for name in names:
        try:
            specs[name] = registry.find("opt", name).load().spec
        except PluginError as error:
            problems.append(error.message)
    return specs, problems


def describe(command: list[str]) -> dict[str, Any]:
    """Device, versions and command."""
    import torch

    cuda = torch.cuda.is_available()
    names = ("torch", "torchvision", "torchaudio", "transformers", "triton", "nvidia-nccl-cu13", "nvidia-cudnn-cu13")
    return {
        "command": " ".join(command),
        "time": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "device": torch.cuda.get_device_name()
        if cuda
        else f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "cuda": torch.version.cuda if cuda else None,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if cuda else None,
        "python": platform.python_version(),
        "versions": {name: version for name in names if (version := installed(name))},
    }


def markdown(report: dict[str, Any]) -> str:
    """The report as a page: the machine, what is broken, and a table for each section."""
    system = report["system"]
    versions = ", ".join(f"{name} {version}" for name, version in system["versions"].items())
    lines = [
        f"# GPU check: {system['device']}\n",
        f"`{system['command']}`, {system['time']}. Python {system['python']}, CUDA {system['cuda']}, "
        f"NCCL {system['nccl']}, {versions}.\n",
        *(f"- BROKEN {line}" for line in broken(report)),
    ]
    for name, section in report["sections"].items():
        lines.append(f"\n## {name}\n\n{section['status']}, {section.get('seconds', 0):.0f} s\n")
        columns = list(dict.fromkeys(key for row in section["rows"] for key in row))
        if columns:
            lines += [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
            lines += [f"| {' | '.join(_cell(row.get(column)) for column in columns)} |" for row in section["rows"]]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    return "" if value is None else str(value).replace("|", "\\|")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheels", type=Path, help="folder of wheels for packages the machine lacks")
    parser.add_argument("--cpu", action="store_true", help="leave the GPU alone; implied where there is none")
    parser.add_argument("--seconds", type=float, default=450.0, help="time for all sections together")
    parser.add_argument("--only", help="sections to run, separated by commas")
    parser.add_argument("--opts", help="opts to check, separated by commas; all installed ones by default")
    parser.add_argument("--workloads", help="the same for workloads")
    parser.add_argument("--jobs", type=int, help="runs at a time, where nothing is timed")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "gpu_check", help="where to write, less .json")
    given = parser.parse_args()
    chosen = given.only.split(",") if given.only else list(SECTIONS)
    if unknown := set(chosen) - SECTIONS.keys():
        parser.error(f"no such section: {', '.join(sorted(unknown))}; expected some of {', '.join(SECTIONS)}")

    with tempfile.TemporaryDirectory(prefix="gpu_check-site-") as folder:
        paths = [str(path) for path in make_site(Path(folder), given.wheels)]
        sys.path += paths
        os.environ["PYTHONPATH"] = os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])
        import torch

        from core.compose.discovery import discover

        registry = discover()
        names = given.opts.split(",") if given.opts else [n for n in registry.names("opt") if n not in PROBES]
        opts, problems = load_specs(registry, names)
        workloads = given.workloads.split(",") if given.workloads else registry.names("workload")
        device = "cuda" if torch.cuda.is_available() and not given.cpu else "cpu"
        jobs = given.jobs or (8 if device == "cuda" else 1)
        check = Check(device=device, opts=opts, workloads=workloads, jobs=jobs)
        report: dict[str, Any] = {"system": describe(["python", *sys.argv]), "problems": problems, "sections": {}}
        given.out.parent.mkdir(parents=True, exist_ok=True)
        start, share = time.monotonic(), 0.0
        total = sum(SHARES[name] for name in chosen)
        for name in (name for name in SECTIONS if name in chosen):
            share += SHARES[name] / total
            left = start + share * given.seconds - time.monotonic()
            report["sections"][name] = section = run_section(name, check, left)
            print(f"{name}: {section['status']}, {len(section['rows'])} rows", flush=True)
            given.out.with_suffix(".json").write_text(json.dumps(report, indent=1))
            given.out.with_suffix(".md").write_text(markdown(report))
    print(given.out.with_suffix(".md"))
    for line in broken(report):
        print(f"BROKEN {line}")
    return 1 if broken(report) else 0


if __name__ == "__main__":
    sys.exit(main())
