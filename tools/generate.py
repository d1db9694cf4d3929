"""Writes what would otherwise be repeated by hand, and checks it in CI.

    uv run python tools/generate.py            write
    uv run python tools/generate.py --check    exit status 1 where a file is not what it would write

- pyproject.toml: the lists of distributions (workspace sources, the group `dev`, import-linter's contracts);
- README.md: the tables of workloads, backends, opts, trackers and commands;
- plugins/opts/MATRIX.md: the composition matrix, from tests/matrix.json.

In pyproject.toml and README.md only what is between `generated: NAME` and `end of generated` is touched.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

from core.api.types import OptSpec
from core.compose.discovery import discover

ROOT = Path(__file__).parent.parent
MEMBERS = sorted(path.parent for path in ROOT.glob("plugins/*/*/pyproject.toml"))
SIGNS = {
    "bitwise": "=", "tolerance": "~", "changes": "Δ", "conflict": "x", "not_offered": "·", "not_here": "○",
}  # fmt: skip
DESCRIPTIONS = ROOT / "tools" / "readme.toml"
"""What the README says of a plugin beyond its spec's summary: data and target of a workload."""


def between(text: str, name: str, lines: Sequence[str], comment: str) -> str:
    """`text` with the lines of its generated part `name` replaced. ValueError where it has none."""
    opening, closing = comment.format(f"generated: {name}"), comment.format("end of generated")
    pattern = re.compile(rf"({re.escape(opening)}\n).*?([ ]*{re.escape(closing)})", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"no part `{name}` between `{opening}` and `{closing}`")
    return pattern.sub(lambda match: match[1] + "".join(f"{line}\n" for line in lines) + match[2], text)


def pyproject(text: str) -> str:
    """The root pyproject.toml with its lists of distributions."""
    names = [str(tomllib.loads((m / "pyproject.toml").read_text())["project"]["name"]) for m in MEMBERS]
    packages = [name.replace("-", "_") for name in names]
    text = between(text, "sources", [f"{name} = {{ workspace = true }}" for name in names], "# {}")
    text = between(text, "distributions", [f'    "{name}",' for name in names], "# {}")
    for part in range(1, 6):
        text = between(text, f"packages {part}", [f'    "{package}",' for package in packages], "# {}")
    return text


def card_of(kind: str, name: str) -> str:
    """`[`name`](path of its card)`."""
    installed = discover().find(kind, name)  # pyright: ignore[reportArgumentType]
    folder = next((m for m in MEMBERS if m in installed.package_dir.parents), None)
    return f"[`{name}`]({folder.relative_to(ROOT)}/README.md)" if folder else f"`{name}`"


def readme(text: str) -> str:
    """README.md with its tables."""
    registry, more = discover(), tomllib.loads(DESCRIPTIONS.read_text())
    rows = [(card_of("workload", n), *more["workload"][n]) for n in registry.names("workload")]
    text = between(text, "workloads", table(("workload", "what", "data", "target"), rows), "<!-- {} -->")
    summaries = {(p.kind, p.name): p.load().spec.summary for p in registry.plugins}
    for kind in ("backend", "tracker", "command"):
        rows = [(card_of(kind, n), summaries[kind, n]) for n in registry.names(kind)]
        if kind == "backend":
            rows.insert(0, ("`auto`", "the best of those below that this machine can run"))
        text = between(text, f"{kind}s", table((kind, "what"), rows), "<!-- {} -->")
    specs = {n: spec for n in registry.names("opt") if isinstance(spec := registry.find("opt", n).load().spec, OptSpec)}
    rows = [(card_of("opt", n), spec.summary, spec.numerics) for n, spec in specs.items()]
    return between(text, "opts", table(("opt", "what", "numerics"), rows), "<!-- {} -->")


def matrix() -> str:
    """plugins/opts/MATRIX.md."""
    verdicts = json.loads((ROOT / "tests" / "matrix.json").read_text())
    workloads = list(verdicts["alone"])
    opts = sorted(next(iter(verdicts["alone"].values())))
    together = {names: cell for names, cell in verdicts["together"].items() if names.count("+") == 1}
    alone = table(
        ("alone", *workloads), [(f"`{o}`", *(SIGNS[verdicts["alone"][w][o]] for w in workloads)) for o in opts]
    )

    def sign(one: str, two: str) -> str:
        return "" if one == two else SIGNS[together["+".join(sorted((one, two)))][1]]

    rows = [(f"{n} `{one}`", *(sign(one, two) for two in opts)) for n, one in enumerate(opts, 1)]
    pairs = table(("together", *map(str, range(1, len(opts) + 1))), rows)
    reasons = sorted({cell[2] for cell in together.values() if cell[1] == "conflict"})
    triples = [
        f"- `{names.replace('+', '` + `')}`: {SIGNS[cell[1]]} on {cell[0]}"
        for names, cell in verdicts["together"].items() if names.count("+") > 1
    ]  # fmt: skip
    return "\n".join([
        "# Which tricks go together", "",
        "Each pair of opts either trains, with evidence from both and the numbers as they declare, or is refused with",
        "the reason. Generated from `tests/matrix.json` by `tools/generate.py`; `tools/matrix.py` runs every cell, and",
        "`pytest -m matrix` fails where one has another verdict.", "",
        "`=` the same bits as the baseline, `~` within tolerance, `Δ` changed as declared, `x` a conflict, `·` not",
        "offered by the workload (on the synthetic data that bert and rnnt are tried on, `async_eval` is not), `○` not",
        "on this machine (it has no GPU).", "",
        "## Each opt on each workload", "", *alone, "",
        "## Each pair, on the first workload that offers both", "", *pairs, "",
        "## Three at once", "", *triples, "",
        "## Conflicts", "", *(f"- {reason}" for reason in reasons), "",
    ])  # fmt: skip


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table."""
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a file differs")
    check, stale = parser.parse_args().check, list[str]()
    for name, make in (("pyproject.toml", pyproject), ("README.md", readme), ("plugins/opts/MATRIX.md", None)):
        path = ROOT / name
        old = path.read_text() if path.exists() else ""
        new = make(old) if make else matrix()
        if new != old:
            stale.append(name)
            if not check:
                path.write_text(new)
    verb = "stale, run tools/generate.py" if check else "written"
    print(f"{', '.join(stale)}: {verb}" if stale else "everything is up to date")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
