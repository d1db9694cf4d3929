"""Prints what becomes of the installed opts, singly on every workload and in pairs, as two Markdown tables.

    uv run python tools/matrix.py [WORKLOAD ...]

A sign says how the numbers relate to the baseline's (`=` the same bits, `~` within tolerance, `Δ` changed, as
declared). `x` is a conflict that the opts declare, `·` means that the workload lacks what an opt replaces, `○` that
this machine lacks what one requires. Each pair is tried on the first workload that offers both, in an order that
differs from pair to pair. Anything else is a defect, named on stderr, and ends in exit status 1.
"""

from __future__ import annotations

import atexit
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
TRIPLES = [("cuda_graphs", "stream_overlap", "sharp")]
SIGNS = {"bitwise": "=", "tolerance": "~", "changes": "Δ"}
REFUSALS = {"conflict": "x", "not offered": "·", "not here": "○", "broken": "**!**"}


def sign(cell: Cell) -> str:
    return SIGNS[cell.words] if cell.verdict == "trains" else REFUSALS[cell.verdict]


def try_pair(opts: Sequence[str], workloads: Sequence[str]) -> tuple[str, Cell]:
    """What becomes of several opts together, and on which workload: all are alike to them but for what it offers."""
    start = sum(map(ord, "".join(opts))) % len(workloads)
    for workload in (*workloads[start:], *workloads[:start]):
        cell = try_composition(WORKLOADS[workload], opts, SETTINGS)
        if cell.verdict != "not offered":
            return workload, cell
    return "none", cell


def main() -> int:
    workloads, opts = sys.argv[1:] or list(WORKLOADS), sorted(installed_opts())
    compositions = [*pairs(), *TRIPLES]
    singles = [(name, workload) for name in opts for workload in workloads]
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        alone = pool.map(
            try_composition, *zip(*((WORKLOADS[w], (name,), SETTINGS) for name, w in singles), strict=True)
        )
        together = pool.map(try_pair, compositions, [workloads] * len(compositions))
        found = {(name, w): (w, cell) for (name, w), cell in zip(singles, alone, strict=True)}
        found |= dict(zip(compositions, together, strict=True))
    broken = {key: (w, cell) for key, (w, cell) in found.items() if cell.verdict == "broken"}
    for composition, (workload, cell) in broken.items():
        print(f"{workload}, {' '.join(composition)}: {cell.words}", file=sys.stderr)
    print_table(["alone", *workloads], [[name, *(sign(found[name, w][1]) for w in workloads)] for name in opts])
    numbered = [f"{number} {name}" for number, name in enumerate(opts, 1)]
    rows = [
        [title, *("" if one == two else sign(found[min(one, two), max(one, two)][1]) for two in opts)]
        for title, one in zip(numbered, opts, strict=True)
    ]
    print_table(["together", *(str(number + 1) for number in range(len(opts)))], rows)
    for triple in TRIPLES:
        print(f"\n{' + '.join(triple)}: {sign(found[triple][1])}")
    words = [cell.words for _, cell in found.values() if cell.verdict == "conflict"]
    print("\nConflicts:\n", *(f"- {text}" for text in dict.fromkeys(words)), sep="\n")
    return 1 if broken else 0


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    for row in (head, ["---"] * len(head), *rows):
        print(f"| {' | '.join(row)} |")
    print()


if __name__ == "__main__":
    sys.exit(main())
