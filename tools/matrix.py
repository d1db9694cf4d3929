"""The workloads, sizes and settings of the composition matrix; runs all of it and writes tests/matrix.json.

    uv run python tools/matrix.py            every opt on every workload, and every pair, against tests/matrix.json
    uv run python tools/matrix.py --write    the same; then writes what it found

Each pair is tried on the first workload that offers both, in an order that differs from pair to pair. A verdict that
differs from tests/matrix.json is named on stderr and ends in exit status 1. `tools/generate.py` makes the page
plugins/opts/MATRIX.md of the file; `pytest -m matrix` runs the same compositions as tests.
"""

from __future__ import annotations

import argparse
import atexit
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from core.testing.matrix import Cell, installed_opts, pairs, try_composition

VERDICTS = Path(__file__).parent.parent / "tests" / "matrix.json"
"""What was agreed: {"alone": {workload: {opt: verdict}}, "together": {"opt+opt": [workload, verdict, words]}}."""


def small_images() -> str:
    """A folder with noise as 128 images to train on and 64 to evaluate, in IDX files: fewer than `resnet` embeds."""
    folder, rng = tempfile.mkdtemp(prefix="timetrial-matrix-"), np.random.default_rng(1)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for split, count in (("train", 128), ("t10k", 64)):
        for kind, shape, values in (("images-idx3", (count, 12, 12), 256), ("labels-idx1", (count,), 10)):
            header = np.array([0x800 + len(shape), *shape], dtype=">u4")
            data = rng.integers(values, size=shape, dtype=np.uint8)
            Path(folder, f"{split}-{kind}-ubyte").write_bytes(header.tobytes() + data.tobytes())
    return folder


WORKLOADS = {
    # An epoch of two or three steps, and so an evaluation that the steps after it can hide.
    "toy": ("workload=toy", "workload.examples=192", "workload.targets.accuracy=1", "stop.steps=6"),
    "resnet": ("workload=resnet", "workload.width=8", f"data.root={small_images()}", "stop.steps=4"),
    "bert": (
        "workload=bert", "data=synthetic", "workload.synthetic_fill=0.4", "workload.global_batch_size=8",
        "workload.sequence_length=16", "stop.steps=4",
    ),
    "rnnt": (
        "workload=rnnt", "data=synthetic", "workload.encoder_hidden=16", "workload.predictor_hidden=8",
        "workload.joint_hidden=16", "workload.global_batch_size=8", "workload.synthetic_seconds=1.0",
        "workload.synthetic_labels=6", "stop.steps=4",
    ),
    "maskrcnn": (
        "workload=maskrcnn", "workload.width=8", "workload.train_scenes=32", "workload.eval_scenes=4",
        "workload.global_batch_size=8", "workload.eval.first=1", "workload.least_score=0.0001", "stop.epochs=1",
    ),
    "minigo": (
        "workload=minigo", "workload.width=8", "workload.blocks=1", "workload.games=16", "workload.simulations=4",
        "workload.epoch_examples=64", "workload.global_batch_size=32", "workload.eval_games=4",
        "workload.opponent_simulations=2", "workload.eval.first=1", "workload.eval.every=1",
        "workload.targets.win_rate=1", "stop.epochs=3",
    ),
}  # fmt: skip
"""Small enough for seconds a run."""
SETTINGS = {
    "compile": ("opt.compile.backend=aot_eager",),
    "sharp": ("opt.sharp.ranks_per_node=2",),
    "fused_loss": ("opt.fused_loss.positions=16",),
    "stream_overlap": ("opt.stream_overlap.profile_after=1",),
}
"""What single opts need to run here, and fast."""
TRIPLES = [("cuda_graphs", "stream_overlap", "sharp"), ("ddp", "grad_accumulation", "tensor_parallel")]


def agreed() -> dict[str, dict]:
    """What tests/matrix.json holds."""
    return json.loads(VERDICTS.read_text())


def try_alone(opt: str, workload: str) -> Cell:
    return try_composition(WORKLOADS[workload], (opt,), SETTINGS)


def try_together(opts: Sequence[str], workloads: Sequence[str] = tuple(WORKLOADS)) -> tuple[str, Cell]:
    """The result of several opts together, and the workload it was found on: the first that offers all of them."""
    start = sum(map(ord, "".join(opts))) % len(workloads)
    for workload in (*workloads[start:], *workloads[:start]):
        cell = try_composition(WORKLOADS[workload], opts, SETTINGS)
        if cell.verdict != "not_offered":
            return workload, cell
    return "none", cell


def run_all() -> dict[str, dict]:
    """Every composition, in as many processes as there are cores; in the form of tests/matrix.json."""
    opts, compositions = sorted(installed_opts()), [*pairs(), *TRIPLES]
    singles = [(name, workload) for workload in WORKLOADS for name in opts]
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        alone = list(pool.map(try_alone, *zip(*singles, strict=True)))
        together = list(pool.map(try_together, compositions))
    found: dict[str, dict] = {"alone": {workload: {} for workload in WORKLOADS}, "together": {}}
    for (name, workload), cell in zip(singles, alone, strict=True):
        found["alone"][workload][name] = cell.verdict
        _complain(f"{name} on {workload}", cell)
    for names, (workload, cell) in zip(compositions, together, strict=True):
        words = [cell.words] if cell.verdict == "conflict" else []
        found["together"]["+".join(names)] = [workload, cell.verdict, *words]
        _complain(f"{'+'.join(names)} on {workload}", cell)
    return found


def _complain(what: str, cell: Cell) -> None:
    if cell.verdict == "broken":
        print(f"{what}: {cell.words}", file=sys.stderr)


def differences(found: dict[str, dict], old: dict[str, dict]) -> list[str]:
    """The compositions whose verdict is another one than before, in words."""
    lines: list[str] = []
    for workload, cells in found["alone"].items():
        was = old["alone"].get(workload, {})
        lines += [f"{o} on {workload}: {was.get(o)} -> {v}" for o, v in cells.items() if was.get(o) != v]
    for names, (_, verdict, *_) in found["together"].items():
        was = old["together"].get(names, [None, None])[1]
        lines += [f"{names}: {was} -> {verdict}"] if was != verdict else []
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="write what was found to tests/matrix.json")
    write = parser.parse_args().write
    found = run_all()
    changed = differences(found, agreed() if VERDICTS.exists() else {"alone": {}, "together": {}})
    print(*changed or ["every verdict is as agreed"], sep="\n")
    broken = "broken" in json.dumps(found)
    if write and not broken:
        VERDICTS.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    return 1 if broken or (changed and not write) else 0


if __name__ == "__main__":
    sys.exit(main())
