"""The data that crosses an interface between core and a plugin. Imports without torch: specs are read by `--help`.

Terms: *rank* is one process, *world size* their number; the *global batch* is what all ranks consume in one step.
"""

# pyright: reportReturnType=false

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from core.api.config import RunConfig

Numerics = Literal["bitwise", "tolerance", "changes"]
Kind = Literal["workload", "backend", "opt"]


@dataclass(frozen=True, kw_only=True)
class Devices:
    """What a backend finds on this machine, without importing torch."""

    provides: frozenset[str] = frozenset()  # capabilities that opts may require, such as "cuda"
    count: int | None = None  # how many ranks this machine can serve; None means any number
    problem: str = ""  # why it cannot run here, in one line; empty where it can


@dataclass(frozen=True, kw_only=True)
class PluginSpec:
    """What every plugin says about itself."""

    interface: int  # the version of the interface it was built for (`core.INTERFACE`)
    summary: str  # one line for `python -m core.plugins` and the README's table
    requires: frozenset[str] = frozenset()
    """Capabilities: what the backend provides ("cuda"), "multi_rank", "multi_node", or "cxx" (a C++ compiler)."""


@dataclass(frozen=True, kw_only=True)
class BackendSpec(PluginSpec):
    probe: Callable[[], Devices]  # looks at the machine in milliseconds and without torch
    preference: int = 0  # `backend=auto` takes the runnable backend with the highest preference


@dataclass(frozen=True, kw_only=True)
class OptSpec(PluginSpec):
    """How an acceleration trick composes, and what it does to the numbers."""

    numerics: Numerics
    """Against the baseline: same bits, same within float tolerance, or different (quality must still hold)."""
    conflicts: Mapping[str, str] = field(default_factory=dict[str, str])
    """Names of opts it cannot run with, each with the reason."""
    wraps: frozenset[str] = frozenset()  # names of opts that must lie inside this one, where both are chosen
    claims: frozenset[str] = frozenset()
    """Exclusive resources, such as "ddp.comm_hook": two opts that claim the same one conflict."""
    components: frozenset[str] = frozenset()
    """Components it replaces; at least one must be offered by the workload, or the opt would be silently inactive."""


@dataclass(frozen=True, kw_only=True)
class WorkloadSpec(PluginSpec):
    benchmark: str
    """Name in MLPerf Training v1.1, for the log: resnet, bert, rnnt, maskrcnn, minigo, ssd, dlrm, unet3d."""
    capture: Literal["step", "partial", "none"] = "none"  # how much of a training step can be captured into a graph
    capture_parts: tuple[str, ...] = ()  # with `capture="partial"`: names of the model's submodules that can be
    static_shapes: bool = False
    batch_statistics: bool = False
    """Whether the loss of an example depends on its neighbours in the (micro-)batch, as with batch normalisation."""


@dataclass(slots=True)
class Batch:
    """This rank's share of one global batch."""

    data: Any  # a pytree of tensors whose shapes the workload documents
    samples: int  # examples that the step consumes, over all ranks
    weight: float = 1.0
    """Local examples x world size / global examples: the mean over ranks of weighted losses is the global mean."""


Outputs = dict[str, "Tensor"]
Forward = Callable[[Any], Any]  # inference: `batch.data -> pytree of tensors`, on the device, without gradient
Pending = Callable[[bool], dict[str, float] | None]
"""An evaluation that goes on beside the training: `pending(wait)` gives the quality, or None while it is not known and
not to be waited for. Every rank asks after the same step and is given the same answer."""
Quality = dict[str, float] | Pending
"""What an evaluation of the whole evaluation set gives: its value by metric, at once or later."""
Evaluate = Callable[[Forward], Quality]
Step = Callable[[Batch], Outputs]
"""One training step: device tensors out, no host synchronisation; "loss" is the mean loss times `Batch.weight`."""


@dataclass(frozen=True)
class StepParts:
    """The two halves of a training step. `forward_backward` leaves gradients; `update` applies and then clears them."""

    forward_backward: Step
    update: Callable[[], None]


@dataclass(frozen=True)
class Target:
    """One quality threshold; a run succeeds when all of its workload's targets are met."""

    metric: str
    value: float
    higher_is_better: bool = True
    log_name: str = ""  # its key in mllog's eval_accuracy where a workload has several targets, such as "BBOX"

    def met(self, quality: Mapping[str, float]) -> bool:
        value = quality[self.metric]
        return value >= self.value if self.higher_is_better else value <= self.value


@dataclass(frozen=True)
class EvalCadence:
    """When to evaluate: after `first`, then after every `every` epochs or samples (v1.1 rules, "evaluate every")."""

    every: int
    first: int
    unit: Literal["epochs", "samples"] = "epochs"

    def next_after(self, done: int) -> int:
        """The first evaluation point beyond `done` epochs or samples."""
        return self.first if done < self.first else self.first + ((done - self.first) // self.every + 1) * self.every


@dataclass
class Position:
    """Where training stands; saved in every checkpoint. Epochs count from 1 (v1.1 rules)."""

    epoch: int = 1
    batch: int = 0  # batches of this epoch that are done
    step: int = 0
    samples: int = 0

    @property
    def epochs_done(self) -> int:
        """Epochs begun, or finished where none is under way."""
        return self.epoch - (self.batch == 0)


class Backend(Protocol):
    """What a backend plugin returns from `init_backend`: this rank's device and its collectives."""

    rank: int
    world_size: int
    device: torch.device

    def all_gather(self, values: list[float]) -> list[list[float]]:
        """Every rank's `values` (same length everywhere), in rank order. Doubles; a few numbers, not for tensors."""

    def broadcast(self, value: Any) -> Any:
        """Rank 0's `value` (plain data) on every rank."""

    def synchronize(self) -> None:
        """Waits until this rank's device has finished all queued work (for the clock)."""

    def shutdown(self) -> None: ...


class Workload(Protocol):
    """What a workload plugin returns from `make_workload`. Every random draw must come from `ctx.seed_for(...)`."""

    spec: WorkloadSpec
    targets: list[Target]
    eval_cadence: EvalCadence
    max_epochs: int
    global_batch_size: int
    train_samples: int
    eval_samples: int

    def check_data(self) -> None:
        """Before the clock: files exist and sums match (DataError), without reading training examples."""

    def build_model(self) -> nn.Module:
        """The model on the CPU, initialised from the run's seed."""

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        """The repeated blocks of `model`, in order: what sharding and activation checkpointing act on."""

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer: ...

    def learning_rate(self, step: int) -> float:
        """For the step with this number, counted from 0."""

    def batches(self, epoch: int, first_batch: int) -> Iterable[Batch]:
        """This rank's batches of one epoch, in host memory or on the device, from batch number `first_batch` on: the
        same as when the epoch is read from its start. Every rank yields equally many. Another thread may iterate."""

    def synthetic_batch(self) -> Batch:
        """A full-sized batch of random data on the device; touches no file."""

    def loss(self, model: nn.Module, data: Any) -> Outputs:
        """At least "loss": the mean over the local examples, a scalar with gradient."""

    def infer(self, model: nn.Module, data: Any) -> Any:
        """What `evaluate` needs of the model for one batch."""

    def evaluate(self, infer: Forward) -> dict[str, float]:
        """Quality over the whole evaluation set, each example counted once; alike on every rank. Uses `ctx.feed`."""

    def log_values(self) -> Mapping[str, Any]:
        """mllog keys of the v1.1 rules for this benchmark (hyperparameters), with their values."""

    def weight_names(self, model: nn.Module) -> list[str]:
        """Names for `weights_initialization`, as the closed rules spell them; [] where they do not apply."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@runtime_checkable
class Bucketed(Protocol):
    """A workload with `capture="partial"` whose batches come in other shapes than that of its synthetic batch."""

    def capture_batches(self) -> Iterable[Batch]:
        """A synthetic batch on the device for each shape that `capture_parts` may meet, those first that are wanted
        most: some may be left out. Each is made when it is asked for. What the parts are not given may be small."""


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Proof that a plugin took effect in this run. `summary` is one line; `figures` hold the numbers behind it."""

    plugin: str
    active: bool
    summary: str
    figures: Mapping[str, Any] = field(default_factory=dict[str, Any])
    numerics: Numerics | None = None
    """What it does to the numbers in this composition, where that differs from the spec's declaration."""


class Plugin:
    """What a plugin's class inherits: it is constructed with its validated `Config` and implements hooks."""

    spec: ClassVar[PluginSpec]
    Config: ClassVar[type]  # a dataclass whose values come from the plugin's YAML

    def __init__(self, config: Any) -> None:
        self.config = config

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must carry for this plugin: tensors and plain data."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave."""


class Plan(Protocol):
    """What is known before a process starts: what the hook `check` may look at. Torch-free."""

    @property
    def root(self) -> RunConfig: ...


@dataclass(kw_only=True)
class RunContext:
    """What hooks are given: the configuration, this rank's place, and what has been built so far."""

    config: RunConfig
    run_dir: Path
    seed: int
    nproc_per_node: int = field(default_factory=lambda: int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    position: Position = field(default_factory=Position)
    # Filled in, in this order, while the run is built:
    backend: Backend = field(init=False)
    workload: Workload = field(init=False)
    model: nn.Module = field(init=False)
    """The bare model: parameters and buffers under the workload's own names, whatever wraps it."""
    distributed_model: nn.Module = field(init=False)  # what `distribute` made of it: the module that training calls
    optimizer: torch.optim.Optimizer = field(init=False)
    infer: Forward = field(init=False)
    """Inference as the opts made it, for a workload's own use: call it in evaluation mode and without gradient."""
    feed: Callable[[Iterable[Any]], Iterator[Any]] = field(init=False)
    """Moves pytrees of tensors (a `Batch` is one), one after the other, to the device."""
    component: Callable[[str, Any], Any] = field(init=False)
    """`component(name, default)` offers a seam to the opts by name and returns what they made of `default`."""
    figures: dict[str, Any] = field(default_factory=dict[str, Any])
    """Counts that plugins want in result.json, such as "bad_examples"."""

    @property
    def rank(self) -> int:
        return self.backend.rank

    @property
    def world_size(self) -> int:
        return self.backend.world_size

    @property
    def device(self) -> torch.device:
        return self.backend.device

    @property
    def synthetic(self) -> bool:
        return self.config.data.source == "synthetic"

    def seed_for(self, *names: str | int) -> int:
        """A 63-bit seed for one purpose, such as `("shuffle", epoch)`: a function of the run's seed and the names."""
        text = "/".join(str(n) for n in (self.seed, *names))
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
