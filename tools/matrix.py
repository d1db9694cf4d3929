"""Prints what becomes of every pair of installed opts, as one Markdown table for the README.

    uv run python tools/matrix.py [WORKLOAD ...]

A cell has a sign for each workload, or one where they agree: how the numbers relate to the baseline's (`=` the same
bits, `~` within tolerance, `Δ` changed, as declared), `x` for a conflict that the opts declare, `·` where the workload
lacks what one of them replaces, `○` where this machine lacks what one requires. Anything else is a defect, named on
stderr, and ends in exit status 1.
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


def together(cells: Sequence[Cell]) -> str:
    """What a composition came to on each workload, in as many signs as are needed."""
    signs = [sign(cell) for cell in cells]
    return signs[0] if len(set(signs)) == 1 else " ".join(signs)


def main() -> int:
    workloads, opts = sys.argv[1:] or list(WORKLOADS), sorted(installed_opts())
    compositions: list[tuple[str, ...]] = [*((name,) for name in opts), *pairs(), *TRIPLES]
    jobs = [(WORKLOADS[name], composition, SETTINGS) for composition in compositions for name in workloads]
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        found = list(pool.map(try_composition, *zip(*jobs, strict=True)))
    cells = {c: found[i * len(workloads) : (i + 1) * len(workloads)] for i, c in enumerate(compositions)}
    broken = [
        (w, c, cell) for c in cells for w, cell in zip(workloads, cells[c], strict=True) if cell.verdict == "broken"
    ]
    for workload, composition, cell in broken:
        print(f"{workload} {'+'.join(composition)}: {cell.words}", file=sys.stderr)
    print(f"| {', '.join(workloads)} | {' | '.join(str(n + 1) for n in range(len(opts)))} |")
    print(f"|{'---|' * (len(opts) + 1)}")
    for number, one in enumerate(opts):
        row = [together(cells[tuple(sorted({one, other}))]) for other in opts]
        print(f"| {number + 1} {one} | {' | '.join(row)} |")
    for triple in TRIPLES:
        print(f"\n{' + '.join(triple)}: {together(cells[triple])}")
    words = [cell.words for found in cells.values() for cell in found if cell.verdict == "conflict"]
    print("\nConflicts:\n", *(f"- {text}" for text in dict.fromkeys(words)), sep="\n")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
