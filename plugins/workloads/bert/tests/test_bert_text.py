"""Raw text to documents, and the faults of each kind of source."""

from __future__ import annotations

import bz2
from pathlib import Path

import pytest

from core.api.errors import DataError
from timetrial_bert import embedded, wiki
from timetrial_bert.text import documents, files, split_sentences

PAGE = "<page><title>T</title><ns>{ns}</ns>{extra}<revision><text>{text}</text></revision></page>"
SPACE = 'xmlns="http://www.mediawiki.org/xml/export-0.10/"'


@pytest.mark.parametrize(
    ("paragraph", "sentences"),
    [
        ("It rains. We stay in! Do you?", ["It rains.", "We stay in!", "Do you?"]),
        ("Mr. A. Smith met Dr. Jones in St. Ives. He left.", ["Mr. A. Smith met Dr. Jones in St. Ives.", "He left."]),
        ("Pi is 3.14 or so. 2 is even.", ["Pi is 3.14 or so.", "2 is even."]),
        ('He said "No." Then  he\nleft .', ['He said "No."', "Then he left ."]),
        ("a half , e.g. Paris . The rest", ["a half , e.g. Paris .", "The rest"]),
        ("  ", []),
    ],
)
def test_sentences_end_where_a_reader_would_end_them(paragraph: str, sentences: list[str]) -> None:
    assert split_sentences(paragraph) == sentences


def test_markup_leaves_the_prose() -> None:
    markup = (
        "{{Infobox|a={{b}}}}\n'''Albedo''' ({{IPA|x}}) is the [[diffuse reflection|reflecting power]] of a "
        "[[surface]].<ref>Book, {{p}}</ref> It is&nbsp;30&nbsp;% <!-- no -->[http://x.org there].\n"
        "{| class=x\n| table {| inner |}\n|}\n[[File:a.jpg|thumb|a [[link]] in a caption]]\n"
        "== Heading ==\n* a list item, which is left out since it is no prose\nToo short.\n"
        "== References ==\nNothing after this heading is kept, however long the line may be.\n"
    )
    assert wiki.paragraphs(markup) == ["Albedo () is the reflecting power of a surface. It is 30 % there."]


def write_dump(path: Path, *pages: str) -> None:
    path.write_bytes(bz2.compress(f"<mediawiki {SPACE}>{''.join(pages)}</mediawiki>".encode()))


def test_a_dump_gives_its_articles_without_redirects_and_other_namespaces(tmp_path: Path) -> None:
    text = "A sentence that is long enough to be kept. And another one."
    pages = [PAGE.format(ns=ns, extra=extra, text=text) for ns, extra in ((0, ""), (1, ""), (0, "<redirect/>"))]
    write_dump(tmp_path / "wiki-pages.xml.bz2", *pages)
    assert list(documents(tmp_path / "wiki-pages.xml.bz2")) == [
        ["A sentence that is long enough to be kept.", "And another one."]
    ]


def test_each_layout_of_text_files_is_told_by_its_content(tmp_path: Path) -> None:
    (tmp_path / "wiki_00").write_text(
        '<doc id="1" title="A">\nA\n\nOne. Two.\n</doc>\n<doc id="2">\nB\n\nThree.\n</doc>\n'
    )
    (tmp_path / "wikitext.txt").write_text(" = A = \n\n One . Two . \n = = Part = = \n Three . \n = B = \n Four . \n")
    (tmp_path / "plain.txt").write_text("One. Two.\n\nThree.\n")
    assert list(documents(tmp_path / "wiki_00")) == [["One.", "Two."], ["Three."]]
    assert list(documents(tmp_path / "wikitext.txt")) == [["One .", "Two .", "Three ."], ["Four ."]]
    assert list(documents(tmp_path / "plain.txt")) == [["One.", "Two.", "Three."]]
    assert [path.name for path in files(tmp_path)] == ["plain.txt", "wiki_00", "wikitext.txt"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "holds no text"),
        ("a.txt", b"caf\xe9", "not UTF-8"),
        ("a.xml.bz2", b"BZh9 nothing", "not a complete dump"),
        ("a.xml.bz2", bz2.compress(f"<mediawiki {SPACE}><page>".encode()), "not a complete dump"),
        ("a.xml.bz2", bz2.compress(b"<x>" + bytes(range(32, 127)) * 999)[:-40], "not a complete dump"),
    ],
)
def test_a_bad_file_says_why(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(documents(tmp_path / name))


def test_a_missing_or_empty_source_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        files(tmp_path / "none")
    with pytest.raises(DataError, match="holds no files"):
        files(tmp_path)


def test_the_embedded_articles_are_found_without_importing_gensim() -> None:
    import sys

    found = list(documents(embedded.find()))
    assert "gensim" not in sys.modules
    assert len(found) == 103
    assert sum(map(len, found)) > 15_000
