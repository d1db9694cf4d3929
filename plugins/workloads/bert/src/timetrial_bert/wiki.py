"""Articles of a Wikipedia dump (MediaWiki XML, compressed with bzip2) as plain paragraphs.

A light cleaner, enough for language models: templates, tables, references, images and lists are dropped, the text of
links is kept. WikiExtractor, which the MLPerf reference uses, keeps more of the structure.
"""

from __future__ import annotations

import bz2
import html
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

MIN_PARAGRAPH = 40
"""Characters; shorter lines are captions, hatnotes and remains of formulas."""

_SPANS = re.compile(r"<!--.*?-->|<(ref|math|gallery|timeline|source|code)\b[^>]*?(?:/>|>.*?</\1>)", re.S | re.I)
_BRACES = re.compile(r"\{\{[^{}]*\}\}|\{\|(?:(?!\{\||\|\}).)*\|\}", re.S)
"""A template or table without another one inside: applied until none is left."""
_IMAGE = re.compile(r"\[\[(?:File|Image|Category|[a-z-]{2,12}):(?:[^\[\]]|\[\[[^\[\]]*\]\])*\]\]", re.I)
_LINK = re.compile(r"\[\[(?:[^\[\]|]*\|)?([^\[\]|]*)\]\]")
_EXTERNAL = re.compile(r"\[(?:https?:|ftp:)?//\S+\s*([^\]]*)\]")
_TAG = re.compile(r"<[^<>]+>|'{2,}|__[A-Z]+__")
_APPENDIX = re.compile(
    r"^==\s*(?:See also|References|Notes|Further reading|External links|Bibliography)\s*==", re.M | re.I
)
_MARKED = re.compile(r"^[=*#:;|!{}\s]")
"""Start of a line that is a heading, a list item, an indented line or the remains of a table."""


def pages(path: Path) -> Iterator[list[str]]:
    """The paragraphs of each article, in the dump's order; redirects and pages outside the main namespace are left out.

    Raises OSError, EOFError or xml's ParseError where the file is damaged.
    """
    with bz2.open(path, "rb") as file:
        parser = ET.iterparse(file, events=("start", "end"))
        _, root = next(parser)
        for event, element in parser:
            if event == "start" or element.tag.rpartition("}")[2] != "page":
                continue
            space = element.tag[: -len("page")]
            is_article = element.findtext(f"{space}ns", "0") == "0" and element.find(f"{space}redirect") is None
            markup = element.findtext(f"{space}revision/{space}text") or ""
            if is_article and (text := paragraphs(markup)):
                yield text
            root.clear()


def paragraphs(markup: str) -> list[str]:
    """The prose of one article's wiki markup."""
    appendix = _APPENDIX.search(markup)
    text = _SPANS.sub("", markup[: appendix.start()] if appendix else markup)
    for pattern in (_BRACES, _IMAGE):
        found = 1
        while found:
            text, found = pattern.subn("", text)
    text = html.unescape(_TAG.sub("", _EXTERNAL.sub(r"\1", _LINK.sub(r"\1", text))))
    lines = (" ".join(line.split()) for line in text.splitlines() if not _MARKED.match(line))
    return [line for line in lines if len(line) >= MIN_PARAGRAPH]
