"""Tensor parallelism: the linear layers of a block are split over the ranks of a tensor group, after a workload's plan.

A column-wise layer computes a part of its output features on each rank, a row-wise layer takes such parts as its input
and sums over ranks (Shoeybi et al. 2019, "Megatron-LM", arXiv:1909.08053, section 3). Between the two, activations are
split; everywhere else each rank of the group holds the same activations and computes the same with them. So the ranks
of a group must be given the same batches and the same random seed.

Parameters stay plain tensors: each rank's is its part. So DistributedDataParallel, its communication hooks, FSDP2 and
torch.compile see an ordinary, smaller model, which they do not where torch's own parallel styles make DTensors of them.
`timetrial_sharding.layout` knows what the whole is.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.distributed import _functional_collectives as funcol
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module
from torch.nn import functional as F

from core.api.errors import ConflictError, PluginError, UsageError


def parallelize(model: nn.Module, mesh: DeviceMesh, plan: Mapping[str, str]) -> dict[str, int]:
    """Splits `model` in place over the one dimension of `mesh`, and returns name -> dimension of each parameter split.

    `plan` is what a workload offers at `core.api.seams.TENSOR_PLAN`. Every rank must hold the same whole model; nothing
    is communicated. It comes before FSDP2, DistributedDataParallel and the optimizer, which are then given the parts.
    PluginError where the plan does not fit the model, ConflictError where another opt has replaced the `forward` of a
    layer, UsageError where a size is not divisible by the number of ranks.
    """
    splits: dict[str, int] = {}
    for pattern, style in plan.items():
        if style == "divide":
            _divide(model, mesh.size(), pattern)
        elif style not in STYLES:
            known = ", ".join([*STYLES, "divide"])
            raise PluginError(f"the tensor-parallel plan gives {pattern!r} the style {style!r}: use one of {known}")
        else:
            names = _matching(model, pattern, pattern)
            for name in names:
                dims = {f"{name}.{parameter}": dim for parameter, dim in STYLES[style].dims.items()}
                _check(model, name, dims, mesh.size())
                splits |= {name: dim for name, dim in dims.items() if _parameter(model, name) is not None}
            parallelize_module(model, mesh, {name: STYLES[style]() for name in names}, src_data_rank=None)
    return splits


class ColumnLinear(nn.Linear):
    """This rank's output features."""

    group: dist.ProcessGroup

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features / ranks]"""
        return super().forward(_SumGradients.apply(input, self.group))


class RowLinear(nn.Linear):
    """This rank's input features."""

    group: dist.ProcessGroup

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features / ranks] -> [..., out_features], the same on each rank"""
        output = _Sum.apply(F.linear(input, self.weight), self.group)
        return output if self.bias is None else output + self.bias.to(output.dtype)  # which autocast may have narrowed


class _SumGradients(torch.autograd.Function):
    """Each rank's part of a layer adds to the gradient of an input that all ranks share (Megatron-LM's f)."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return input.view_as(input)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _summed(grads[0], ctx.group), None


class _Sum(torch.autograd.Function):
    """Each rank's part of an output, summed; its gradient is the same on each rank (Megatron-LM's g)."""

    @staticmethod
    def forward(ctx: FunctionCtx, part: Tensor, group: dist.ProcessGroup) -> Tensor:
        return _summed(part, group)

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


@dataclass
class Sums:
    """Sums over a tensor group: how many, and of how many bytes on each rank. Those in compiled code do not count."""

    count: int = 0
    bytes: int = 0

    def since(self, before: Sums) -> Sums:
        return Sums(self.count - before.count, self.bytes - before.bytes)


SUMS = Sums()
"""All of this process."""


def _summed(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    if not torch.compiler.is_compiling():
        SUMS.count += 1
        SUMS.bytes += part.nbytes
    # Not dist.all_reduce: torch.compile loses that one where it is in the backward pass of a Function.
    return funcol.wait_tensor(funcol.all_reduce(part, "sum", group))


class _Linear(ParallelStyle):
    dims: Mapping[str, int]
    """Parameter -> the dimension in which it is split."""
    module: type[ColumnLinear | RowLinear]

    def _apply(self, module: Any, device_mesh: DeviceMesh) -> nn.Module:
        for name, dim in self.dims.items():
            whole = getattr(module, name)
            if whole is not None:
                part = whole.detach().chunk(device_mesh.size(), dim)[device_mesh.get_local_rank()]
                part = part.clone(memory_format=torch.contiguous_format)
                setattr(module, name, nn.Parameter(part, requires_grad=whole.requires_grad))
        module.out_features, module.in_features = module.weight.shape
        module.__class__ = self.module  # the same object: others may hold it, and hooks stay
        module.group = device_mesh.get_group()
        return module


class Column(_Linear):
    dims, module = {"weight": 0, "bias": 0}, ColumnLinear


class Row(_Linear):
    dims, module = {"weight": 1}, RowLinear


class Random(ParallelStyle):
    dims: Mapping[str, int] = {}

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        inner = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if not module.training:
                return inner(*args, **kwargs)
            with own_random_numbers(device_mesh):
                return inner(*args, **kwargs)

        module.forward = forward
        return module


STYLES: dict[str, type[Column | Row | Random]] = {"column": Column, "row": Row, "random": Random}


@contextmanager
def own_random_numbers(mesh: DeviceMesh) -> Generator[None]:
    """Inside, each rank of `mesh` draws different random numbers; after it all continue with the shared ones.

    The ranks' own generators follow from the shared one, so that no state has to be kept or saved for them.
    """
    seed = int(torch.randint(2**48, (), device="cpu")) + mesh.get_local_rank()
    devices = [] if mesh.device_type == "cpu" else [torch.accelerator.current_device_index()]
    with torch.random.fork_rng(devices, device_type=mesh.device_type):
        torch.manual_seed(seed)
        yield


def _matching(model: nn.Module, pattern: str, entry: str) -> list[str]:
    """The submodules that `pattern` names; `entry` is the plan's, for the error where there are none."""
    tokens = pattern.split(".")
    names = [name for name, _ in model.named_modules() if len(name.split(".")) == len(tokens)]
    found = [name for name in names if all(map(fnmatchcase, name.split("."), tokens))]
    if not found:
        raise PluginError(f"the tensor-parallel plan names {entry!r}, which matches nothing in the model")
    return found


def _divide(model: nn.Module, size: int, pattern: str) -> None:
    owner, _, attribute = pattern.rpartition(".")
    for name in _matching(model, owner, pattern):
        module = model.get_submodule(name)
        count = getattr(module, attribute, None)
        if not isinstance(count, int):
            raise PluginError(
                f"the tensor-parallel plan divides {name}.{attribute}, which is {count!r}, not an integer"
            )
        _check_divisible(f"{name}.{attribute}", count, size)
        setattr(module, attribute, count // size)


def _check(model: nn.Module, name: str, dims: Mapping[str, int], size: int) -> None:
    """That the parameters of the submodule `name` can be split in `dims`."""
    module = model.get_submodule(name)
    if dims and type(module) is not nn.Linear:
        raise PluginError(f"the tensor-parallel plan splits {name}, a {type(module).__name__}: it can split nn.Linear")
    if dims and "forward" in vars(module):  # which would still compute with the whole layer
        what = f"opt 'tensor_parallel' cannot split {name}, whose forward another opt has replaced"
        raise ConflictError(f"{what}, as 'activation_checkpointing' does; leave one of the two out")
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    for parameter, dim in dims.items():
        mine = _parameter(model, parameter)
        if mine is None:
            continue
        tied = [other for other in names if other != parameter and _parameter(model, other) is mine]
        if tied:
            raise PluginError(f"the tensor-parallel plan splits {parameter}, which is tied to {tied[0]}: leave it out")
        _check_divisible(f"dimension {dim} of {parameter}", mine.shape[dim], size)


def _parameter(model: nn.Module, name: str) -> nn.Parameter | None:
    owner, _, parameter = name.rpartition(".")
    return getattr(model.get_submodule(owner), parameter)


def _check_divisible(what: str, size: int, ranks: int) -> None:
    if size % ranks:
        problem = f"{what} is {size}, which cannot be split over {ranks} ranks"
        raise UsageError(f"{problem}: set opt.tensor_parallel.degree to a divisor of it")
