"""Raw text as documents, lists of sentences: Wikipedia dumps, WikiExtractor's files, folders of text files."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Iterator
from pathlib import Path

from core.api.errors import DataError
from timetrial_bert import wiki

Document = list[str]
"""Its sentences, in order."""

DUMP = ".bz2"

_END = re.compile(r"""(?<=[.!?])(["'\u201d\u2019)\]]*)\s+(?=["'\u201c\u2018(\[]?[A-Z0-9])""")
_ABBREVIATION = re.compile(
    r"(?:\b(?:[A-Za-z]|[A-Z][a-z]?|Mr|Mrs|Ms|Dr|St|Prof|Gen|Col|Capt|Lt|Sgt|Rev|Hon|Sr|Jr|vs|etc|cf|ca|No|Nos|Vol|pp|ed|eds"
    r"|e\.g|i\.e|U\.S|U\.K|Inc|Ltd|Co|Corp|Mt|Ft|Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sept|Sep|Oct|Nov|Dec))\.$"
)
"""A full stop after one of these, or after an initial, ends no sentence."""
_TITLE = re.compile(r"^ ?= (?!=).*[^=] = ?$")
"""Title of an article in WikiText's layout; its sections have more signs."""
_SECTION = re.compile(r"^ ?(?:= ){2,}.* = ?$")
_DOC = re.compile(r"<doc\b[^>]*>")


def files(source: Path) -> list[Path]:
    """The text files of a source: itself, or all files of a folder in the order of their names. DataError if none."""
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise DataError(f"source={source} does not exist: name a dump (*{DUMP}), or a folder of text files")
    found = sorted(path for path in source.rglob("*") if path.is_file() and not path.name.startswith("."))
    if not found:
        raise DataError(f"{source} holds no files: put text files or WikiExtractor's output there")
    return found


def documents(path: Path) -> Iterator[Document]:
    """The documents of one file, by its kind: a dump, WikiExtractor's `<doc>` elements, WikiText (a document begins at
    each ` = Title = `), or plain text, which is one document.

    Raises ValueError, with the reason, where the file is damaged, is not UTF-8 or holds no text.
    """
    empty = True
    for paragraphs in _paragraphs(path):
        sentences = [sentence for paragraph in paragraphs for sentence in split_sentences(paragraph)]
        if sentences:
            empty = False
            yield sentences
    if empty:
        raise ValueError("it holds no text")


def _paragraphs(path: Path) -> Iterable[list[str]]:
    if path.name.endswith(DUMP):
        try:
            yield from wiki.pages(path)
        except (OSError, EOFError, ET.ParseError, StopIteration) as error:
            raise ValueError(f"it is not a complete dump ({type(error).__name__}: {error})") from None
        return
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 (byte {error.start})") from None
    if _DOC.match(text.lstrip()):
        for part in _DOC.split(text)[1:]:
            lines = part.partition("</doc>")[0].strip().splitlines()
            yield lines[1:]  # the first line is the title
        return
    current: list[str] = []
    for line in text.splitlines():
        if _TITLE.match(line):
            yield current
            current = []
        elif not _SECTION.match(line):
            current.append(line)
    yield current


def split_sentences(paragraph: str) -> list[str]:
    """Sentences by rule: after a full stop, question or exclamation mark, before a capital or a digit, unless the stop
    belongs to an initial or a common abbreviation. White space is normalised."""
    sentences: list[str] = []
    start = 0
    paragraph = " ".join(paragraph.split())
    for end in _END.finditer(paragraph):
        sentence = paragraph[start : end.start() + len(end[1])]
        if not _ABBREVIATION.search(sentence):
            sentences.append(sentence)
            start = end.end()
    rest = paragraph[start:]
    return [*sentences, rest] if rest else sentences
