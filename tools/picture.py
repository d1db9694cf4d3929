"""The README's picture: runs the first command of the README and draws what it printed, as an SVG of a terminal.

    uv run python tools/picture.py                    writes results/first_run.svg

The run is real; nothing is drawn that it did not print.
"""

from __future__ import annotations

import io
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

OUT = Path(__file__).parent.parent / "results" / "first_run.svg"
COMMAND = "uv run python -m core.run"
WIDTH = 118  # columns: the longest line of a run


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "core.run", f"run_dir={folder}/run"]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        print(done.stdout, file=sys.stderr)
        return done.returncode
    console = Console(record=True, width=WIDTH, file=io.StringIO())
    console.print(Text(f"$ {COMMAND}", style="bold green"))
    for line in done.stdout.splitlines():
        shown = re.sub(r"\[[^]]*/run\]", "[runs/...]", line)
        console.print(Text(shown, style="bold" if shown.startswith("timetrial:") else ""))
    svg = console.export_svg(title="timetrial", theme=MONOKAI)
    # The font would be loaded from a content delivery network: any monospaced one does.
    OUT.write_text(re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL).rstrip() + "\n")
    print(f"{OUT.relative_to(OUT.parent.parent)}: {done.stdout.splitlines()[-1]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
