"""A table on stdout. Imports without torch."""

import sys
from collections.abc import Iterable

__all__ = ["print_table"]


def print_table(headings: Iterable[str], rows: Iterable[Iterable[str]], width: int) -> None:
    """A table on stdout, `width` characters wide where that is not a terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(*headings, box=box.SIMPLE)
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else width).print(table)
