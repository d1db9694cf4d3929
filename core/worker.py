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
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from mlperf_logging.mllog import constants

from core.testing import faults
from core.checkpoint import Checkpointer, Saved, generator_states, parameters_hash, set_generator_states
from core.errors import EXIT_SUCCESS, OutOfMemoryError, PluginError, TimetrialError, UsageError
from core.hookspecs import hookimpl
from core.loop import Race, train
from core.record import EXIT_CODES, Record, write_json
from core.resolve import Attempt, RunPlan, plugin_manager
from core.system import describe_system
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
        return {
            "kind": error.kind,
            "status": error.status,
            "message": error.message,
            "exit_code": error.exit_code,
            **known,
        }
    message = f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]
    return {"kind": "failed", "status": "failed", "message": message, "exit_code": 1, "step": step}


def _run(plan: RunPlan, attempt: Attempt, signals: Signals, position: Position) -> str:
    config = plan.root()
    hooks_log = open(Path(attempt.run_dir) / "hooks.log", "a") if attempt.trace_hooks else None  # noqa: SIM115
    manager = plugin_manager(plan, [Baseline()], hooks_log.write if hooks_log else None)
    hooks = manager.hook
    ctx = RunContext(config=config, run_dir=Path(attempt.run_dir), seed=plan.seed)
    ctx.nproc_per_node = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    ctx.backend = hooks.init_backend(ctx=ctx)
    try:
        attempt = _agree(ctx, plan, attempt)
        return _run_joined(plan, attempt, signals, position, ctx, manager)
    finally:
        ctx.backend.shutdown()


def _agree(ctx: RunContext, plan: RunPlan, attempt: Attempt) -> Attempt:
    """Every rank runs rank 0's plan, seed and attempt: under an outer launcher each rank has composed its own."""
    theirs, ctx.seed, plan_hash = ctx.backend.broadcast([asdict(attempt), plan.seed, plan.hash()])
    if plan_hash != plan.hash():
        raise UsageError(f"rank {ctx.rank} has another plan than rank 0: give every rank the same command and code")
    ctx.run_dir = Path(theirs["run_dir"])
    return Attempt(**theirs)


def _run_joined(
    plan: RunPlan, attempt: Attempt, signals: Signals, position: Position, ctx: RunContext, manager: Any
) -> str:
    hooks, config, backend = manager.hook, ctx.config, ctx.backend
    _seed_everything(ctx)
    checkpointer = Checkpointer(ctx.run_dir / "checkpoints", backend, config.checkpoint.keep)
    source = Checkpointer(Path(attempt.resume_from) / "checkpoints", backend, 2) if attempt.resume_from else None
    saved = source.load() if source else None
    same_run = attempt.resume_from == attempt.run_dir
    record = Record(ctx.run_dir, ctx.rank == 0, saved.shared["logs"] if saved and same_run else None)
    restarts = attempt.restarts if saved else 0  # what was stopped before its first checkpoint starts anew
    scored = not ctx.synthetic and not attempt.changed and (not restarts or config.score_restarts)
    record.result(
        status="running", time_to_train_s=None, workload=plan.workload, seed=ctx.seed, world_size=ctx.world_size,
        plan_hash=plan.hash(), plugins=[asdict(p) for p in plan.plugins], restarts=restarts,
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
    forward_backward, step, infer = _build_steps(ctx, hooks, prepared)
    evaluate_all = hooks.wrap_evaluate(ctx=ctx, evaluate=workload.evaluate)
    _refuse_unused(plan, offered)
    _warm_up(ctx, hooks, forward_backward, infer)
    evidence = {"warm_up": _collect_evidence(ctx, hooks)}

    watch = Watch(ctx, Clock(), record, hooks, signals)
    race = Race(
        ctx=ctx, position=position, step=_with_faults(step, ctx, position), hooks=hooks, watch=watch,
        batches=lambda epoch, first: hooks.wrap_batches(ctx=ctx, batches=_epoch(ctx, epoch, first)),
        evaluate=None if ctx.synthetic else lambda: _evaluate(ctx, evaluate_all, infer),
    )  # fmt: skip
    watch.save = lambda: checkpointer.save(position.step, _shared_state(race), _local_state(ctx, manager))
    if saved is not None:
        _restore(race, manager, saved, same_run)

    backend.all_gather([0.0])  # every rank is ready: the clock starts for all
    steps_key = constants.GRADIENT_ACCUMULATION_STEPS
    extra = {constants.SEED: ctx.seed, steps_key: ctx.figures.get(steps_key, 1)}
    record.init_stop(config.submission, workload, extra, workload.weight_names(ctx.model))
    watch.begin(position)  # starts the clock
    try:
        status = train(race)
        backend.synchronize()
        clock_s, ended_at = watch.clock.seconds(), time.time()
        record.mllog.end(constants.RUN_STOP, None, {"status": "success" if status == "success" else "aborted"})
    finally:
        watch.progress.close()

    evidence["end"] = _collect_evidence(ctx, hooks)
    record.evidence(evidence)
    if config.checkpoint.at_end and status != "stopped":
        watch.save()
    if ctx.rank == 0:
        write_json(ctx.run_dir / "system.json", describe_system(config.submission, ctx.world_size))
    # The clock never pauses: a resumed run that is to be scored counts the time in between as well.
    time_to_train = ended_at - watch.clock.started_at if restarts else clock_s
    record.result(
        status=status, time_to_train_s=time_to_train if status == "success" and scored else None, scored=scored,
        wall_s=clock_s, quality=race.quality, target={t.metric: t.value for t in workload.targets}, samples=position.samples,
        steps=position.step, epochs=position.epochs_done,
        samples_per_s=position.samples / watch.train_seconds if watch.train_seconds else None,
        evidence={e.plugin: {"active": e.active, "summary": e.summary} for e in evidence["end"]},
        figures=ctx.figures, parameters_sha256=parameters_hash(ctx.model),
        system={"file": "system.json", "threads": torch.get_num_threads(), "device": str(backend.device)},
    )  # fmt: skip
    record.close()
    return status


def _seed_everything(ctx: RunContext) -> None:
    """Torch's process-wide generator, for models that draw (dropout), differs from rank to rank; the rest is counted."""
    torch.manual_seed(ctx.seed_for("torch", ctx.rank))
    # Not use_deterministic_algorithms: it sets the same switch, but first imports the compiler, which takes seconds.
    torch.set_deterministic_debug_mode("error" if ctx.config.deterministic else "default")
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


def _build_steps(ctx: RunContext, hooks: Any, prepared: Any) -> tuple[Step, Step, Forward]:
    """The first half of a training step, the whole step and the inference function, as the opts made them."""
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
    (batch,) = hooks.wrap_batches(ctx=ctx, batches=[ctx.workload.synthetic_batch()])
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


def _evaluate(ctx: RunContext, evaluate_all: Callable[[Forward], dict[str, float]], infer: Forward) -> dict[str, float]:
    ctx.model.eval()
    with torch.no_grad():
        quality = evaluate_all(infer)
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


def _shared_state(race: Race) -> dict[str, Any]:
    """What is the same on every rank."""
    ctx, watch = race.ctx, race.watch
    return {
        "model": ctx.model.state_dict(), "optimizer": ctx.optimizer.state_dict(), "position": vars(race.position),
        "quality": race.quality, "evaluated_step": race.evaluated_step, "block_epoch": watch.block_epoch,
        "logs": watch.record.offsets(), "clock_s": watch.clock.seconds(), "started_at": watch.clock.started_at,
        "train_s": watch.train_seconds,
    }  # fmt: skip


def _local_state(ctx: RunContext, manager: Any) -> dict[str, Any]:
    """What each rank has of its own."""
    plugins = {name: plugin.state_dict() for name, plugin in _stateful(manager)}
    return {
        "generators": generator_states(ctx.device),
        "workload": ctx.workload.state_dict(),
        "plugins": plugins,
        "buffers": dict(ctx.model.named_buffers()),  # running statistics differ from rank to rank
    }


def _restore(race: Race, manager: Any, saved: Saved, same_run: bool) -> None:
    """Puts back what the two functions above gave."""
    ctx, watch = race.ctx, race.watch
    ctx.model.load_state_dict(saved.shared["model"])
    ctx.optimizer.load_state_dict(saved.shared["optimizer"])
    vars(race.position).update(saved.shared["position"])
    race.quality, race.evaluated_step = saved.shared["quality"], saved.shared["evaluated_step"]
    watch.block_epoch, watch.train_seconds = saved.shared["block_epoch"] if same_run else 0, saved.shared["train_s"]
    watch.clock.carry(saved.shared["clock_s"], saved.shared["started_at"])
    ctx.workload.load_state_dict(saved.local["workload"])
    for name, plugin in _stateful(manager):
        plugin.load_state_dict(saved.local["plugins"].get(name, {}))
    for name, buffer in ctx.model.named_buffers():
        buffer.copy_(saved.local["buffers"][name])
    set_generator_states(ctx.device, saved.local["generators"])


def _stateful(manager: Any) -> list[tuple[str, Plugin]]:
    return [(name, p) for name, p in manager.list_name_plugin() if isinstance(p, Plugin)]


def _collect_evidence(ctx: RunContext, hooks: Any) -> list[Evidence]:
    return [e for e in hooks.verify(ctx=ctx) if e is not None]


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
