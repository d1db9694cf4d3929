"""Prints what becomes of every pair of installed opts, as Markdown tables: one for each workload.

    uv run python tools/matrix.py [WORKLOAD ...]

A cell is how the numbers relate to the baseline's (=: the same bits, ~: within tolerance, Δ: changed, as declared), or
why there is none: "conflict" as the opts declare, "-" where the workload lacks what one of them replaces, and what this
machine lacks. Anything else is a defect and ends in exit status 1.
"""

from __future__ import annotations

import sys

from core.testing.matrix import Cell, installed_opts, pairs, try_composition

WORKLOADS = {
    "toy": ("workload=toy", "stop.steps=6"),
    "resnet": ("workload=resnet", "workload.width=8", "stop.steps=4"),
    "bert": (
        "workload=bert", "workload.global_batch_size=8", "workload.sequence_length=32", "stop.steps=4", "warmup_steps=0",
    ),
}  # fmt: skip
"""Small enough for seconds a run."""
SETTINGS = {
    "compile": ("opt.compile.backend=aot_eager",),
    "sharp": ("opt.sharp.ranks_per_node=1",),
}
"""What single opts need to run here, and fast."""
TRIPLES = [("cuda_graphs", "stream_overlap", "sharp")]
SIGNS = {"bitwise": "=", "tolerance": "~", "changes": "Δ"}


def text(cell: Cell) -> str:
    if cell.verdict == "trains":
        return SIGNS[cell.words]
    if cell.verdict == "not here":
        return cell.words.partition(" requires ")[2].partition(":")[0]
    return {"conflict": "conflict", "not offered": "-"}.get(cell.verdict, "**BROKEN**")


def main() -> int:
    opts, notes, broken = sorted(installed_opts()), list[str](), 0
    for workload in sys.argv[1:] or WORKLOADS:
        cells = {pair: try_composition(WORKLOADS[workload], pair, SETTINGS) for pair in pairs()}
        print(f"\n| {workload} | {' | '.join(opts)} |\n|{'---|' * (len(opts) + 1)}", flush=True)
        for one in opts:
            row = ["" if one == two else text(cells[min(one, two), max(one, two)]) for two in opts]
            print(f"| {one} | {' | '.join(row)} |")
        for triple in TRIPLES:
            cells[triple] = try_composition(WORKLOADS[workload], triple, SETTINGS)  # type: ignore[index]
            print(f"\n{' + '.join(triple)}: {text(cells[triple])}")  # type: ignore[index]
        notes += [cell.words for cell in cells.values() if cell.verdict == "conflict"]
        for pair, cell in cells.items():
            if cell.verdict == "broken":
                broken += 1
                print(f"BROKEN {workload} {'+'.join(pair)}: {cell.words}", file=sys.stderr)
    print("\nConflicts:\n")
    for words in dict.fromkeys(notes):
        print(f"- {words}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
