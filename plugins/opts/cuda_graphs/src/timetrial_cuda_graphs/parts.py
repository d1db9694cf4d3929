"""Parts of a model as graphs, for a workload whose step cannot be captured as a whole."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from core.checkpoint import generator_states, set_generator_states
from core.errors import UsageError

Signature = tuple[tuple[torch.Size, torch.dtype, torch.device], ...]

MakeGraphed = Callable[[tuple[nn.Module, ...], tuple[tuple[Tensor, ...], ...]], Any]
"""`torch.cuda.make_graphed_callables`: replaces each module's `forward`, given examples of its arguments."""


@dataclass
class Part:
    """One submodule: its forward pass as written, as a graph, and how often each ran in training."""

    eager: Callable[..., Any]
    graphed: Callable[..., Any]
    signature: Signature
    replays: int = 0
    eager_calls: int = 0


@dataclass(frozen=True)
class _Call:
    """How a forward pass called a part."""

    arguments: tuple[Tensor, ...]
    autocast: tuple[bool, torch.dtype]


def graph_parts(
    model: nn.Module, names: tuple[str, ...], run: Callable[[], Any], device: torch.device, make_graphed: MakeGraphed
) -> dict[str, Part]:
    """Replaces the forward passes of the submodules `names` by graphs, for arguments shaped as in `run`, which makes
    one forward pass in training mode. Other shapes, and evaluation, take the forward pass as written.

    Leaves parameters, buffers and random generators as they were. To be called before DistributedDataParallel wraps the
    model. UsageError for a part that a graph cannot stand in for.
    """
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generators = generator_states(device)
    modules = {name: _find(model, name) for name in names}
    calls = _observe(modules, run, device.type)
    order = list(calls)  # as they ran: the graphs share memory, so the order of recording must be that of replaying
    eager = {name: modules[name].forward for name in order}
    enabled, dtype = _one_autocast(calls)
    # Under autocast the weights' 16-bit copies would otherwise be cached, and freed with the cache.
    context = torch.autocast(device.type, dtype, cache_enabled=False) if enabled else nullcontext()
    with context:
        make_graphed(tuple(modules[name] for name in order), tuple(calls[name].arguments for name in order))
    parts: dict[str, Part] = {}
    for name in order:
        part = Part(eager[name], modules[name].forward, signature(calls[name].arguments))
        modules[name].forward = _dispatch(modules[name], part)
        parts[name] = part
    for tensor in model.parameters():
        tensor.grad = None
    model.load_state_dict(before)
    set_generator_states(device, generators)
    return parts


def signature(arguments: tuple[Any, ...]) -> Signature:
    return tuple((a.shape, a.dtype, a.device) for a in arguments)


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
                raise UsageError(f"cuda_graphs: part '{name}' takes other arguments than tensors in order")
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


def _one_autocast(calls: dict[str, _Call]) -> tuple[bool, torch.dtype]:
    states = {call.autocast for call in calls.values()}
    if len(states) > 1:
        raise UsageError("cuda_graphs: the parts to capture run under different autocast settings")
    return states.pop()


def _dispatch(module: nn.Module, part: Part) -> Callable[..., Any]:
    def forward(*args: Any) -> Any:
        if not module.training:
            return part.eager(*args)
        if signature(args) != part.signature:
            part.eager_calls += 1
            return part.eager(*args)
        part.replays += 1
        return part.graphed(*args)

    return forward
