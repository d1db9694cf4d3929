"""From raw text to shards: what `python -m core.prepare workload=bert_mlperf source=... out=...` does.

    1. each source file  -> text/00000.txt       a sentence a line, a blank line after each document
    2. the texts         -> vocab.txt            copied from workload.vocab_file, or trained on what is not held out
    3. groups of documents of about workload.shard_mib -> train/00000.arrow and eval/00000.arrow

Each file is written by one job in some process and depends on source, settings and seed alone. The texts are removed in
the end. A dump is one file, and so read by one process; the rest is parallel.
"""

from __future__ import annotations

import hashlib
import random
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from core.api.errors import DataError
from timetrial_bert import wordpiece
from timetrial_bert.pairs import Example, mask, pairs, prediction_count
from timetrial_bert.text import documents, files

if TYPE_CHECKING:
    from core.api.preparation import Preparation
    from timetrial_bert.config import BertConfig

Piece = tuple[str, int, int, int]
"""Whole documents of one text: its name, first byte, byte after the last, and number of the first document."""

PIECES_PER_SHARD = 4
"""Pieces into which a long text is cut, so that groups of them come out near workload.shard_mib."""
MIB = 2**20


def run(preparation: Preparation, config: BertConfig) -> dict[str, int]:
    """The hook `prepare`. Returns counts of what was made."""
    sources = files(preparation.source)
    texts = [f"text/{number:05d}.txt" for number in range(len(sources))]
    piece_bytes = max(1, int(config.shard_mib * MIB / PIECES_PER_SHARD))
    found = preparation.map(
        "sentences", extract, [(text, (source, piece_bytes)) for text, source in zip(texts, sources, strict=True)]
    )
    for source, note in zip(sources, found, strict=True):
        if note["bad"]:
            preparation.refuse(str(source), note["bad"])
    pieces = [(text, *piece) for text, note in zip(texts, found, strict=True) for piece in note["pieces"]]
    settings = {
        "out": preparation.out,
        "seed": preparation.config.seed,
        "held_out": config.held_out,
        "lower_case": config.lower_case,
    }
    given = Path(config.vocab_file).expanduser().absolute() if config.vocab_file else None
    given = wordpiece.STARTER if config.vocab_file == "starter" else given
    (tokens,) = preparation.map(
        "vocabulary", write_vocabulary, [("vocab.txt", (given, pieces, config.vocab_size, settings))]
    )
    settings |= {
        "sequence_length": config.sequence_length,
        "short_probability": config.short_probability,
        "masked_share": config.masked_share,
        "max_predictions": config.max_predictions,
        "duplicates": config.duplicates,
        "masking": config.masking,
    }
    groups = list(_groups(pieces, int(config.shard_mib * MIB)))
    jobs = [
        (f"{part}/{number:05d}.arrow", (part, number, group, settings))
        for part in ("train", "eval")
        for number, group in enumerate(groups)
    ]
    notes = preparation.map("examples", write_shard, jobs)
    counts = {
        "documents": sum(note["documents"] for note in found),
        "tokens in the vocabulary": tokens,
        "training examples": sum(note["examples"] for note in notes[: len(groups)]),
        "evaluation examples": sum(note["examples"] for note in notes[len(groups) :]),
        "training tokens": sum(note["tokens"] for note in notes[: len(groups)]),
    }
    for kind, name in (("training", "lower"), ("evaluation", "higher")):
        if not counts[f"{kind} examples"]:
            raise DataError(
                f"{preparation.source} has too little text for any {kind} examples: "
                f"provide more, or set a {name} workload.held_out"
            )
    for text in texts:
        (preparation.out / text).unlink(missing_ok=True)
        del preparation.files[text]
    shutil.rmtree(preparation.out / "text", ignore_errors=True)
    return counts


def extract(path: Path, source: Path, piece_bytes: int) -> dict[str, Any]:
    """Job: the sentences of one source file. The note has the reason where the file is bad, and its pieces."""
    pieces: list[tuple[int, int, int]] = []
    start = first = count = 0
    bad = None
    with path.open("wb") as out:
        try:
            for document in documents(source):
                out.write("".join(f"{sentence}\n" for sentence in document).encode() + b"\n")
                count += 1
                if out.tell() - start >= piece_bytes:
                    pieces.append((start, out.tell(), first))
                    start, first = out.tell(), count
        except ValueError as error:
            bad = str(error)
            out.truncate(0)
        else:
            if out.tell() > start:
                pieces.append((start, out.tell(), first))
    return {"bad": bad, "documents": 0 if bad else count, "pieces": [] if bad else pieces}


def write_vocabulary(
    path: Path, given: Path | None, pieces: Sequence[Piece], size: int, settings: dict[str, Any]
) -> int:
    """Job: the vocabulary. The note is its number of tokens."""
    if given:
        tokens = wordpiece.load(given, settings["lower_case"]).tokens
    else:
        texts = [s for document in _documents(pieces, "train", settings) for s in document]
        if not texts:
            raise DataError("there is no text to train a vocabulary on: provide more, or lower workload.held_out")
        tokens = wordpiece.train(texts, size, settings["lower_case"])
    path.write_text("".join(f"{token}\n" for token in tokens), encoding="utf-8")
    return len(tokens)


def write_shard(path: Path, part: str, number: int, group: Sequence[Piece], settings: dict[str, Any]) -> dict[str, int]:
    """Job: the examples of one group's documents, those that are held out or the others."""
    from timetrial_bert import shards

    vocabulary = wordpiece.load(settings["out"] / "vocab.txt", settings["lower_case"])
    tokenised = [vocabulary.encode(document) for document in _documents(group, part, settings)]
    tokenised = [[sentence for sentence in document if sentence] for document in tokenised]
    tokenised = [document for document in tokenised if document]
    dynamic = part == "train" and settings["masking"] == "dynamic"
    examples, tokens, predictions = shards.write(
        path, _examples(tokenised, vocabulary, dynamic, f"{part}/{number}", settings)
    )
    return {"examples": examples, "tokens": tokens, "predictions": predictions}


def _examples(
    tokenised: list[list[list[int]]],
    vocabulary: wordpiece.WordPiece,
    dynamic: bool,
    name: str,
    settings: dict[str, Any],
) -> Iterator[tuple[Example, int]]:
    nothing = np.zeros(0, np.int64)
    for duplicate in range(settings["duplicates"]):
        seed = _number(settings["seed"], name, duplicate)
        made = pairs(
            tokenised, settings["sequence_length"], settings["short_probability"], vocabulary, random.Random(seed)
        )
        for row, pair in enumerate(made):
            ids = np.array(pair.tokens)
            count = int(prediction_count(np.array(len(ids)), settings["masked_share"], settings["max_predictions"]))
            if dynamic:
                yield Example(ids, pair.second_start, nothing, nothing, pair.random_next), count
            else:
                yield mask(ids, pair.second_start, pair.random_next, count, vocabulary, (seed << 64) | row), count


def _groups(pieces: Sequence[Piece], size: int) -> Iterator[list[Piece]]:
    """Consecutive pieces, of at least `size` bytes together but for the last group."""
    group: list[Piece] = []
    for piece in pieces:
        group.append(piece)
        if sum(end - start for _, start, end, _ in group) >= size:
            yield group
            group = []
    if group:
        yield group


def _documents(pieces: Sequence[Piece], part: str, settings: dict[str, Any]) -> Iterator[list[str]]:
    """The documents of some pieces that belong to a part. Which are held out depends on the seed and their place."""
    threshold = settings["held_out"] * 2**63
    for text, start, end, number in pieces:
        with (settings["out"] / text).open("rb") as file:
            file.seek(start)
            content = file.read(end - start).decode()
        for document in content.split("\n\n")[:-1]:
            held_out = _number(settings["seed"], "held out", text, number) < threshold
            if held_out == (part == "eval"):
                yield document.splitlines()
            number += 1


def _number(*names: Any) -> int:
    """A 63-bit number that depends on the names alone."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, names)).encode()).digest()[:8], "big") >> 1
