"""A resolved plan becomes a run folder, processes and, when they have ended, one result and one exit status."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from core.api.config import RunConfig
from core.api.errors import EXIT_CODES, TimetrialError, UsageError
from core.api.files import read_json
from core.api.types import Job, Launcher, Ranks
from core.compose.manager import plugin_manager
from core.compose.plan import RunPlan, core_hash, new_run_name
from core.state.record import software, update_result, utc, write_failure


def launch(plan: RunPlan, *, isolate: bool = False) -> tuple[Path, int]:
    """Runs the plan to its end. Returns run folder and exit status. `isolate` gives one rank, too, its own process."""
    config, before = plan.root, dict(os.environ)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = max(1, cores // plan.ranks_per_node)
    if int(os.environ.get("RANK", 0)) == 0:  # under an outer launcher, rank 0 makes the folder and tells the others
        plan = _prepare(plan, config)
    ours = {"OMP_NUM_THREADS": str(threads), **config.launch.environment, **plan.environment}
    os.environ.update({**ours, **before})  # a variable that the user has set wins
    try:
        code = _run_here(plan) if "RANK" in os.environ else _start(plan, isolate)
    finally:  # for the next job of a sweep
        os.environ.clear()
        os.environ.update(before)
    run_dir = Path(plan.run_dir)
    return run_dir, _settle(run_dir, code) if plan.run_dir else code


def _start(plan: RunPlan, isolate: bool) -> int:
    """The ranks, by the chosen launcher."""
    manager = plugin_manager([plan.launcher], plan.config)
    (launcher,) = manager.get_plugins()
    assert isinstance(launcher, Launcher)
    here = plan.world_size == 1 and not isolate
    job = Job(
        run_dir=Path(plan.run_dir),
        ranks=Ranks(world_size=plan.world_size, per_node=plan.ranks_per_node),
        command=(sys.executable, "-u", "-m", "core.engine.worker", plan.run_dir),
        run_here=(lambda: _run_here(plan)) if here else None,
    )
    return launcher.launch(job)


def _run_here(plan: RunPlan) -> int:
    from core.engine.worker import run_rank  # imports torch

    return run_rank(plan)


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
        started_at = read_json(run_dir / "result.json").get("started_at", utc())
        update_result(
            run_dir, status="running", started_at=started_at, ended_at=None, time_to_train_s=None, error=None,
            command=[sys.executable, *sys.argv], workload=plan.workload, seed=plan.seed, world_size=plan.world_size,
            mesh={d.name: d.size for d in plan.dimensions}, plan_hash=plan.hash(), core_hash=core_hash(),
            plugins=[asdict(p) for p in plan.plugins], trackers=[asdict(p) for p in plan.trackers],
            launcher=asdict(plan.launcher), changed=plan.changed, deterministic=config.deterministic,
            software=software(), hostname=platform.node() if config.record_hostname else None,
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
    if [p.name for p in new.plugins] != [p.name for p in old.plugins]:
        keys.append(f"the plugins ({' '.join(p.name for p in old.plugins)} to {' '.join(p.name for p in new.plugins)})")
    code = [plugin.name for plugin in new.plugins if plugin not in old.plugins]
    return ", ".join(keys[:3]) or f"the code of {', '.join(code) or 'core'}"


def _flat(tree: Any, key: str = "") -> dict[str, Any]:
    """The leaves of nested dicts, by dotted key."""
    if not isinstance(tree, dict):
        return {key: tree}
    return {k: v for name, item in tree.items() for k, v in _flat(item, f"{key}.{name}".lstrip(".")).items()}


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
