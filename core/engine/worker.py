"""One rank of a run: it builds everything from the plan in a fixed order, runs the loop, and writes down the result.

environment -> backend -> mesh -> workload -> model -> distribution -> optimizer -> layout -> step -> warm-up
| clock starts | loop | clock stops | verify -> record
"""

from __future__ import annotations

import functools
import gc
import os
import sys
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from core.api import faults
from core.api.errors import EXIT_CODES, OutOfMemoryError, TimetrialError, UsageError
from core.api.files import write_json
from core.api.generators import generator_states, set_generator_states
from core.api.mesh import Mesh
from core.api.types import Evidence, Plugin, RunContext
from core.compose.manager import plugin_manager
from core.compose.plan import RunPlan
from core.engine import sidecar
from core.engine.build import Baseline, batches, build_for_training
from core.engine.loop import train
from core.engine.watch import Signals, Watch
from core.state import checkpoint
from core.state.record import Metrics, describe_system, software, update_result, utc


def run_rank(plan: RunPlan) -> int:
    """Runs this rank to its end and returns its exit status. A failure is left in `errors/rank<k>.json`."""
    signals, rank = Signals(), None
    try:
        rank = _Rank(plan, signals)
        return EXIT_CODES[rank.run()]
    except Exception as error:
        failure = _explain(error, plan, rank)
        run_dir = rank.ctx.run_dir if rank else Path(plan.run_dir)
        if run_dir == Path():  # a rank of an outer launcher that has not heard from rank 0
            return failure.show()
        number = int(os.environ.get("RANK", 0))
        path = run_dir / "errors" / f"rank{number}.json"
        path.parent.mkdir(exist_ok=True)
        path.with_suffix(".traceback.txt").write_text(traceback.format_exc())
        write_json(path, {"rank": number, **failure.as_dict(), "time": time.time()})
        if rank is not None and rank.opened:
            rank.hooks.on_run(ctx=rank.ctx, event="failed", status=failure.kind)
        return failure.exit_code


def _explain(error: Exception, plan: RunPlan, rank: _Rank | None) -> TimetrialError:
    """Any error as one that a user can act on."""
    if isinstance(error, TimetrialError):
        return error
    if isinstance(error, torch.OutOfMemoryError):
        peak, size = torch.accelerator.max_memory_allocated(), plan.config["workload"].get("global_batch_size")
        what = f"out of memory (peak {peak / 2**30:.1f} GiB, global batch size {size})"
        return OutOfMemoryError(f"{what}: use a smaller global batch size")
    step = rank.ctx.position.step if rank else None
    return TimetrialError(f"{type(error).__name__}: {error}"[:500], step=step)


class _Rank:
    """The state of one rank, in the order in which it is set up: join, open, build, (restore), race, finish."""

    def __init__(self, plan: RunPlan, signals: Signals) -> None:
        self.plan, self.signals, self.opened = plan, signals, False
        manager = plugin_manager([*plan.plugins, *plan.trackers], plan.config, [Baseline()])
        self.hooks: Any = manager.hook
        self.plugins = {name: p for name, p in manager.list_name_plugin() if isinstance(p, Plugin)}
        self.ctx = RunContext(
            config=plan.root, run_dir=Path(plan.run_dir), seed=plan.seed, ranks_per_node=plan.ranks_per_node
        )

    def run(self) -> str:
        """Returns the status that the run ends with."""
        self.ctx.backend = self.hooks.init_backend(ctx=self.ctx)
        try:
            saved = self._open()
            self._build()
            if saved is not None:
                self._restore(*saved)
            return self._race()
        finally:
            self.ctx.backend.shutdown()

    def _open(self) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """Opens the run folder, as it was at the checkpoint that the run continues from, which is returned."""
        ctx = self.ctx
        # Every rank follows rank 0: under an outer launcher each has composed its own plan.
        plan: RunPlan = ctx.backend.broadcast(self.plan)
        if self.plan.hash() != plan.hash():
            raise UsageError(
                f"rank {ctx.rank} has a different plan than rank 0: start all ranks with the same command and code"
            )
        self.plan = plan
        ctx.config, ctx.run_dir, ctx.seed = plan.root, Path(plan.run_dir), plan.seed
        ctx.mesh = Mesh(plan.dimensions, ctx.rank)
        ctx.start_sidecar = functools.partial(sidecar.start, ctx, plan)
        keep = ctx.config.checkpoint.keep
        self.checkpoints = checkpoint.Checkpointer(ctx.run_dir / "checkpoints", ctx.backend, keep)
        saved = self.checkpoints.load(Path(plan.resume_from, "checkpoints")) if plan.resume_from else None
        self.same_folder = plan.resume_from == plan.run_dir
        self.restarts = plan.restarts if saved else 0  # what stopped before its first checkpoint starts anew
        self.scored = not ctx.synthetic and not plan.changed and (not self.restarts or ctx.config.score_restarts)
        continues = saved is not None and self.same_folder
        self.metrics = Metrics(ctx.run_dir, ctx.rank == 0, saved[0]["metrics"] if saved and continues else 0)
        if ctx.rank == 0:
            system = describe_system(ctx.config.submission, ctx.world_size, ctx.ranks_per_node)
            write_json(ctx.run_dir / "system.json", system)
            update_result(ctx.run_dir, restarts=self.restarts, software=software())
        if saved and continues:  # a tracker's own log is cut back before it writes on
            self._load_plugins(saved[1], "tracker ")
        self.hooks.on_run(ctx=ctx, event="init", status="running")
        self.opened = True
        return saved

    def _build(self) -> None:
        """Everything from the workload to the composed step, warmed up: the loop can run."""
        ctx = self.ctx
        # Dropout and its like draw from torch's process-wide generator. Ranks that share their data share its draws.
        torch.manual_seed(ctx.seed_for("torch", ctx.data_rank))
        # Not use_deterministic_algorithms: it sets the same switch, but imports the compiler first, for seconds.
        torch.set_deterministic_debug_mode("error" if ctx.config.deterministic else "default")
        # Filling fresh memory would cost time and hide nothing: no kernel here reads what it has not written.
        torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
        step = build_for_training(ctx, self.plan, self.hooks)
        self.step = faults.in_step(step, ctx.position, ctx.rank)
        self.warm_evidence: list[Evidence] = self.hooks.verify(ctx=ctx)
        self.watch = Watch(ctx, self.metrics, self.hooks, self.signals, self._save)

    def _race(self) -> str:
        """Starts the clock, trains, stops the clock and writes the result."""
        ctx, watch = self.ctx, self.watch
        gc.freeze()  # what has been built lives to the end: no collection in the loop need look through it
        gc.enable()
        ctx.backend.all_gather([0.0])  # every rank is ready: the clock starts for all
        self.hooks.on_run(ctx=ctx, event="start", status="running")
        watch.begin()
        try:
            road = functools.partial(batches, ctx)
            status = train(ctx, watch, self.step, road, None if ctx.synthetic else ctx.evaluate)
            ctx.backend.synchronize()
            clock_s, ended_at = watch.seconds(), time.time()
            self.hooks.on_run(ctx=ctx, event="stop", status=status)
        finally:
            watch.progress.close()
        evidence: list[Evidence] = self.hooks.verify(ctx=ctx)
        if ctx.config.checkpoint.at_end and status != "stopped":
            watch.save()
        parameters = checkpoint.parameters_hash(ctx.layout.model_state())
        if ctx.rank == 0:
            self._write_result(status, clock_s, ended_at, evidence, parameters)
        return status

    def _write_result(
        self, status: str, clock_s: float, ended_at: float, evidence: list[Evidence], parameters: str
    ) -> None:
        ctx, watch, position = self.ctx, self.watch, self.ctx.position
        stages = {"warm_up": self.warm_evidence, "end": evidence}
        write_json(ctx.run_dir / "evidence.json", {k: [asdict(e) for e in stage] for k, stage in stages.items()})
        # The clock never pauses: a resumed run that is to be scored counts the time in between as well.
        time_to_train = ended_at - watch.started_at if self.restarts else clock_s
        result = update_result(
            ctx.run_dir, status=status, scored=self.scored, ended_at=utc(ended_at), wall_s=clock_s,
            time_to_train_s=time_to_train if status == "success" and self.scored else None, quality=watch.quality,
            targets={
                t.metric: {"value": t.value, "higher_is_better": t.higher_is_better} for t in ctx.workload.targets
            },
            samples=position.samples, steps=position.step, epochs=position.epochs_done,
            samples_per_s=position.samples / watch.train_seconds if watch.train_seconds else None,
            evidence={e.plugin: {"active": e.active, "summary": e.summary} for e in evidence}, figures=ctx.figures,
            parameters_sha256=parameters,
            system={"file": "system.json", "threads": torch.get_num_threads(), "device": str(ctx.device)},
        )  # fmt: skip
        names = ("result.json", "metrics.jsonl", "evidence.json", "system.json", "resolved.yaml", "checkpoints")
        artifacts = {name: path for name in names if (path := ctx.run_dir / name).exists()}
        self.hooks.on_record(ctx=ctx, result=result, artifacts=artifacts)

    def _save(self) -> None:
        """Writes a checkpoint: what is the same on all ranks, and what is this rank's own."""
        ctx = self.ctx
        layout = {"model": ctx.layout.model_state(), "optimizer": ctx.layout.optimizer_state()}
        local = {
            "generators": generator_states(ctx.device),
            "workload": ctx.workload.state_dict(),
            "plugins": {name: plugin.state_dict() for name, plugin in self.plugins.items()},
            "buffers": dict(ctx.model.named_buffers()),  # running statistics differ from rank to rank
        }
        self.checkpoints.save(ctx.position.step, {**layout, **self.watch.state_dict()}, local)

    def _restore(self, shared: dict[str, Any], local: dict[str, Any]) -> None:
        self.ctx.layout.load_model_state(shared["model"])
        self.ctx.layout.load_optimizer_state(shared["optimizer"])
        self.watch.load_state_dict(shared, self.same_folder)
        self.ctx.workload.load_state_dict(local["workload"])
        self._load_plugins(local, "backend ", "opt ", "workload ")
        for name, buffer in self.ctx.model.named_buffers():
            buffer.copy_(local["buffers"][name])
        set_generator_states(self.ctx.device, local["generators"])

    def _load_plugins(self, local: dict[str, Any], *kinds: str) -> None:
        for name, plugin in self.plugins.items():
            if name.startswith(kinds):
                plugin.load_state_dict(local["plugins"].get(name, {}))


def main() -> int:
    """A process started by a launcher: `python -m core.engine.worker RUN_DIR`."""
    run_dir = Path(sys.argv[1])
    code = run_rank(RunPlan.load(run_dir / "resolved.yaml"))
    # A run that came to an end, whatever its status, exits with 0: at any other the launcher stops the other ranks.
    return code if any((run_dir / "errors").glob("rank*")) else 0


if __name__ == "__main__":
    sys.exit(main())
