"""The data that crosses an interface between core and a plugin. Imports without torch: specs are read by `--help`.

Terms: a *rank* is one process and the *world size* their number; ranks that train on different examples are *data
ranks*; the *global batch* is what all of them consume in one step.
"""

# pyright: reportReturnType=false

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeVar

from core.api.batch import (
    Batch,
    Capture,
    EvalCadence,
    Evaluate,
    Forward,
    Outputs,
    Pending,
    Position,
    Purpose,
    Quality,
    Step,
    StepParts,
    Target,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from core.api.config import RunConfig
    from core.api.mesh import Dimension, Mesh
    from core.api.seams import Seam
    from core.api.sidecar import Sidecar

__all__ = [
    "Backend",
    "BackendSpec",
    "Batch",
    "Capture",
    "Command",
    "Devices",
    "EvalCadence",
    "Evaluate",
    "Evidence",
    "Forward",
    "Job",
    "Launcher",
    "Layout",
    "Numerics",
    "OptSpec",
    "Outputs",
    "Pending",
    "Plan",
    "Plugin",
    "PluginSpec",
    "Position",
    "Purpose",
    "Quality",
    "Ranks",
    "RunContext",
    "Step",
    "StepParts",
    "Target",
    "Workload",
    "WorkloadSpec",
]

Numerics = Literal["bitwise", "tolerance", "changes"]
Kind = Literal["workload", "backend", "opt", "tracker", "launcher", "command"]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Devices:
    """What a backend finds on this machine, without importing torch."""

    provides: frozenset[str] = frozenset()  # capabilities that opts may require, such as "cuda"
    count: int | None = None  # how many ranks this machine can serve; None means any number
    problem: str = ""  # why it cannot run here, in one line; empty where it can


@dataclass(frozen=True, kw_only=True)
class PluginSpec:
    """What every plugin declares about itself; trackers, launchers and commands declare only this."""

    interface: int  # the version of the interface it was built for (`core.INTERFACE`)
    summary: str  # one line for `timetrial plugins` and the README's table
    requires: frozenset[str] = frozenset()
    """Capabilities: what the backend provides ("cuda", "process_group"), "multi_rank", "multi_node", or "cxx" (a C++
    compiler)."""


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
    wraps: frozenset[str] = frozenset()  # names of opts that must be inside this one, where both are chosen
    claims: frozenset[str] = frozenset()
    """Exclusive roles: two opts that claim the same one conflict. "gradient_exchange": it averages the gradients of the
    data ranks; "gradient_exchange.hook": it decides how DistributedDataParallel exchanges a bucket."""
    replaces: frozenset[Seam[Any]] = frozenset()
    """Seams it acts on; at least one must be offered in a run, or the opt would be silently inactive."""


@dataclass(frozen=True, kw_only=True)
class WorkloadSpec(PluginSpec):
    benchmark: str
    """Name in MLPerf Training v1.1, for the log: resnet, bert, rnnt, maskrcnn, minigo, ssd, dlrm, unet3d."""
    preparation: frozenset[str] = frozenset()
    """Keys of its configuration that `core.prepare` depends on. Files prepared with the same values of these stay
    usable, whatever the other keys are."""
    batch_statistics: bool = False
    """Whether the loss of an example depends on its neighbours in the (micro-)batch, as with batch normalisation."""


class Backend(Protocol):
    """What a backend plugin returns from `init_backend`: this rank's device and its collectives."""

    rank: int
    world_size: int
    device: torch.device

    def all_gather(self, values: list[float]) -> list[list[float]]:
        """Every rank's `values` (same length everywhere), in rank order. Doubles; a few numbers, not for tensors.
        Workloads use `RunContext.gather`, which counts each example once however the model is split."""

    def broadcast(self, value: Any) -> Any:
        """Rank 0's `value` (plain data) on every rank."""

    def synchronize(self) -> None:
        """Waits until this rank's device has finished all queued work (for the clock)."""

    def shutdown(self) -> None: ...


class Layout(Protocol):
    """How the state of the model is laid out over the ranks. Core's own is for a model that each rank holds whole; an
    opt that splits parameters wraps it in the hook `lay_out`. All ranks call each method together, except
    `local_parameters`.

    *Whole* states are what a single rank without any opt would have: tensors of full size under the workload's names,
    and the optimizer's state by the number that a parameter has in the whole model.
    """

    def local_parameters(self) -> Iterable[Tensor]:
        """What this rank holds of each parameter, as plain tensors; some may be empty."""

    def model_state(self) -> dict[str, Tensor]:
        """The whole parameters and buffers; buffers may differ from rank to rank."""

    def load_model_state(self, state: Mapping[str, Tensor]) -> None:
        """Takes this rank's part out of a whole state."""

    def optimizer_state(self) -> dict[str, Any]:
        """The whole state of the optimizer."""

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        """Takes this rank's part out of a whole state."""


class Workload(Protocol):
    """What a workload plugin returns from `make_workload`. Every random draw must come from `ctx.seed_for(...)`.

    It sees only data ranks: `ctx.data_rank`, `ctx.data_size` and `ctx.gather`.
    """

    spec: WorkloadSpec
    targets: list[Target]
    eval_cadence: EvalCadence
    max_epochs: int
    global_batch_size: int
    train_samples: int
    eval_samples: int
    capture: Capture

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

    def example_batches(self) -> Iterable[Batch]:
        """A batch of random data for each shape that matters, the most important first; each is made when it is asked
        for and touches no file. The first is a full batch: synthetic runs train on it and the warm-up uses it. Where
        there is only one, every full batch of training has its shape; a captured part may be all that later ones
        fit."""

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


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """How many processes a run has."""

    world_size: int
    per_node: int


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a launcher starts: a process for each rank, and what it has to find."""

    run_dir: Path
    ranks: Ranks
    command: tuple[str, ...]
    """argv of one rank. Its environment must hold RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and
    MASTER_PORT, as torch.distributed.run sets them, beside what this process has."""
    run_here: Callable[[], int] | None
    """Runs the only rank in this process and returns its exit status; None where there are several, or where the run
    must have its own process."""


class Launcher(Plugin):
    """The base class of launchers: how the processes of a run are started. `Config` inherits `LaunchConfig`."""

    def ranks(self) -> Ranks:
        """How many it starts. Torch-free; asked for while the command is checked."""
        raise NotImplementedError

    def launch(self, job: Job) -> int:
        """Starts the ranks, waits for them and returns an exit status: 0 where all came to an end, whatever the run's
        own status. A rank leaves what went wrong in `job.run_dir`/errors."""
        raise NotImplementedError


class Command(Plugin):
    """The base class of commands: `timetrial NAME ...`. What it prints on `--help` is up to its own parser."""

    def run(self, arguments: list[str]) -> int:
        """Returns the exit status; TimetrialError becomes one line."""
        raise NotImplementedError


class Plan(Protocol):
    """What is known before a process starts: what the hook `check` may look at. Torch-free."""

    seed: int
    world_size: int
    ranks_per_node: int
    dimensions: tuple[Dimension, ...]

    @property
    def root(self) -> RunConfig: ...

    @property
    def opts(self) -> tuple[str, ...]:
        """Names of the opts, from the innermost to the outermost."""

    @property
    def workload(self) -> str:
        """Name of the workload's option, such as "bert_mlperf"."""


@dataclass(kw_only=True)
class RunContext:
    """What hooks are given: the configuration, this rank's place, and what has been built so far."""

    config: RunConfig
    run_dir: Path
    seed: int
    ranks_per_node: int = 1
    sidecar: str = ""
    """In a helper process beside a rank: the name of the opt that started it. Empty in a rank."""
    position: Position = field(default_factory=Position)
    # Filled in, in this order, while the run is built:
    backend: Backend = field(init=False)
    mesh: Mesh = field(init=False)
    workload: Workload = field(init=False)
    model: nn.Module = field(init=False)
    """The bare model: parameters and buffers under the workload's own names, whatever wraps it."""
    distributed_model: nn.Module = field(init=False)  # what `distribute` made of it: the module that training calls
    optimizer: torch.optim.Optimizer = field(init=False)
    layout: Layout = field(init=False)
    parts: StepParts = field(init=False)
    infer: Forward = field(init=False)
    """Inference as the opts made it, for a workload's own use: call it in evaluation mode and without gradient."""
    feed: Callable[[Iterable[Any]], Iterator[Any]] = field(init=False)
    """Moves the data of evaluation batches (pytrees of tensors), one after the other, to the device: through the opts'
    transforms, as training batches go."""
    evaluate: Callable[[], Quality] = field(init=False)
    """The evaluation of the model as it is now, as the opts made it."""
    offers: Callable[[Seam[Any], Any], Any] = field(init=False)
    to_device: Callable[[Iterable[Batch], Purpose], Iterator[Batch]] = field(init=False)
    """The path of every batch: through the opts' transforms and the feed, one after the other and in order."""
    start_sidecar: Callable[..., Sidecar] = field(init=False)
    """`start_sidecar(name, serve, device, threads, alone=True)`: see `core.api.sidecar`."""
    figures: dict[str, Any] = field(default_factory=dict[str, Any])
    """Counts that plugins want in result.json, such as "bad_examples"."""

    def offer(self, seam: Seam[T], default: T) -> T:
        """Offers a seam to the opts; returns what they made of `default`."""
        return self.offers(seam, default)

    @property
    def rank(self) -> int:
        return self.backend.rank

    @property
    def world_size(self) -> int:
        return self.backend.world_size

    @property
    def data_rank(self) -> int:
        """Which share of each global batch is this rank's."""
        return self.mesh.data_rank

    @property
    def data_size(self) -> int:
        """How many shares a global batch is cut into."""
        return self.mesh.data_size

    @property
    def device(self) -> torch.device:
        return self.backend.device

    @property
    def synthetic(self) -> bool:
        return self.config.data.source == "synthetic"

    def gather(self, values: list[float]) -> list[list[float]]:
        """The `values` of every data rank (same length everywhere), in order: doubles, a few numbers. All ranks call it
        together."""
        table = self.backend.all_gather(values)
        return [table[rank] for rank in self.mesh.speakers]

    def seed_for(self, *names: str | int) -> int:
        """A 63-bit seed for one purpose, such as `("shuffle", epoch)`: a function of the run's seed and the names."""
        text = "/".join(str(n) for n in (self.seed, *names))
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
