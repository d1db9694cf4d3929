"""Parts of a model as graphs, for a workload whose step cannot be captured as a whole."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from core.api.errors import OutOfMemoryError, UsageError
from core.api.generators import generator_states, set_generator_states

Signature = tuple[tuple[torch.Size, torch.dtype, torch.device, bool], ...]
"""Of a part's arguments: all that its graph takes as fixed."""

MakeGraphed = Callable[[tuple[nn.Module, ...], tuple[tuple[Tensor, ...], ...]], Any]
"""`torch.cuda.make_graphed_callables`: replaces each module's `forward`, given examples of its arguments."""


@dataclass
class Part:
    """One submodule: its forward pass as written and as graphs, and how often each ran in training."""

    eager: Callable[..., Any]
    graphs: dict[tuple[Signature, Signature], Callable[..., Any]] = field(default_factory=dict[Any, Any])
    """By the arguments of the step's first part, and by its own."""
    replays: Counter[Signature] = field(default_factory=Counter[Signature])
    """0 for what was captured and not met yet."""
    eager_calls: Counter[Signature] = field(default_factory=Counter[Signature])


@dataclass
class _Step:
    """The step under way: what its first part was given."""

    first: Signature = ()


@dataclass(frozen=True)
class _Call:
    """How a forward pass called a part."""

    arguments: tuple[Tensor, ...]
    autocast: tuple[bool, torch.dtype]

    @property
    def signature(self) -> Signature:
        return signature(self.arguments)


def graph_parts(
    model: nn.Module,
    names: tuple[str, ...],
    passes: Iterable[Callable[[], Any]],
    most: int,
    device: torch.device,
    make_graphed: MakeGraphed,
) -> dict[str, Part]:
    """Replaces the forward passes of the submodules `names` by graphs, for arguments shaped as in any of `passes`, each
    of which makes one forward pass in training mode. Other shapes, and evaluation, take the forward pass as written.
    Passes are asked for until `most` shapes are recorded; those that the first part cannot tell apart count once.

    All graphs may share one pool of memory, as long as `make_graphed` records on one stream: those of one pass are
    recorded in the order in which they run, and a step replays those of one pass only. Until its update it needs
    nothing else from the pool, and the next step needs nothing of it.

    Leaves parameters, buffers and random generators as they were. To be called before DistributedDataParallel wraps the
    model. UsageError for a part that a graph cannot replace, OutOfMemoryError for too many shapes.
    """
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generators = generator_states(device)
    modules = {name: _find(model, name) for name in names}
    parts = {name: Part(module.forward) for name, module in modules.items()}
    order: list[str] = []
    for run in passes:
        calls = _observe(modules, run, device.type)
        order = order or list(calls)
        first = calls[order[0]].signature
        if (first, first) in parts[order[0]].graphs:
            continue  # steps of this shape take the graphs of the earlier one
        try:
            _record(modules, parts, calls, first, make_graphed, device.type)
        except torch.OutOfMemoryError as error:
            done = len(parts[order[0]].graphs)
            if not done:
                raise
            problem = f"out of memory: cuda_graphs has captured {done} shapes of batches and can hold no more"
            fewer = max(1, done // 2)  # what is left over is for the rest of a step
            raise OutOfMemoryError(f"{problem}; set opt.cuda_graphs.max_shapes={fewer}") from error
        if len(parts[order[0]].graphs) == most:
            break
    step = _Step()
    for name in order:
        modules[name].forward = _dispatch(modules[name], parts[name], step, leads=name == order[0])
    for tensor in model.parameters():
        tensor.grad = None
    model.load_state_dict(before)
    set_generator_states(device, generators)
    return {name: parts[name] for name in order}


def signature(arguments: tuple[Any, ...]) -> Signature:
    return tuple((a.shape, a.dtype, a.device, a.requires_grad) for a in arguments)


def _find(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise UsageError(f"cuda_graphs: the model has no part '{name}', which its workload names for capture") from None


def _observe(modules: dict[str, nn.Module], run: Callable[[], Any], device_type: str) -> dict[str, _Call]:
    """Runs one forward pass and returns how each part was called, in that order."""
    calls: dict[str, _Call] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if name in calls:
                raise UsageError(
                    f"cuda_graphs: part '{name}' runs twice in a step; a graph holds one run's activations"
                )
            if kwargs or not all(isinstance(a, Tensor) for a in args):
                raise UsageError(f"cuda_graphs: part '{name}' takes arguments other than positional tensors")
            examples = tuple(a.detach().clone().requires_grad_(a.requires_grad) for a in args)
            autocast = (torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type))
            calls[name] = _Call(examples, autocast)

        return hook

    handles = [module.register_forward_pre_hook(note(name), with_kwargs=True) for name, module in modules.items()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    unused = sorted(modules.keys() - calls.keys())
    if unused:
        raise UsageError(f"cuda_graphs: part '{unused[0]}' does not run in a training step")
    return calls


def _record(
    modules: dict[str, nn.Module],
    parts: dict[str, Part],
    calls: dict[str, _Call],
    first: Signature,
    make_graphed: MakeGraphed,
    device_type: str,
) -> None:
    """Adds each part's graph for one shape; the modules keep the forward pass as written."""
    enabled, dtype = _one_autocast(calls)
    # Under autocast the weights' 16-bit copies would otherwise be cached, and freed with the cache.
    context = torch.autocast(device_type, dtype, cache_enabled=False) if enabled else nullcontext()
    with context:  # in the order in which they ran: the graphs share memory
        make_graphed(tuple(modules[name] for name in calls), tuple(call.arguments for call in calls.values()))
    for name, call in calls.items():
        parts[name].graphs[first, call.signature] = modules[name].forward
        parts[name].replays[call.signature] = 0
        modules[name].forward = parts[name].eager


def _one_autocast(calls: dict[str, _Call]) -> tuple[bool, torch.dtype]:
    states = {call.autocast for call in calls.values()}
    if len(states) > 1:
        raise UsageError("cuda_graphs: the parts to capture run under different autocast settings")
    return states.pop()


def _dispatch(module: nn.Module, part: Part, step: _Step, *, leads: bool) -> Callable[..., Any]:
    """The forward pass of a part from now on. The first part of a step decides whose graphs the others may replay:
    those of two shapes in one step would overwrite each other's activations."""

    def forward(*args: Any) -> Any:
        if not module.training:
            return part.eager(*args)
        mine = signature(args)
        if leads:
            step.first = mine
        graph = part.graphs.get((step.first, mine))
        if graph is None:
            part.eager_calls[mine] += 1
            return part.eager(*args)
        part.replays[mine] += 1
        return graph(*args)

    return forward
