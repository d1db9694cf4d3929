"""Prints what becomes of the installed opts, singly on every workload and in pairs, as two Markdown tables.

    uv run python tools/matrix.py [WORKLOAD ...]

A sign says how the numbers relate to the baseline's (`=` the same bits, `~` within tolerance, `Δ` changed, as
declared). `x` is a conflict that the opts declare, `·` means that the workload lacks what an opt replaces, `○` that
this machine lacks what one requires. Each pair is tried on the first workload that offers both, in an order that
differs from pair to pair. Anything else is a defect, named on stderr, and ends in exit status 1.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from core.testing.matrix import Cell, installed_opts, pairs, try_composition

WORKLOADS = {
    "toy": ("workload=toy", "stop.steps=6"),
    "resnet": ("workload=resnet", "workload.width=8", "stop.steps=4"),
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
        "workload.global_batch_size=8", "workload.eval_first_epoch=1", "workload.least_score=0.0001", "stop.epochs=1",
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
