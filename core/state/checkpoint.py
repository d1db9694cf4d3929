"""Checkpoints: complete or absent, checked by SHA-256, and made of tensors and plain data only.

    checkpoints/step_00000040/
        shared.safetensors      model, optimizer, position, log offsets (written by rank 0)
        rank0.safetensors ...   each rank's own: generator states, workload and plugin states
        manifest.json           SHA-256 of each file; written last, then the folder is renamed into place

Loading parses safetensors and JSON, which is their metadata, and so executes nothing. `save` and `load` take trees of
dicts, lists, tuples, tensors, numbers, strings, booleans and None; another writer would replace `_write_tree` alone.
"""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from core.api import faults
from core.api.errors import CheckpointError
from core.api.files import sha256
from core.api.types import Backend

FORMAT = 2


class Checkpointer:
    """The checkpoints of one run. Every rank calls `save` and `load` together."""

    def __init__(self, folder: Path, backend: Backend, keep: int) -> None:
        self.folder, self.backend, self.keep = folder, backend, keep
        self._barrier = lambda: backend.all_gather([0.0])

    def save(self, step: int, shared: dict[str, Any], local: dict[str, Any]) -> None:
        """Commits a checkpoint, then drops the oldest beyond `keep`. On failure the previous ones are untouched."""
        rank, partial = self.backend.rank, self.folder / f".step_{step:08d}.partial"
        try:
            if rank == 0:
                for leftover in self.folder.glob(".step_*.partial"):
                    shutil.rmtree(leftover)
                partial.mkdir(parents=True)
            self._barrier()
            _write_tree(partial, f"rank{rank}", local)
            if rank == 0:
                _write_tree(partial, "shared", shared)
            faults.strike("checkpoint.write", step, rank)
            self._barrier()
            if rank == 0:
                self._commit(step, partial)
            self._barrier()
        except OSError as error:
            problem = f"cannot write a checkpoint to {self.folder}: {error.strerror}; earlier ones are intact"
            raise CheckpointError(f"{problem}: free some space and repeat the command", rank=rank, step=step) from error

    def _commit(self, step: int, partial: Path) -> None:
        files = {path.name: sha256(path) for path in partial.iterdir()}
        manifest = {"format": FORMAT, "step": step, "world_size": self.backend.world_size, "files": files}
        _write(partial / "manifest.json", json.dumps(manifest, indent=1).encode())
        faults.strike("checkpoint.commit", step, self.backend.rank)
        final = partial.with_name(f"step_{step:08d}")
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        descriptor = os.open(self.folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
        for old in sorted(self.folder.glob("step_*"), reverse=True)[self.keep :]:
            shutil.rmtree(old)

    def load(self, source: Path) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """From the newest intact checkpoint in the folder `source`, what all ranks share and this rank's own; None
        where it holds none yet. CheckpointError where there are some but each is damaged."""
        chosen = self.backend.broadcast(_newest_intact(source) if self.backend.rank == 0 else None)
        if chosen is None:
            return None
        folder, world_size = chosen
        rank = self.backend.rank if self.backend.rank < world_size else 0
        return _read_tree(folder, "shared"), _read_tree(folder, f"rank{rank}")


def _newest_intact(source: Path) -> tuple[Path, int] | None:
    """The checkpoint and its world size."""
    problems: list[str] = []
    for folder in sorted(source.glob("step_*"), reverse=True):
        step = int(folder.name.removeprefix("step_"))
        try:
            manifest = json.loads((folder / "manifest.json").read_text())
            if manifest["format"] != FORMAT:
                raise CheckpointError(f"format {manifest['format']} is not {FORMAT}")
            for name, expected in manifest["files"].items():
                if sha256(folder / name) != expected:
                    raise CheckpointError(f"{name} has changed (its SHA-256 differs)")
        except (CheckpointError, OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            problems.append(f"checkpoint of step {step} is damaged: {error}")
            continue
        for line in problems:
            print(f"timetrial: {line}; using the checkpoint of step {step}", file=sys.stderr, flush=True)
        return folder, manifest["world_size"]
    if problems:
        raise CheckpointError(f"{problems[0]}, and no other is intact in {source}; choose another run_dir")
    return None


def parameters_hash(state: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, types and bits of all parameters and buffers of a whole model, in order of name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _write_tree(folder: Path, name: str, tree: dict[str, Any]) -> None:
    tensors: dict[str, torch.Tensor] = {}
    plain = json.dumps(_strip(tree, name, tensors))
    _write(folder / f"{name}.safetensors", safetensors.torch.save(tensors, {"tree": plain}))


def _read_tree(folder: Path, name: str) -> dict[str, Any]:
    path = folder / f"{name}.safetensors"
    try:
        with safetensors.safe_open(path, "pt") as file:
            return _restore(json.loads(file.metadata()["tree"]), file.get_tensor)
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path} is not a safetensors file: {error}") from None


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


def _restore(plain: Any, tensor: Callable[[str], torch.Tensor]) -> Any:
    if not isinstance(plain, dict):
        return plain
    (tag, value), *_ = plain.items()
    if tag == "tensor":
        return tensor(value)
    if tag == "dict":
        return {key: _restore(item, tensor) for key, item in value}
    return (list if tag == "list" else tuple)(_restore(item, tensor) for item in value)


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
