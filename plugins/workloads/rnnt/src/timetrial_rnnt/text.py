"""Transcripts to class numbers and back: letters, or sentencepieces. The blank is the class behind the tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import sentencepiece

from core.api.errors import DataError

LETTERS = " abcdefghijklmnopqrstuvwxyz'"
"""The reference's alphabet: baseline_v3-1023sp.yaml, `labels`."""


class Tokens(Protocol):
    size: int

    def encode(self, text: str) -> list[int]: ...

    def decode(self, numbers: Sequence[int]) -> str: ...


class Letters:
    """Each letter of normalised text is a token."""

    size = len(LETTERS)

    def encode(self, text: str) -> list[int]:
        return [LETTERS.index(letter) for letter in text]

    def decode(self, numbers: Sequence[int]) -> str:
        return "".join(LETTERS[number] for number in numbers)


class SentencePieces:
    """A sentencepiece model (Kudo and Richardson, arXiv:1808.06226)."""

    def __init__(self, path: Path) -> None:
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            reason = str(error).splitlines()[0][:200]
            raise DataError(f"{path} is not a sentencepiece model: {reason}; prepare the data again") from None
        self.size = self._model.get_piece_size()

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text)

    def decode(self, numbers: Sequence[int]) -> str:
        return self._model.decode([int(number) for number in numbers])


def normalise(text: str) -> str:
    """Lower case, single spaces, and nothing but `LETTERS`. ValueError, naming it, for any other character.

    LibriSpeech's transcripts hold nothing else.
    """
    text = " ".join(text.lower().split())
    for letter in text:
        if letter not in LETTERS:
            raise ValueError(
                f"its transcript has the character {letter!r}; letters, spaces and apostrophes are expected"
            )
    return text
