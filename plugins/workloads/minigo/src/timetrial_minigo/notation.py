"""Names of points and colours, as the Go Text Protocol and board diagrams have them.

A move is an index: point p = row x size + column, row 0 being the lowest (GTP's row 1) and column 0 the leftmost (GTP's
A); size x size is the pass. open_spiel counts its actions in the same way.
"""

from __future__ import annotations

COLUMNS = "ABCDEFGHJKLMNOPQRSTUVWXYZ"
"""GTP's letters, which leave out I (Go Text Protocol, version 2, section 2.11)."""
COLOURS = {1: "black", -1: "white"}
"""By the engine's sign (`go.BLACK`, `go.WHITE`)."""


def vertex(move: int, size: int) -> str:
    """GTP's name of a move: "A1", or "pass"."""
    if move == size * size:
        return "pass"
    row, column = divmod(move, size)
    return f"{COLUMNS[column]}{row + 1}"


def parse_vertex(text: str, size: int) -> int:
    """The move with this name, in upper or lower case. ValueError where a board of this size has no such point."""
    name = text.upper()
    if name == "PASS":
        return size * size
    column, digits = COLUMNS.find(name[:1]) if name else -1, name[1:]
    row = int(digits) - 1 if digits.isascii() and digits.isdecimal() else -1
    if not (0 <= column < size and 0 <= row < size):
        raise ValueError(f"invalid vertex {text!r} on a board of size {size}")
    return row * size + column
