"""One rank of a run: builds everything from the plan in a fixed order, runs the loop, and writes down what happened.

environment (already set) -> backend -> workload -> model -> distribute -> optimizer -> step -> warm-up
| clock starts | loop | clock stops | verify -> record
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from mlperf_logging.mllog import constants
from torch.utils import _pytree as pytree

from core.checkpoint import (
    Checkpointer,
    Saved,
    gathered,
    generator_states,
    parameters_hash,
    scattered,
    set_generator_states,
)
from core.errors import EXIT_SUCCESS, OutOfMemoryError, PluginError, TimetrialError, UsageError
from core.hookspecs import hookimpl
from core.loop import Race, train
from core.record import EXIT_CODES, Record, write_json
from core.resolve import Attempt, RunPlan, plugin_manager
from core.system import describe_system
from core.testing import faults
from core.types import Batch, Evidence, Forward, OptSpec, Outputs, Plugin, Position, RunContext, Step, StepParts
from core.watch import Clock, Signals, Watch


class Baseline:
    """Core's own implementations: the innermost layer of every onion, which adds no trick."""

    prepare_model = hookimpl(lambda self, model: model)
    make_optimizer = hookimpl(lambda self, ctx, model: ctx.workload.build_optimizer(model))
    wrap_batches = hookimpl(lambda self, batches: batches)
    component = hookimpl(lambda self, default: default)
    build_step = hookimpl(lambda self, parts: parts)
    wrap_step = hookimpl(lambda self, step: step)
    wrap_evaluate = hookimpl(lambda self, evaluate: evaluate)


def run_rank(plan: RunPlan, attempt: Attempt) -> int:
    """Runs this rank to its end and returns its exit status. A failure is left in `errors/rank<k>.json`."""
    signals, position = Signals(), Position()
    try:
        return EXIT_CODES[_Rank(plan, attempt, signals, position).run()]
    except Exception as error:
        if isinstance(error, torch.OutOfMemoryError):
            peak = torch.get_device_module().max_memory_allocated() / 2**30
            error = OutOfMemoryError(f"out of memory (peak {peak:.1f} GiB): use a smaller global batch size")
        elif not isinstance(error, TimetrialError):
            error = TimetrialError(f"{type(error).__name__}: {error}"[:500], step=position.step)
        rank, folder = int(os.environ.get("RANK", 0)), Path(attempt.run_dir) / "errors"
        if folder.parent.is_dir():
            folder.mkdir(exist_ok=True)
            (folder / f"rank{rank}.traceback.txt").write_text(traceback.format_exc())
            write_json(folder / f"rank{rank}.json", {"rank": rank, **error.as_dict(), "time": time.time()})
        return error.exit_code
    finally:
        signals.restore()


class _Rank:
    """The state of one rank, in the order in which it comes to be: join, build, (restore), race, finish."""

    def __init__(self, plan: RunPlan, attempt: Attempt, signals: Signals, position: Position) -> None:
        self.plan, self.attempt, self.signals, self.position = plan, attempt, signals, position
        self.manager = plugin_manager(plan, [Baseline()])
        self.hooks = self.manager.hook
        self.ctx = RunContext(config=plan.root(), run_dir=Path(attempt.run_dir), seed=plan.seed)
        self.ctx.nproc_per_node = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        self.evidence: dict[str, list[Evidence]] = {}

    def run(self) -> str:
        """Returns the status that the run ends with."""
        ctx = self.ctx
        ctx.backend = self.hooks.init_backend(ctx=ctx)
        try:
            self._agree()
            saved = self._open()
            race = self._build()
            if saved is not None:
                self._restore(race, saved)
            return self._race(race)
        finally:
            ctx.backend.shutdown()

    def _agree(self) -> None:
        """Every rank runs rank 0's plan, seed and attempt: under an outer launcher each rank has composed its own."""
        ctx, plan_hash = self.ctx, self.plan.hash()
        attempt, ctx.seed, theirs = ctx.backend.broadcast([asdict(self.attempt), self.plan.seed, plan_hash])
        if theirs != plan_hash:
            raise UsageError(f"rank {ctx.rank} has another plan than rank 0: give every rank the same command and code")
        self.attempt = Attempt(**attempt)
        ctx.run_dir = Path(self.attempt.run_dir)

    def _open(self) -> Saved | None:
        """Opens the logs, cut back to the checkpoint that the run continues from, which is returned."""
        ctx, attempt, plan = self.ctx, self.attempt, self.plan
        self.checkpointer = Checkpointer(ctx.run_dir / "checkpoints", ctx.backend, ctx.config.checkpoint.keep)
        source = Path(attempt.resume_from or "") / "checkpoints"
        saved = Checkpointer(source, ctx.backend, keep=2).load() if attempt.resume_from else None
        self.same_run = attempt.resume_from == attempt.run_dir
        self.record = Record(ctx.run_dir, ctx.rank == 0, saved.shared["logs"] if saved and self.same_run else None)
        self.restarts = attempt.restarts if saved else 0  # what stopped before its first checkpoint starts anew
        self.scored = not ctx.synthetic and not attempt.changed and (not self.restarts or ctx.config.score_restarts)
        self.record.result(
            workload=plan.workload, seed=ctx.seed, world_size=ctx.world_size, plan_hash=plan.hash(),
            plugins=[asdict(p) for p in plan.plugins], restarts=self.restarts, changed=attempt.changed,
            deterministic=ctx.config.deterministic,
        )  # fmt: skip
        self.record.init_start()
        return saved

    def _build(self) -> Race:
        """Everything from the workload to the composed step, warmed up."""
        ctx, hooks = self.ctx, self.hooks
        # Dropout and its like draw from torch's process-wide generator, which differs from rank to rank.
        torch.manual_seed(ctx.seed_for("torch", ctx.rank))
        # Not use_deterministic_algorithms: it sets the same switch, but imports the compiler first, for seconds.
        torch.set_deterministic_debug_mode("error" if ctx.config.deterministic else "default")
        # Filling fresh memory would cost time and hide nothing: no kernel here reads what it has not written.
        torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]

        ctx.workload = hooks.make_workload(ctx=ctx)
        if not ctx.synthetic:
            ctx.workload.check_data()
        offered: set[str] = set()

        def component(name: str, default: Any) -> Any:
            offered.add(name)
            return hooks.component(ctx=ctx, name=name, default=default)

        ctx.component = component
        ctx.feed = component("feed", lambda items: (to_device(item, ctx.device) for item in items))
        ctx.model = ctx.workload.build_model().to(ctx.device)
        prepared = hooks.prepare_model(ctx=ctx, model=ctx.model)
        ctx.distributed_model = hooks.distribute(ctx=ctx, model=prepared)
        exchange = hooks.communication_hook(ctx=ctx, model=ctx.distributed_model)
        if exchange is not None:
            ctx.distributed_model.register_comm_hook(*exchange)  # pyright: ignore[reportCallIssue]
        ctx.optimizer = hooks.make_optimizer(ctx=ctx, model=ctx.model)
        forward_backward, step, infer = _build_steps(ctx, hooks, prepared)
        evaluate = hooks.wrap_evaluate(ctx=ctx, evaluate=ctx.workload.evaluate)
        _refuse_unused(self.plan, offered)
        _warm_up(ctx, hooks, forward_backward, infer)
        self.evidence["warm_up"] = self._collect_evidence()

        watch = Watch(ctx, Clock(), self.record, hooks, self.signals)
        race = Race(
            ctx=ctx,
            position=self.position,
            step=_with_faults(step, ctx, self.position),
            batches=lambda epoch, first: ctx.feed(hooks.wrap_batches(ctx=ctx, batches=_epoch(ctx, epoch, first))),
            evaluate=None if ctx.synthetic else lambda: _evaluate(ctx, evaluate, infer),
            hooks=hooks,
            watch=watch,
        )
        watch.save = lambda: self.checkpointer.save(self.position.step, self._shared_state(race), self._local_state())
        return race

    def _race(self, race: Race) -> str:
        """Starts the clock, trains, stops the clock and writes the result."""
        ctx, record, watch, position = self.ctx, self.record, race.watch, self.position
        ctx.backend.all_gather([0.0])  # every rank is ready: the clock starts for all
        accumulation = constants.GRADIENT_ACCUMULATION_STEPS
        extra = {constants.SEED: ctx.seed, accumulation: ctx.figures.get(accumulation, 1)}
        record.init_stop(ctx.config.submission, ctx.workload, extra, ctx.workload.weight_names(ctx.model))
        watch.begin(position)
        try:
            status = train(race)
            ctx.backend.synchronize()
            clock_s, ended_at = watch.clock.seconds(), time.time()
            record.mllog.end(constants.RUN_STOP, None, {"status": "success" if status == "success" else "aborted"})
        finally:
            watch.progress.close()

        found = self.evidence["end"] = self._collect_evidence()
        record.evidence(self.evidence)
        if ctx.config.checkpoint.at_end and status != "stopped":
            watch.save()
        if ctx.rank == 0:
            write_json(ctx.run_dir / "system.json", describe_system(ctx.config.submission, ctx.world_size))
        # The clock never pauses: a resumed run that is to be scored counts the time in between as well.
        time_to_train = ended_at - watch.clock.started_at if self.restarts else clock_s
        record.result(
            status=status, time_to_train_s=time_to_train if status == "success" and self.scored else None,
            scored=self.scored, wall_s=clock_s, quality=race.quality,
            target={t.metric: t.value for t in ctx.workload.targets}, samples=position.samples, steps=position.step,
            epochs=position.epochs_done,
            samples_per_s=position.samples / watch.train_seconds if watch.train_seconds else None,
            evidence={e.plugin: {"active": e.active, "summary": e.summary} for e in found}, figures=ctx.figures,
            parameters_sha256=parameters_hash(ctx.model),
            system={"file": "system.json", "threads": torch.get_num_threads(), "device": str(ctx.device)},
        )  # fmt: skip
        record.close()
        return status

    def _collect_evidence(self) -> list[Evidence]:
        return [e for e in self.hooks.verify(ctx=self.ctx) if e is not None]

    # What a checkpoint carries: the same on every rank, and each rank's own.

    def _shared_state(self, race: Race) -> dict[str, Any]:
        ctx, watch = self.ctx, race.watch
        return {
            "model": gathered(ctx.model.state_dict()), "optimizer": gathered(ctx.optimizer.state_dict()),
            "position": vars(self.position),
            "quality": race.quality, "evaluated_step": race.evaluated_step, "block_epoch": watch.block_epoch,
            "logs": self.record.offsets(), "clock_s": watch.clock.seconds(), "started_at": watch.clock.started_at,
            "train_s": watch.train_seconds,
        }  # fmt: skip

    def _local_state(self) -> dict[str, Any]:
        return {
            "generators": generator_states(self.ctx.device),
            "workload": self.ctx.workload.state_dict(),
            "plugins": {name: plugin.state_dict() for name, plugin in self._plugins()},
            "buffers": dict(self.ctx.model.named_buffers()),  # running statistics differ from rank to rank
        }

    def _restore(self, race: Race, saved: Saved) -> None:
        ctx, watch, shared, local = self.ctx, race.watch, saved.shared, saved.local
        current = ctx.model.state_dict()
        ctx.model.load_state_dict({name: scattered(t, current[name]) for name, t in shared["model"].items()})
        parameters = [p for group in ctx.optimizer.param_groups for p in group["params"]]
        for number, state in shared["optimizer"]["state"].items():  # its tensors lie as their parameter does
            for name, value in state.items():
                if isinstance(value, torch.Tensor):
                    state[name] = scattered(value, parameters[number])
        ctx.optimizer.load_state_dict(shared["optimizer"])
        vars(self.position).update(shared["position"])
        race.quality, race.evaluated_step = shared["quality"], shared["evaluated_step"]
        watch.block_epoch, watch.train_seconds = shared["block_epoch"] if self.same_run else 0, shared["train_s"]
        watch.clock.carry(shared["clock_s"], shared["started_at"])
        ctx.workload.load_state_dict(local["workload"])
        for name, plugin in self._plugins():
            plugin.load_state_dict(local["plugins"].get(name, {}))
        for name, buffer in ctx.model.named_buffers():
            buffer.copy_(local["buffers"][name])
        set_generator_states(ctx.device, local["generators"])

    def _plugins(self) -> list[tuple[str, Plugin]]:
        return [(name, p) for name, p in self.manager.list_name_plugin() if isinstance(p, Plugin)]


# What a step consumes besides its tensors is part of a batch's structure: captured graphs are told apart by it.
pytree.register_pytree_node(
    Batch, lambda batch: ([batch.data], (batch.samples, batch.weight)), lambda data, rest: Batch(*data, *rest)
)


def to_device(tree: Any, device: torch.device) -> Any:
    """The pytree with its tensors on the device; those that are there already are handed on."""
    return pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), tree)


def _refuse_unused(plan: RunPlan, offered: set[str]) -> None:
    """An opt none of whose components was asked for would silently do nothing."""
    for chosen in plan.of_kind("opt"):
        spec = chosen.load().spec
        if isinstance(spec, OptSpec) and spec.components and not spec.components & offered:
            raise PluginError(
                f"opt '{chosen.name}' replaces {', '.join(sorted(spec.components))}, which workload '{plan.workload}' "
                "does not offer: leave it out"
            )


def _build_steps(ctx: RunContext, hooks: Any, prepared: torch.nn.Module) -> tuple[Step, Step, Forward]:
    """The first half of a training step, the whole step and the inference function, as the opts made them."""
    model, optimizer = ctx.distributed_model, ctx.optimizer
    loss_function = ctx.component("loss", ctx.workload.loss)
    infer_function = ctx.component("infer", ctx.workload.infer)

    def forward_backward(batch: Batch) -> Outputs:
        outputs = loss_function(model, batch.data)
        loss = outputs["loss"] if batch.weight == 1.0 else outputs["loss"] * batch.weight
        loss.backward()
        return {**outputs, "loss": loss.detach()}

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    parts = hooks.build_step(ctx=ctx, parts=StepParts(forward_backward, update))

    def step(batch: Batch) -> Outputs:
        outputs = parts.forward_backward(batch)
        parts.update()
        return outputs

    def infer(data: Any) -> Any:
        return infer_function(prepared, data)

    train_step = hooks.wrap_step(ctx=ctx, step=step, purpose="train")
    return parts.forward_backward, train_step, hooks.wrap_step(ctx=ctx, step=infer, purpose="infer")


def _warm_up(ctx: RunContext, hooks: Any, forward_backward: Step, infer: Forward) -> None:
    """Runs the parts of a step on synthetic data before the clock, as the rules allow, and leaves no trace of it."""
    if ctx.config.warmup_steps == 0:
        return
    before = {name: tensor.clone() for name, tensor in ctx.model.state_dict().items()}
    generators = generator_states(ctx.device)
    (batch,) = ctx.feed(hooks.wrap_batches(ctx=ctx, batches=[ctx.workload.synthetic_batch()]))
    ctx.model.train()
    for _ in range(ctx.config.warmup_steps):
        forward_backward(batch)
        ctx.optimizer.zero_grad()
    ctx.model.eval()
    with torch.no_grad():
        infer(batch.data)
    ctx.model.train()
    ctx.model.load_state_dict(before)
    set_generator_states(ctx.device, generators)
    ctx.backend.synchronize()


def _epoch(ctx: RunContext, epoch: int, first_batch: int) -> Iterable[Batch]:
    if ctx.synthetic:
        return itertools.repeat(ctx.workload.synthetic_batch())
    return ctx.workload.batches(epoch, first_batch)


def _evaluate(ctx: RunContext, evaluate: Callable[[Forward], dict[str, float]], infer: Forward) -> dict[str, float]:
    ctx.model.eval()
    with torch.no_grad():
        quality = evaluate(infer)
    ctx.model.train()
    return quality


def _with_faults(step: Step, ctx: RunContext, position: Position) -> Step:
    """The step itself, unless a test armed a fault."""
    fault = faults.armed()
    if fault is None:
        return step

    def faulty(batch: Batch) -> Outputs:
        outputs = step(batch)
        if fault.strike("step", position.step + 1, ctx.rank):
            outputs["loss"] = outputs["loss"] * float("nan")
        return outputs

    return faulty


def main() -> int:
    """A process started by the launcher: `python -m core.worker ATTEMPT-AS-JSON`.

    A run that came to its end exits with 0, whatever its end: at any other status the launcher stops the other ranks.
    """
    attempt = Attempt(**json.loads(sys.argv[1]))
    code = run_rank(RunPlan.load(Path(attempt.run_dir) / "resolved.yaml"), attempt)
    failed = (Path(attempt.run_dir) / "errors" / f"rank{os.environ.get('RANK', 0)}.json").exists()
    return code if failed else EXIT_SUCCESS


if __name__ == "__main__":
    sys.exit(main())
