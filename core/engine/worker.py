"""One rank of a run: builds everything from the plan in a fixed order, runs the loop, and writes down what happened.

environment (set before) -> backend -> workload -> model -> distribute -> optimizer -> step -> warm-up
| clock starts | loop | clock stops | verify -> record
"""

import functools
import gc
import itertools
import operator
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

from core.api import faults
from core.api.errors import EXIT_CODES, OutOfMemoryError, PluginError, TimetrialError, UsageError
from core.api.hooks import hookimpl
from core.api.types import Batch, Evidence, OptSpec, Outputs, Plugin, Quality, RunContext, Step, StepParts
from core.compose.resolve import RunPlan, plugin_manager
from core.engine.loop import train
from core.engine.watch import Signals, Watch
from core.state import checkpoint
from core.state.record import Record, describe_system, update_result, write_json


class Baseline:
    """Core's own implementations: the innermost layer of every onion, which adds no trick."""

    prepare_model = hookimpl(lambda self, model: model)
    make_optimizer = hookimpl(lambda self, ctx, model: ctx.workload.build_optimizer(model))
    wrap_batches = hookimpl(lambda self, batches: batches)
    component = hookimpl(lambda self, default: default)
    build_step = hookimpl(lambda self, parts: parts)
    wrap_step = hookimpl(lambda self, step: step)
    wrap_evaluate = hookimpl(lambda self, evaluate: evaluate)


def run_rank(plan: RunPlan) -> int:
    """Runs this rank to its end and returns its exit status. A failure is left in `errors/rank<k>.json`."""
    signals, rank = Signals(), None
    try:
        rank = _Rank(plan, signals)
        return EXIT_CODES[rank.run()]
    except Exception as error:
        if isinstance(error, torch.OutOfMemoryError):
            peak, size = torch.accelerator.max_memory_allocated(), plan.config["workload"].get("global_batch_size")
            what = f"out of memory (peak {peak / 2**30:.1f} GiB, global batch size {size})"
            error = OutOfMemoryError(f"{what}: use a smaller global batch size")
        elif not isinstance(error, TimetrialError):
            step = rank.ctx.position.step if rank else None
            error = TimetrialError(f"{type(error).__name__}: {error}"[:500], step=step)
        run_dir = rank.ctx.run_dir if rank else Path(plan.run_dir)
        if run_dir != Path():
            path = run_dir / "errors" / f"rank{os.environ.get('RANK', 0)}.json"
            path.parent.mkdir(exist_ok=True)
            path.with_suffix(".traceback.txt").write_text(traceback.format_exc())
            write_json(path, {"rank": int(os.environ.get("RANK", 0)), **error.as_dict(), "time": time.time()})
        else:  # a rank of an outer launcher that has not heard from rank 0
            error.show()
        return error.exit_code


class _Rank:
    """The state of one rank, in the order in which it comes to be: join, build, (restore), race, finish."""

    def __init__(self, plan: RunPlan, signals: Signals) -> None:
        self.plan, self.signals = plan, signals
        manager = plugin_manager(plan.plugins, plan.config, [Baseline()])
        self.hooks: Any = manager.hook
        self.plugins = {name: p for name, p in manager.list_name_plugin() if isinstance(p, Plugin)}
        self.ctx = RunContext(config=plan.root(), run_dir=Path(plan.run_dir), seed=plan.seed)

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
        """Opens the logs, cut back to the checkpoint that the run continues from, which is returned."""
        ctx = self.ctx
        # Every rank follows rank 0: under an outer launcher each has composed its own plan.
        plan: RunPlan = ctx.backend.broadcast(self.plan)
        if self.plan.hash() != plan.hash():
            raise UsageError(f"rank {ctx.rank} has another plan than rank 0: give every rank the same command and code")
        ctx.config, ctx.run_dir, ctx.seed = plan.root(), Path(plan.run_dir), plan.seed
        self.checkpoints = checkpoint.Checkpointer(ctx.run_dir / "checkpoints", ctx.backend, ctx.config.checkpoint.keep)
        saved = self.checkpoints.load(Path(plan.resume_from, "checkpoints")) if plan.resume_from else None
        logs = saved[0]["logs"] if saved and plan.resume_from == plan.run_dir else None
        self.record = Record(ctx.run_dir, ctx.rank == 0, logs)
        self.restarts = plan.restarts if saved else 0  # what stopped before its first checkpoint starts anew
        self.scored = not ctx.synthetic and not plan.changed and (not self.restarts or ctx.config.score_restarts)
        if ctx.rank == 0:
            update_result(ctx.run_dir, restarts=self.restarts)
        return saved

    def _build(self) -> None:
        """Everything from the workload to the composed step, warmed up: the loop can run."""
        ctx, hooks = self.ctx, self.hooks
        # Dropout and its like draw from torch's process-wide generator, which differs from rank to rank.
        torch.manual_seed(ctx.seed_for("torch", ctx.rank))
        # Not use_deterministic_algorithms: it sets the same switch, but imports the compiler first, for seconds.
        torch.set_deterministic_debug_mode("error" if ctx.config.deterministic else "default")
        # Filling fresh memory would cost time and hide nothing: no kernel here reads what it has not written.
        torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
        prepared, offered = _build_model(ctx, hooks)
        ctx.distributed_model = hooks.distribute(ctx=ctx, model=prepared)
        exchange = hooks.communication_hook(ctx=ctx, model=ctx.distributed_model)
        if exchange is not None:
            ctx.distributed_model.register_comm_hook(*exchange)  # pyright: ignore[reportCallIssue]
        ctx.optimizer = hooks.make_optimizer(ctx=ctx, model=ctx.model)
        forward_backward, step = _build_step(ctx, hooks)
        self.step, self.evaluate = faults.in_step(step, ctx.position, ctx.rank), _build_evaluation(ctx, hooks, prepared)
        for chosen in self.plan.plugins:
            spec = chosen.load().spec
            if isinstance(spec, OptSpec) and spec.components and not spec.components & offered:
                what = f"opt '{chosen.name}' replaces {', '.join(sorted(spec.components))}"  # and so would do nothing
                raise PluginError(f"{what}, which workload '{self.plan.workload}' does not offer: leave it out")
        if ctx.config.prewarm_steps:
            _warm_up(ctx, hooks, forward_backward)
        self.warm_evidence = hooks.verify(ctx=ctx)
        self.watch = Watch(ctx, self.record, hooks, self.signals, self._save)

    def _batches(self, epoch: int, first_batch: int) -> Iterable[Batch]:
        workload = self.ctx.workload
        synthetic = itertools.repeat(workload.synthetic_batch()) if self.ctx.synthetic else None
        batches = synthetic or workload.batches(epoch, first_batch)
        return self.ctx.feed(self.hooks.wrap_batches(ctx=self.ctx, batches=batches))

    def _race(self) -> str:
        """Starts the clock, trains, stops the clock and writes the result."""
        ctx, record, watch, position = self.ctx, self.record, self.watch, self.ctx.position
        gc.freeze()  # what has been built lives to the end: no collection in the loop need look through it
        gc.enable()
        ctx.backend.all_gather([0.0])  # every rank is ready: the clock starts for all
        record.init_stop(ctx)
        watch.begin()
        try:
            status = train(ctx, watch, self.step, self._batches, None if ctx.synthetic else self.evaluate)
            ctx.backend.synchronize()
            clock_s, ended_at = watch.seconds(), time.time()
            record.mllog.end(constants.RUN_STOP, None, {"status": "success" if status == "success" else "aborted"})
        finally:
            watch.progress.close()
        evidence: list[Evidence] = self.hooks.verify(ctx=ctx)
        if ctx.config.checkpoint.at_end and status != "stopped":
            watch.save()
        parameters = checkpoint.parameters_hash(ctx.model)
        if ctx.rank > 0:
            return status
        stages = {"warm_up": self.warm_evidence, "end": evidence}
        write_json(ctx.run_dir / "evidence.json", {k: [asdict(e) for e in stage] for k, stage in stages.items()})
        write_json(ctx.run_dir / "system.json", describe_system(ctx.config.submission, ctx.world_size))
        # The clock never pauses: a resumed run that is to be scored counts the time in between as well.
        time_to_train = ended_at - watch.started_at if self.restarts else clock_s
        update_result(
            ctx.run_dir, status=status, scored=self.scored, wall_s=clock_s,
            time_to_train_s=time_to_train if status == "success" and self.scored else None, quality=watch.quality,
            target={t.metric: t.value for t in ctx.workload.targets}, samples=position.samples, steps=position.step,
            epochs=position.epochs_done,
            samples_per_s=position.samples / watch.train_seconds if watch.train_seconds else None,
            evidence={e.plugin: {"active": e.active, "summary": e.summary} for e in evidence}, figures=ctx.figures,
            parameters_sha256=parameters,
            system={"file": "system.json", "threads": torch.get_num_threads(), "device": str(ctx.device)},
        )  # fmt: skip
        return status

    def _save(self) -> None:
        """Writes a checkpoint: what is the same on all ranks, and what is this rank's own."""
        ctx = self.ctx
        states = {"model": ctx.model.state_dict(), "optimizer": ctx.optimizer.state_dict(), **self.watch.state_dict()}
        local = {
            "generators": checkpoint.generator_states(ctx.device),
            "workload": ctx.workload.state_dict(),
            "plugins": {name: plugin.state_dict() for name, plugin in self.plugins.items()},
            "buffers": dict(ctx.model.named_buffers()),  # running statistics differ from rank to rank
        }
        self.checkpoints.save(ctx.position.step, states, local)

    def _restore(self, shared: dict[str, Any], local: dict[str, Any]) -> None:
        self.ctx.model.load_state_dict(shared["model"])
        self.ctx.optimizer.load_state_dict(shared["optimizer"])
        self.watch.load_state_dict(shared)
        self.ctx.workload.load_state_dict(local["workload"])
        for name, plugin in self.plugins.items():
            plugin.load_state_dict(local["plugins"].get(name, {}))
        for name, buffer in self.ctx.model.named_buffers():
            buffer.copy_(local["buffers"][name])
        checkpoint.set_generator_states(self.ctx.device, local["generators"])


# What a step consumes besides its tensors is part of a batch's structure: captured graphs are told apart by it.
pytree.register_pytree_node(
    Batch, lambda batch: ([batch.data], (batch.samples, batch.weight)), lambda data, rest: Batch(*data, *rest)
)


def _build_model(ctx: RunContext, hooks: Any) -> tuple[torch.nn.Module, set[str]]:
    """The workload and its model, as `prepare_model` leaves it; and the names of components offered, as they come."""
    ctx.workload = hooks.make_workload(ctx=ctx)
    if not ctx.synthetic:
        ctx.workload.check_data()
    offered: set[str] = set()

    def component(name: str, default: Any) -> Any:
        offered.add(name)
        return hooks.component(ctx=ctx, name=name, default=default)

    ctx.component = component
    moved = functools.partial(pytree.tree_map_only, torch.Tensor, operator.methodcaller("to", ctx.device))
    on_host = ctx.device.type == "cpu"  # where batches are: a step need not look through them
    ctx.feed = component("feed", iter if on_host else functools.partial(map, moved))
    ctx.model = ctx.workload.build_model().to(ctx.device)
    return hooks.prepare_model(ctx=ctx, model=ctx.model), offered


def _build_step(ctx: RunContext, hooks: Any) -> tuple[Step, Step]:
    """The first half of a training step and the whole step, as the opts made them."""
    model, optimizer, loss_function = ctx.distributed_model, ctx.optimizer, ctx.component("loss", ctx.workload.loss)

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

    return parts.forward_backward, hooks.wrap_step(ctx=ctx, step=step, purpose="train")


def _build_evaluation(ctx: RunContext, hooks: Any, prepared: torch.nn.Module) -> Callable[[], Quality]:
    """The evaluation, as the opts made it; `ctx.infer` is filled in on the way."""
    infer = functools.partial(ctx.component("infer", ctx.workload.infer), prepared)
    ctx.infer = hooks.wrap_step(ctx=ctx, step=infer, purpose="infer")
    innermost = ctx.component("evaluate", ctx.workload.evaluate)
    wrapped_evaluate = hooks.wrap_evaluate(ctx=ctx, evaluate=innermost)
    return lambda: _without_gradient(ctx, wrapped_evaluate, ctx.infer)


def evaluator(plan: RunPlan, ctx: RunContext) -> Callable[[], Quality]:
    """The evaluation alone, for another process: fills in `ctx`, whose backend is given, but for what only trains."""
    hooks = plugin_manager(plan.plugins, plan.config, [Baseline()]).hook
    prepared, _ = _build_model(ctx, hooks)
    return _build_evaluation(ctx, hooks, prepared)


def _warm_up(ctx: RunContext, hooks: Any, forward_backward: Step) -> None:
    """Runs the parts of a step on synthetic data before the clock, as the rules allow, and leaves no trace of it."""
    before = {name: tensor.clone() for name, tensor in ctx.model.state_dict().items()}
    generators = checkpoint.generator_states(ctx.device)
    (batch,) = ctx.feed(hooks.wrap_batches(ctx=ctx, batches=[ctx.workload.synthetic_batch()]))
    ctx.model.train()
    for _ in range(ctx.config.prewarm_steps):
        forward_backward(batch)
        ctx.optimizer.zero_grad()
    _without_gradient(ctx, ctx.infer, batch.data)
    ctx.model.load_state_dict(before)
    checkpoint.set_generator_states(ctx.device, generators)
    ctx.backend.synchronize()


def _without_gradient(ctx: RunContext, function: Callable[[Any], Any], argument: Any) -> Any:
    """`function(argument)` with the model in evaluation mode."""
    ctx.model.eval()
    with torch.no_grad():
        result = function(argument)
    ctx.model.train()
    return result


def main() -> int:
    """A process started by the launcher: `python -m core.engine.worker RUN_DIR`."""
    run_dir = Path(sys.argv[1])
    code = run_rank(RunPlan.load(run_dir / "resolved.yaml"))
    # A run that came to an end, whatever its status, exits with 0: at any other the launcher stops the other ranks.
    return code if any((run_dir / "errors").glob("rank*")) else 0


if __name__ == "__main__":
    sys.exit(main())
