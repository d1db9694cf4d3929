"""A resolved plan becomes worker processes and, when they have ended, one result and one exit status.

One rank runs in place, which keeps it debuggable. More ranks are started by torch.distributed.run. Where an outer
torchrun has already started this process as a rank, it runs in place as well.
"""

from __future__ import annotations

import datetime
import json
import logging
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from core.config import RunConfig, flatten
from core.errors import EXIT_FAILED, EXIT_STOPPED, TimetrialError, UsageError
from core.record import EXIT_CODES, read_result, update_result, write_failure, write_json
from core.resolve import RUN_KEYS, Attempt, RunPlan


def launch(plan: RunPlan, *, isolate: bool = False, trace_hooks: bool = False) -> tuple[Path, int]:
    """Runs the plan to its end. Returns the run folder and the exit status.

    `isolate` starts even a single rank as a process of its own (each job of a sweep gets a fresh interpreter).
    """
    config = plan.root()
    if int(os.environ.get("RANK", 0)) > 0:  # rank 0 of the outer launcher makes the folder and tells the others
        return Path(), _in_place(plan, Attempt(run_dir="", trace_hooks=trace_hooks))
    plan, attempt = _prepare(plan, config, trace_hooks)
    run_dir = Path(attempt.run_dir)
    with _environment(plan, config):
        if "RANK" in os.environ or (plan.world_size == 1 and not isolate):
            code = _in_place(plan, attempt)
        elif plan.world_size == 1:
            code = _one_process(attempt)
        else:
            code = _elastic(plan, attempt)
    return run_dir, _settle(run_dir, code)


def _prepare(plan: RunPlan, config: RunConfig, trace_hooks: bool) -> tuple[RunPlan, Attempt]:
    """The run folder: a new one, or one with a run to continue."""
    try:
        if config.run_dir is None:
            run_dir, previous = _new_folder(plan.workload), None
        else:
            run_dir = Path(config.run_dir).absolute()
            run_dir.mkdir(parents=True, exist_ok=True)
            previous = run_dir if (run_dir / "resolved.yaml").exists() else None
            if previous is None and any(run_dir.iterdir()):
                raise UsageError(f"run_dir={config.run_dir} holds other files; name a new or an empty folder")
        probe = run_dir / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise TimetrialError(
            f"cannot write the run folder {error.filename}: {error.strerror}; choose another run_dir"
        ) from None
    if config.resume not in ("auto", "never"):
        previous = Path(config.resume).absolute()
        if not (previous / "resolved.yaml").exists():
            raise UsageError(f"resume={config.resume} is not a run folder; expected auto, never or a run folder")
    restarts, changed = 0, False
    if previous is not None:
        plan, changed = _continue(plan, config, run_dir, previous)
        restarts = int(read_result(previous).get("restarts", 0)) + 1
    plan.save(run_dir / "resolved.yaml")
    for stale in (run_dir / "errors").glob("rank*"):
        stale.unlink()
    update_result(run_dir, status="running", time_to_train_s=None, error=None, command=[sys.executable, *sys.argv])
    return plan, Attempt(str(run_dir), str(previous) if previous else None, restarts, changed, trace_hooks)


def _continue(plan: RunPlan, config: RunConfig, run_dir: Path, previous: Path) -> tuple[RunPlan, bool]:
    """Whether `plan` may continue the run in `previous`, and whether it differs from it."""
    result = read_result(previous)
    if previous == run_dir and config.resume == "never":
        raise UsageError(f"{run_dir} already holds a run, and resume=never; choose another run_dir")
    if previous == run_dir and result.get("status") in ("success", "throughput"):
        raise UsageError(f"the run in {run_dir} is complete ({result['status']}); choose another run_dir")
    old = RunPlan.load(previous / "resolved.yaml")
    if config.seed == "clock":
        plan = RunPlan(plan.config, plan.plugins, old.seed, plan.world_size, plan.environment)
    changed = plan.hash() != old.hash() or bool(result.get("changed"))
    if plan.hash() != old.hash() and not config.resume_changed:
        raise UsageError(
            f"cannot continue {previous}: {_difference(old, plan)} changed; give the same command, choose another "
            "run_dir, or add resume_changed=true (the run is then not scored)"
        )
    return plan, changed


def _difference(old: RunPlan, new: RunPlan) -> str:
    """The first things that differ between two plans, in words."""
    if old.world_size != new.world_size:
        return f"the world size ({old.world_size} to {new.world_size})"
    before, after = flatten(old.config), flatten(new.config)
    keys = sorted(k for k in before.keys() | after.keys() if before.get(k) != after.get(k))
    keys = [k for k in keys if k.partition(".")[0] not in RUN_KEYS]
    if keys:
        return ", ".join(f"{k} ({before.get(k)} to {after.get(k)})" for k in keys[:3])
    return "the code of " + ", ".join(p.name for p in new.plugins if p not in old.plugins)


def _new_folder(workload: str) -> Path:
    """runs/<date>-<time>-<workload>-<id>: unique even for two runs that start in the same second."""
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    while True:
        folder = Path("runs", f"{stamp}-{workload}-{secrets.token_hex(2)}").absolute()
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue


@contextmanager
def _environment(plan: RunPlan, config: RunConfig) -> Iterator[None]:
    """Variables for the workers. A variable that the user has set wins; all are put back afterwards, for sweeps."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ours = {
        "OMP_NUM_THREADS": str(max(1, cores // config.launch.nproc)),
        # Threads that wait by spinning stall each other where cores are shared: resnet fell from 1,000 to 80 samples/s.
        "OMP_WAIT_POLICY": "PASSIVE",
        # Without it elastic restarts hung or exhausted their attempts in part of the cases (pytorch #135712, #167288).
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        **plan.environment,
    }
    before = dict(os.environ)
    os.environ.update({key: value for key, value in ours.items() if key not in before})
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _in_place(plan: RunPlan, attempt: Attempt) -> int:
    from core.worker import run_rank  # imports torch

    return run_rank(plan, attempt)


def _one_process(attempt: Attempt) -> int:
    """A single rank in a process of its own. A terminal's Ctrl-C reaches it directly, so here it is only waited for."""
    process = subprocess.Popen([sys.executable, "-m", "core.worker", attempt.to_json()])
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue


def _elastic(plan: RunPlan, attempt: Attempt) -> int:
    """The ranks of this machine under torch.distributed.run; its agent runs in this process and handles signals."""
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the cause is ours to print, in one line
    arguments = ["--standalone", f"--nproc-per-node={plan.world_size}", "--max-restarts=0"]
    try:
        torchrun.run(torchrun.parse_args([*arguments, "-m", "core.worker", attempt.to_json()]))
        return 0
    except SignalException:
        return EXIT_STOPPED
    except ChildFailedError as error:
        _note_killed(Path(attempt.run_dir), *error.get_first_failure())
        return EXIT_FAILED
    finally:
        for child in psutil.Process().children(recursive=True):
            child.kill()


def _note_killed(run_dir: Path, rank: int, failure: Any) -> None:
    """A rank that a signal killed could not say so itself; the launcher saw it first."""
    path = run_dir / "errors" / f"rank{rank}.json"
    if failure.exitcode < 0 and not path.exists():
        path.parent.mkdir(exist_ok=True)
        message = f"rank {rank} was killed by {failure.signal_name()}; the same command resumes from the last checkpoint"
        write_json(path, {"kind": "killed", "message": message, "rank": rank, "exit_code": EXIT_FAILED, "time": 0.0})


def _settle(run_dir: Path, code: int) -> int:
    """Makes sure that result.json states how the run ended; returns the exit status that fits."""
    if not run_dir.is_dir():
        return code
    errors = [json.loads(path.read_text()) for path in (run_dir / "errors").glob("rank*.json")]
    if errors:
        first = min(errors, key=lambda e: e["time"])  # the others only noticed that a rank was gone
        write_failure(run_dir, first)
        return int(first["exit_code"])
    status = read_result(run_dir).get("status", "running")
    if status != "running":
        return EXIT_CODES[status]
    cause = f"signal {-code}" if code < 0 else f"exit status {code}"
    write_failure(run_dir, {"kind": "killed", "message": f"the worker ended without a result ({cause})", "rank": 0})
    return EXIT_FAILED


def summary(run_dir: Path) -> str:
    """The one line that a run ends with."""
    result = read_result(run_dir)
    status, where = result.get("status"), os.path.relpath(run_dir)
    if result.get("error"):
        return f"{status}: {result['error']['message']} [{where}]"
    quality = ", ".join(
        f"{k} {v:.4f} (target {result['target'][k]:g})" for k, v in result["quality"].items() if k in result["target"]
    )
    doubts = [f"{name}: {e['summary']}" for name, e in result["evidence"].items() if not e["active"]]
    words = f"; NO EVIDENCE for {'; '.join(doubts)}" if doubts else ""
    work = f"{result['steps']:,} steps, {result['samples_per_s'] or 0:,.0f} samples/s"
    if status == "success" and result["time_to_train_s"] is not None:
        head = f"success: time to train {result['time_to_train_s']:.1f} s, {quality}"
    elif status == "success":
        head = f"success, not scored ({'resumed' if result['restarts'] else 'changed'}): {quality}"
    elif status == "stopped":
        again = f"the same command with run_dir={where} resumes"
        head = f"stopped after step {result['steps']:,} with a checkpoint; {again}"
    elif status == "throughput":
        head = "throughput on synthetic data"
    else:
        head = f"not converged: {quality or 'never evaluated'}"
    return f"{head}; {work}{words} [{where}]"
