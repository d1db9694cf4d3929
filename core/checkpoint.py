"""Checkpoints: complete or absent, checked by SHA-256, and made of tensors and plain data only.

    checkpoints/step_00000040/
        shared.safetensors shared.json      model, optimizer, position, log offsets (written by rank 0)
        rank0.safetensors rank0.json ...    each rank's own: generator states, workload and plugin states
        manifest.json                       SHA-256 of each file; written last, then the folder is renamed into place

Loading parses safetensors and JSON and so executes nothing. `save` and `load` take trees of dicts, lists, tuples,
tensors, numbers, strings, booleans and None; a later asynchronous or sharded writer replaces `_write_tree` alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch.utils import _pytree as pytree

from core.errors import CheckpointError
from core.testing import faults
from core.types import Backend

FORMAT = 1


@dataclass(frozen=True)
class Saved:
    """What was loaded: the state that all ranks share and this rank's own."""

    step: int
    shared: dict[str, Any]
    local: dict[str, Any]


class Checkpointer:
    """The checkpoints of one run. Every rank calls `save` and `load` together."""

    def __init__(self, folder: Path, backend: Backend, keep: int) -> None:
        self.folder, self.backend, self.keep = folder, backend, keep
        self.fault = faults.armed()

    def save(self, step: int, shared: dict[str, Any], local: dict[str, Any]) -> None:
        """Commits a checkpoint, then drops the oldest beyond `keep`. On failure the previous ones are untouched."""
        rank, partial = self.backend.rank, self.folder / f".step_{step:08d}.partial"
        try:
            if rank == 0:
                for leftover in self.folder.glob(".step_*.partial"):
                    shutil.rmtree(leftover)
                partial.mkdir(parents=True)
            self._barrier()
            sums = _write_tree(partial, f"rank{rank}", local)
            if rank == 0:
                sums |= _write_tree(partial, "shared", shared)
            (partial / f"sums{rank}.json").write_text(json.dumps(sums))
            self._strike("checkpoint.write", step)
            self._barrier()
            if rank == 0:
                self._commit(step, partial)
            self._barrier()
        except OSError as error:
            problem = f"cannot write a checkpoint to {self.folder}: {error.strerror}"
            remedy = "earlier checkpoints are intact: free some space and run the same command again"
            raise CheckpointError(f"{problem}; {remedy}", rank=rank, step=step) from error

    def _commit(self, step: int, partial: Path) -> None:
        files: dict[str, str] = {}
        for path in partial.glob("sums*.json"):
            files |= json.loads(path.read_text())
            path.unlink()
        manifest = {"format": FORMAT, "step": step, "world_size": self.backend.world_size, "files": files}
        _write(partial / "manifest.json", json.dumps(manifest, indent=1).encode())
        self._strike("checkpoint.commit", step)
        final = self.folder / f"step_{step:08d}"
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        descriptor = os.open(self.folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
        for old in self.steps()[self.keep :]:
            shutil.rmtree(self.folder / f"step_{old:08d}")

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, newest first."""
        return sorted((int(p.name[5:]) for p in self.folder.glob("step_*") if p.is_dir()), reverse=True)

    def load(self) -> Saved | None:
        """The newest intact checkpoint; None where none was ever completed.

        Raises CheckpointError where there are checkpoints but every one is damaged.
        """
        chosen = self.backend.broadcast(self._newest_intact() if self.backend.rank == 0 else None)
        if chosen is None:
            return None
        folder = self.folder / f"step_{chosen:08d}"
        manifest = json.loads((folder / "manifest.json").read_text())
        rank = self.backend.rank if self.backend.rank < manifest["world_size"] else 0
        return Saved(chosen, _read_tree(folder, "shared"), _read_tree(folder, f"rank{rank}"))

    def _newest_intact(self) -> int | None:
        problems: list[str] = []
        for step in self.steps():
            problem = _damage(self.folder / f"step_{step:08d}")
            if problem is None:
                for line in problems:
                    print(f"timetrial: {line}; using the checkpoint of step {step}", file=sys.stderr, flush=True)
                return step
            problems.append(f"checkpoint of step {step} is damaged: {problem}")
        if problems:
            raise CheckpointError(f"{problems[0]}, and no other is intact in {self.folder}; choose another run_dir")
        return None

    def _strike(self, point: str, step: int) -> None:
        if self.fault:
            self.fault.strike(point, step, self.backend.rank)

    def _barrier(self) -> None:
        self.backend.all_gather([0.0])


def gathered(tree: Any) -> Any:
    """The pytree with each tensor that is sharded over ranks made whole. Every rank calls it together."""
    return pytree.tree_map_only(torch.Tensor, lambda t: t.full_tensor() if hasattr(t, "full_tensor") else t, tree)


def scattered(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`whole` sharded over ranks as `like` is, where `like` is sharded and has its shape; else `whole` itself."""
    if not hasattr(like, "full_tensor") or whole.shape != like.shape:
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def parameters_hash(model: torch.nn.Module) -> str:
    """SHA-256 over names, types and bits of all parameters and buffers, in order of name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(gathered(model.state_dict()).items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def generator_states(device: torch.device) -> dict[str, Any]:
    """The process-wide generators that a model may draw from (dropout): torch's, on the CPU and on the device."""
    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states["device"] = torch.get_device_module(device).get_rng_state(device)
    return states


def set_generator_states(device: torch.device, states: dict[str, Any]) -> None:
    torch.set_rng_state(states["cpu"])
    if "device" in states and device.type != "cpu":
        torch.get_device_module(device).set_rng_state(states["device"], device)


def _damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint; None if nothing is."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        if manifest["format"] != FORMAT:
            return f"format {manifest['format']} is not {FORMAT}"
        for name, expected in manifest["files"].items():
            if hashlib.sha256((folder / name).read_bytes()).hexdigest() != expected:
                return f"{name} has changed (its SHA-256 differs)"
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _write_tree(folder: Path, name: str, tree: dict[str, Any]) -> dict[str, str]:
    """Writes a tree as name.safetensors and name.json; returns file name -> SHA-256."""
    tensors: dict[str, torch.Tensor] = {}
    plain = _strip(tree, name, tensors)
    files = {f"{name}.json": json.dumps(plain).encode(), f"{name}.safetensors": safetensors.torch.save(tensors)}
    for file, data in files.items():
        _write(folder / file, data)
    return {file: hashlib.sha256(data).hexdigest() for file, data in files.items()}


def _read_tree(folder: Path, name: str) -> dict[str, Any]:
    try:
        tensors = safetensors.torch.load((folder / f"{name}.safetensors").read_bytes())
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{folder / name}.safetensors is refused, it is no safetensors file: {error}") from None
    return _restore(json.loads((folder / f"{name}.json").read_text()), tensors)


def _strip(tree: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    """The tree as JSON, its tensors moved to `tensors`. Containers are tagged: JSON has no int keys and no tuples."""
    if isinstance(tree, torch.Tensor):
        tensors[path] = tree.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"tensor": path}
    if isinstance(tree, dict):
        return {"dict": [[key, _strip(value, f"{path}/{key}", tensors)] for key, value in tree.items()]}
    if isinstance(tree, list | tuple):
        items = [_strip(value, f"{path}/{i}", tensors) for i, value in enumerate(tree)]
        return {"list" if isinstance(tree, list) else "tuple": items}
    if tree is None or isinstance(tree, bool | int | float | str):
        return tree
    raise CheckpointError(f"{path} is a {type(tree).__name__}; only tensors and plain data can be saved")


def _restore(plain: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if not isinstance(plain, dict):
        return plain
    (tag, value), *_ = plain.items()
    if tag == "tensor":
        return tensors[value]
    if tag == "dict":
        return {key: _restore(item, tensors) for key, item in value}
    items = [_restore(item, tensors) for item in value]
    return items if tag == "list" else tuple(items)


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
