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
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from mlperf_logging.mllog import constants

from core.testing import faults
from core.checkpoint import Checkpointer, generator_states, parameters_hash, set_generator_states
from core.errors import OutOfMemoryError, PluginError, TimetrialError, UsageError
from core.hookspecs import hookimpl
from core.loop import Race, train
from core.record import EXIT_CODES, Record, write_json
from core.resolve import Attempt, RunPlan, plugin_manager
from core.system import describe_system
from core.types import Batch, Evidence, OptSpec, Outputs, Position, RunContext, StepParts
from core.watch import Clock, Signals, Watch


class Baseline:
    """Core's own implementations: the innermost layer of every onion, which adds no trick."""

    @hookimpl
    def prepare_model(self, model: Any) -> Any:
        return model

    @hookimpl
    def make_optimizer(self, ctx: RunContext, model: Any) -> Any:
        return ctx.workload.build_optimizer(model)

    @hookimpl
    def wrap_batches(self, batches: Any) -> Any:
        return batches

    @hookimpl
    def component(self, default: Any) -> Any:
        return default

    @hookimpl
    def build_step(self, parts: StepParts) -> StepParts:
        return parts

    @hookimpl
    def wrap_step(self, step: Any) -> Any:
        return step

    @hookimpl
    def wrap_evaluate(self, evaluate: Any) -> Any:
        return evaluate


def run_rank(plan: RunPlan, attempt: Attempt) -> int:
    """Runs this rank to its end and returns its exit status. A failure is left in `errors/rank<k>.json`."""
    signals = Signals()
    step = Position()
    try:
        return EXIT_CODES[_run(plan, attempt, signals, step)]
    except Exception as error:
        failure = _describe(error, step.step)
        rank = int(os.environ.get("RANK", 0))
        folder = Path(attempt.run_dir) / "errors"
        if folder.parent.is_dir():
            folder.mkdir(exist_ok=True)
            (folder / f"rank{rank}.traceback.txt").write_text(traceback.format_exc())
            write_json(folder / f"rank{rank}.json", {"rank": rank, **failure, "time": time.time()})
        return int(failure["exit_code"])
    finally:
        signals.restore()


def _describe(error: Exception, step: int) -> dict[str, Any]:
    """An error as plain data: kind, status, one line, exit status, and where known rank and step."""
    if isinstance(error, torch.OutOfMemoryError):
        peak = torch.get_device_module().max_memory_allocated() / 2**30 if torch.accelerator.is_available() else 0.0
        error = OutOfMemoryError(f"out of memory at step {step} (peak {peak:.1f} GiB): use a smaller global batch size")
    if isinstance(error, TimetrialError):
        where = {"rank": error.rank, "step": error.step}
        known = {key: value for key, value in where.items() if value is not None}
        return {"kind": error.kind, "status": error.status, "message": error.message, "exit_code": error.exit_code, **known}
    message = f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]
    return {"kind": "failed", "status": "failed", "message": message, "exit_code": 1, "step": step}


def _run(plan: RunPlan, attempt: Attempt, signals: Signals, position: Position) -> str:
    config = plan.root()
    hooks_log = open(Path(attempt.run_dir) / "hooks.log", "a") if attempt.trace_hooks else None  # noqa: SIM115
    manager = plugin_manager(plan, [Baseline()], hooks_log.write if hooks_log else None)
    hooks = manager.hook
    ctx = RunContext(config=config, run_dir=Path(attempt.run_dir), seed=plan.seed, deterministic=config.deterministic)
    ctx.nproc_per_node = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    ctx.backend = hooks.init_backend(ctx=ctx)
    try:
        _agree(ctx, plan)
        return _run_joined(plan, attempt, signals, position, ctx, manager)
    finally:
        ctx.backend.shutdown()


def _agree(ctx: RunContext, plan: RunPlan) -> None:
    """Every rank runs rank 0's plan, with its seed and run folder; under an outer launcher each rank composed its own."""
    run_dir, seed, plan_hash = ctx.backend.broadcast([str(ctx.run_dir), plan.seed, plan.hash()])
    ctx.run_dir, ctx.seed = Path(run_dir), seed
    if plan_hash != plan.hash():
        raise UsageError(f"rank {ctx.rank} has another plan than rank 0: give every rank the same command and code")


def _run_joined(
    plan: RunPlan, attempt: Attempt, signals: Signals, position: Position, ctx: RunContext, manager: Any
) -> str:
    hooks, config, backend = manager.hook, ctx.config, ctx.backend
    _seed_everything(ctx)
    checkpointer = Checkpointer(ctx.run_dir / "checkpoints", backend, config.checkpoint.keep)
    source = Checkpointer(Path(attempt.resume_from) / "checkpoints", backend, 2) if attempt.resume_from else None
    saved = source.load() if source else None
    same_run = attempt.resume_from == attempt.run_dir
    record = Record(ctx.run_dir, ctx.rank == 0, saved[1]["logs"] if saved and same_run else None)
    scored = not ctx.synthetic and not attempt.changed and (not attempt.restarts or config.score_restarts)
    started_at = time.time()
    record.result(
        status="running", time_to_train_s=None, workload=plan.workload, seed=ctx.seed, world_size=ctx.world_size,
        plan_hash=plan.hash(), plugins=[asdict(p) for p in plan.plugins], restarts=attempt.restarts,
        changed=attempt.changed, deterministic=config.deterministic, error=None,
    )  # fmt: skip
    record.init_start()

    ctx.workload = workload = hooks.make_workload(ctx=ctx)
    if not ctx.synthetic:
        workload.check_data()
    offered = _offer_components(ctx, hooks)
    ctx.model = workload.build_model().to(backend.device)
    prepared = hooks.prepare_model(ctx=ctx, model=ctx.model)
    ctx.distributed_model = hooks.distribute(ctx=ctx, model=prepared)
    exchange = hooks.communication_hook(ctx=ctx, model=ctx.distributed_model)
    if exchange is not None:
        ctx.distributed_model.register_comm_hook(*exchange)  # pyright: ignore[reportCallIssue]
    ctx.optimizer = hooks.make_optimizer(ctx=ctx, model=ctx.model)
    step, infer = _build_steps(ctx, hooks, prepared)
    evaluate_all = hooks.wrap_evaluate(ctx=ctx, evaluate=workload.evaluate)
    _refuse_unused(plan, offered)
    _warm_up(ctx, step.forward_backward, infer)
    record.evidence({"warm_up": (evidence := _collect_evidence(ctx, hooks))})

    clock, quality, carried = Clock(), dict[str, float](), {"clock_s": 0.0, "started_at": None, "train_s": 0.0}
    watch = Watch(ctx, clock, record, hooks, signals, lambda: save())
    race = Race(
        ctx=ctx, position=position, step=_with_faults(step.whole, ctx, position), hooks=hooks, watch=watch, clock=clock,
        record=record, quality=quality,
        batches=lambda epoch, first: hooks.wrap_batches(ctx=ctx, batches=_epoch(ctx, epoch, first)),
        evaluate=None if ctx.synthetic else lambda: _evaluate(ctx, evaluate_all, infer),
    )  # fmt: skip

    def save() -> None:
        shared = {
            "model": ctx.model.state_dict(), "optimizer": ctx.optimizer.state_dict(), "position": vars(position),
            "quality": quality, "evaluated_step": race.evaluated_step, "block_epoch": watch.block_epoch,
            "logs": record.offsets(), "clock_s": clock.seconds(), "started_at": clock.started_at,
            "train_s": watch.train_seconds,
        }  # fmt: skip
        local = {
            "generators": generator_states(backend.device), "workload": workload.state_dict(),
            "plugins": {name: plugin.state_dict() for name, plugin in _stateful(manager)},
        }  # fmt: skip
        checkpointer.save(position.step, shared, local)

    if saved is not None:
        _, carried, local = saved
        ctx.model.load_state_dict(carried["model"])
        ctx.optimizer.load_state_dict(carried["optimizer"])
        for name, value in carried["position"].items():
            setattr(position, name, value)
        quality.update(carried["quality"])
        race.evaluated_step = carried["evaluated_step"]
        watch.block_epoch, watch.train_seconds = carried["block_epoch"] if same_run else 0, carried["train_s"]
        workload.load_state_dict(local["workload"])
        for name, plugin in _stateful(manager):
            plugin.load_state_dict(local["plugins"].get(name, {}))
        set_generator_states(backend.device, local["generators"])

    backend.all_gather([0.0])  # every rank is ready: the clock starts for all
    accumulation = int(ctx.figures.get("gradient_accumulation_steps", 1))
    record.init_stop(config.submission, workload, accumulation, ctx.seed, workload.weight_names(ctx.model))
    clock.start(carried["clock_s"], carried["started_at"])
    watch.begin(position)
    try:
        status = train(race)
        backend.synchronize()
        clock_s, ended_at = clock.seconds(), time.time()
        record.end(constants.RUN_STOP, status="success" if status == "success" else "aborted")
    finally:
        watch.progress.close()

    evidence_end = _collect_evidence(ctx, hooks)
    record.evidence({"warm_up": evidence, "end": evidence_end})
    if config.checkpoint.at_end and status != "stopped":
        save()
    if ctx.rank == 0:
        write_json(ctx.run_dir / "system.json", describe_system(config.submission, ctx.world_size))
    time_to_train = (ended_at - (clock.started_at or started_at)) if attempt.restarts else clock_s
    record.result(
        status=status, time_to_train_s=time_to_train if status == "success" and scored else None, scored=scored,
        wall_s=clock_s, quality=quality, target={t.metric: t.value for t in workload.targets}, samples=position.samples,
        steps=position.step, epochs=position.epoch - (position.batch == 0),
        samples_per_s=position.samples / watch.train_seconds if watch.train_seconds else None,
        evidence={e.plugin: {"active": e.active, "summary": e.summary} for e in evidence_end},
        figures=ctx.figures, parameters_sha256=parameters_hash(ctx.model), init_s=None,
        system={"file": "system.json", "threads": torch.get_num_threads(), "device": str(backend.device)},
    )  # fmt: skip
    record.close()
    return status


def _seed_everything(ctx: RunContext) -> None:
    """Torch's process-wide generator, for models that draw (dropout), differs from rank to rank; the rest is counted."""
    torch.manual_seed(ctx.seed_for("torch", ctx.rank))
    # Not use_deterministic_algorithms: it sets the same switch, but first imports the compiler, which takes seconds.
    torch.set_deterministic_debug_mode("error" if ctx.deterministic else "default")
    # Filling fresh memory would cost time and hide nothing: no kernel here reads what it has not written.
    torch.utils.deterministic.fill_uninitialized_memory = False


def _offer_components(ctx: RunContext, hooks: Any) -> set[str]:
    """Makes `ctx.component` and returns the set into which it notes the names that were offered."""
    offered: set[str] = set()

    def component(name: str, default: Any) -> Any:
        offered.add(name)
        return hooks.component(ctx=ctx, name=name, default=default)

    ctx.component = component
    return offered


def _refuse_unused(plan: RunPlan, offered: set[str]) -> None:
    """An opt none of whose components was asked for would silently do nothing."""
    for chosen in plan.of_kind("opt"):
        spec = chosen.load().spec
        assert isinstance(spec, OptSpec)
        if spec.components and not spec.components & offered:
            raise PluginError(
                f"opt '{chosen.name}' replaces {', '.join(sorted(spec.components))}, which workload '{plan.workload}' "
                "does not offer: leave it out"
            )


@dataclass(frozen=True)
class _Steps:
    forward_backward: Callable[[Batch], Outputs]
    whole: Callable[[Batch], Outputs]


def _build_steps(ctx: RunContext, hooks: Any, prepared: Any) -> tuple[_Steps, Callable[[Any], Any]]:
    """The training step and the inference function, as the opts made them."""
    workload, model, optimizer = ctx.workload, ctx.distributed_model, ctx.optimizer
    loss_function = ctx.component("loss", workload.loss)
    infer_function = ctx.component("infer", workload.infer)

    def forward_backward(batch: Batch) -> Outputs:
        outputs = loss_function(model, batch.data)
        loss = outputs["loss"] if batch.weight == 1.0 else outputs["loss"] * batch.weight
        loss.backward()
        return {**outputs, "loss": loss.detach()}

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    parts = hooks.build_step(ctx=ctx, parts=StepParts(forward_backward, update))
    run_forward_backward, run_update = parts.forward_backward, parts.update

    def whole(batch: Batch) -> Outputs:
        outputs = run_forward_backward(batch)
        run_update()
        return outputs

    def infer(data: Any) -> Any:
        return infer_function(prepared, data)

    step = hooks.wrap_step(ctx=ctx, step=whole, purpose="train")
    return _Steps(parts.forward_backward, step), hooks.wrap_step(ctx=ctx, step=infer, purpose="infer")


def _warm_up(ctx: RunContext, forward_backward: Callable[[Batch], Outputs], infer: Callable[[Any], Any]) -> None:
    """Runs the parts of a step on synthetic data before the clock, as the rules allow, and leaves no trace of it."""
    if ctx.config.warmup_steps == 0:
        return
    before = {name: tensor.clone() for name, tensor in ctx.model.state_dict().items()}
    generators = generator_states(ctx.device)
    batch = ctx.workload.synthetic_batch()
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


def _epoch(ctx: RunContext, epoch: int, first_batch: int) -> Any:
    if ctx.synthetic:
        return itertools.repeat(ctx.workload.synthetic_batch())
    return ctx.workload.batches(epoch, first_batch)


def _evaluate(ctx: RunContext, evaluate_all: Callable[[Any], dict[str, float]], infer: Any) -> dict[str, float]:
    ctx.model.eval()
    with torch.no_grad():
        quality = evaluate_all(infer)
    ctx.model.train()
    return quality


def _with_faults(step: Callable[[Batch], Outputs], ctx: RunContext, position: Position) -> Callable[[Batch], Outputs]:
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


def _stateful(manager: Any) -> list[tuple[str, Any]]:
    return [(name, p) for name, p in manager.list_name_plugin() if hasattr(p, "state_dict")]


def _collect_evidence(ctx: RunContext, hooks: Any) -> list[Evidence]:
    return [e for e in hooks.verify(ctx=ctx) if e is not None]


def main() -> int:
    """A process started by the launcher: `python -m core.worker ATTEMPT-AS-JSON`."""
    attempt = Attempt(**json.loads(sys.argv[1]))
    return run_rank(RunPlan.load(Path(attempt.run_dir) / "resolved.yaml"), attempt)


if __name__ == "__main__":
    sys.exit(main())
