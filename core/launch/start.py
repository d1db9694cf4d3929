"""A resolved plan becomes worker processes and, when they have ended, one result and one exit status.

One rank runs in place, to be debuggable, as does a rank of an outer torchrun; torch.distributed.run starts several.
"""

import logging
import os
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil

from core.api.config import RunConfig
from core.api.errors import EXIT_CODES, TimetrialError, UsageError
from core.compose.resolve import RunPlan
from core.state.record import new_run_name, read_json, update_result, write_failure, write_json


def launch(plan: RunPlan, *, isolate: bool = False) -> tuple[Path, int]:
    """Runs the plan to its end. Returns run folder and exit status. `isolate` gives one rank, too, its own process."""
    config, before = plan.root(), dict(os.environ)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", config.launch.nproc)))
    if int(os.environ.get("RANK", 0)) == 0:  # under an outer launcher, rank 0 makes the folder and tells the others
        plan = _prepare(plan, config)
    ours = {"OMP_NUM_THREADS": str(threads), **config.launch.environment, **plan.environment}
    os.environ.update({**ours, **before})  # a variable that the user has set wins
    try:
        if "RANK" in os.environ or (plan.world_size == 1 and not isolate):
            from core.engine.worker import run_rank  # imports torch

            code = run_rank(plan)
        else:
            code = _elastic(plan)
    finally:  # for the next job of a sweep
        os.environ.clear()
        os.environ.update(before)
    run_dir = Path(plan.run_dir)
    return run_dir, _settle(run_dir, code) if plan.run_dir else code


def _prepare(plan: RunPlan, config: RunConfig) -> RunPlan:
    """Makes the run folder, or finds the run to continue in it, and writes down the plan."""
    try:
        run_dir = Path(config.run_dir or Path("runs", new_run_name(plan.workload))).absolute()
        run_dir.mkdir(parents=True, exist_ok=config.run_dir is not None)
        previous = run_dir if (run_dir / "resolved.yaml").exists() else None
        if previous is None and any(run_dir.iterdir()):
            raise UsageError(f"run_dir={config.run_dir} holds other files; name a new or an empty folder")
        if config.resume not in ("auto", "never"):
            previous = Path(config.resume).absolute()
            if not (previous / "resolved.yaml").exists():
                raise UsageError(f"resume={config.resume} is not a run folder; expected auto, never or a run folder")
        plan = replace(plan, run_dir=str(run_dir))
        if previous is not None:
            plan = _continue(plan, config, run_dir, previous)
        plan.save(run_dir / "resolved.yaml")
        shutil.rmtree(run_dir / "errors", ignore_errors=True)
        update_result(
            run_dir, status="running", time_to_train_s=None, error=None, command=[sys.executable, *sys.argv],
            workload=plan.workload, seed=plan.seed, world_size=plan.world_size, plan_hash=plan.hash(),
            plugins=[asdict(p) for p in plan.plugins], changed=plan.changed, deterministic=config.deterministic,
        )  # fmt: skip
    except OSError as error:
        problem = f"cannot write the run folder {error.filename}: {error.strerror}"
        raise TimetrialError(f"{problem}; choose another run_dir") from None
    return plan


def _continue(plan: RunPlan, config: RunConfig, run_dir: Path, previous: Path) -> RunPlan:
    """The run in `previous`, carried on by `plan`. UsageError where that may not be."""
    result, old = read_json(previous / "result.json"), RunPlan.load(previous / "resolved.yaml")
    if previous == run_dir and config.resume == "never":
        raise UsageError(f"{run_dir} already holds a run, and resume=never; choose another run_dir")
    if previous == run_dir and result.get("status") in ("success", "throughput"):
        raise UsageError(f"the run in {run_dir} is complete ({result['status']}); choose another run_dir")
    changed = plan.hash() != old.hash()
    if changed and not config.resume_changed:
        what = f"cannot continue {previous}: {_difference(old, plan)} changed; give the same command"
        raise UsageError(f"{what}, another run_dir, or resume_changed=true (the run is then not scored)")
    seed = old.seed if config.seed == "clock" else plan.seed
    restarts, changed = result.get("restarts", 0) + 1, changed or result.get("changed", False)
    return replace(plan, seed=seed, resume_from=str(previous), restarts=restarts, changed=changed)


def _difference(old: RunPlan, new: RunPlan) -> str:
    """The first things that differ between two plans, in words."""
    if old.world_size != new.world_size:
        return f"the world size ({old.world_size} to {new.world_size})"
    was, now = _flat(old.settings()), _flat(new.settings())
    keys = [f"{k} ({was.get(k)} to {now.get(k)})" for k in sorted(was | now) if was.get(k) != now.get(k)]
    code = [plugin.name for plugin in new.plugins if plugin not in old.plugins]
    return ", ".join(keys[:3]) or f"the code of {', '.join(code) or 'core'}"


def _flat(tree: Any, key: str = "") -> dict[str, Any]:
    """The leaves of nested dicts, by dotted key."""
    if not isinstance(tree, dict):
        return {key: tree}
    return {k: v for name, item in tree.items() for k, v in _flat(item, f"{key}.{name}".lstrip(".")).items()}


def _elastic(plan: RunPlan) -> int:
    """The ranks of this machine under torch.distributed.run; its agent runs in this process and handles signals."""
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the cause is ours to print, in one line
    arguments = ["--standalone", f"--nproc-per-node={plan.world_size}", "--max-restarts=0"]
    try:
        torchrun.run(torchrun.parse_args([*arguments, "-m", "core.engine.worker", plan.run_dir]))
        return 0
    except SignalException:
        return EXIT_CODES["stopped"]
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        path = Path(plan.run_dir, "errors", f"rank{rank}.json")
        if failure.exitcode < 0 and not path.exists():  # a rank that a signal killed could not say so itself
            path.parent.mkdir(exist_ok=True)
            cause = f"rank {rank} was killed by {failure.signal_name()}"
            killed = TimetrialError(f"{cause}; the same command resumes from the last checkpoint", rank=rank)
            write_json(path, {**killed.as_dict(), "kind": "killed", "time": 0.0})  # it came first
        return EXIT_CODES["failed"]
    finally:
        for child in psutil.Process().children(recursive=True):
            child.kill()


def _settle(run_dir: Path, code: int) -> int:
    """Makes sure that result.json states how the run ended; returns the exit status that fits."""
    errors = [read_json(path) for path in (run_dir / "errors").glob("rank*.json")]
    if errors:
        first = min(errors, key=lambda e: e["time"])  # the others only noticed that a rank was gone
        write_failure(run_dir, first)
        return int(first["exit_code"])
    status = read_json(run_dir / "result.json").get("status", "running")
    if status != "running":
        return EXIT_CODES[status]
    write_failure(run_dir, {"kind": "killed", "message": f"the worker ended without a result (exit status {code})"})
    return EXIT_CODES["failed"]
