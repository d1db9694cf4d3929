"""Tokenised documents to sentence pairs, and pairs to masked examples.

Both follow the MLPerf reference (mlcommons/training, language_model/tensorflow/bert/cleanup_scripts/
create_pretraining_data.py), which is Devlin et al., section 3.1 and appendix A.2.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from timetrial_bert.wordpiece import WordPiece

Tokens = list[int]

REPLACED, RANDOM = 0.8, 0.9
"""Of the predicted tokens 80 % become [MASK], 10 % a random token and 10 % stay as they are."""
SPECIALS = 3
"""[CLS] and two [SEP] of a pair."""
ATTEMPTS = 10
"""Draws of another document for a random second sentence, before its own is taken."""


@dataclass(frozen=True, slots=True)
class Pair:
    """[CLS] first [SEP] second [SEP], not masked."""

    tokens: Tokens
    second_start: int
    """Position of the second sentence's first token."""
    random_next: bool


@dataclass(frozen=True, slots=True)
class Example:
    """One masked sentence pair, without padding."""

    input_ids: NDArray[np.integer]
    """[tokens] with [CLS], two [SEP] and the masks in place."""
    second_start: int
    """Position at which the second sentence starts."""
    masked_positions: NDArray[np.integer]
    masked_labels: NDArray[np.integer]
    random_next: bool


def pairs(
    documents: Sequence[list[Tokens]], length: int, short_probability: float, vocabulary: WordPiece, rng: random.Random
) -> Iterator[Pair]:
    """The pairs of all documents, each a list of tokenised sentences; at most `length` tokens a pair.

    Sentences are collected until they fill the pair, or, with `short_probability`, a random part of it. Half of the
    pairs take their second part from another document; what was collected for it is then used for the next pair.
    """
    room = length - SPECIALS
    for number, document in enumerate(documents):
        chunk: list[Tokens] = []
        wanted = _wanted(room, short_probability, rng)
        position = 0
        while position < len(document):
            chunk.append(document[position])
            if position == len(document) - 1 or sum(map(len, chunk)) >= wanted:
                first_end = rng.randint(1, len(chunk) - 1) if len(chunk) > 1 else 1
                first = [token for sentence in chunk[:first_end] for token in sentence]
                random_next = len(chunk) == 1 or rng.random() < 0.5
                if random_next:
                    second = _elsewhere(documents, number, wanted - len(first), rng)
                    position -= len(chunk) - first_end
                else:
                    second = [token for sentence in chunk[first_end:] for token in sentence]
                _truncate(first, second, room, rng)
                tokens = [vocabulary.cls, *first, vocabulary.sep, *second, vocabulary.sep]
                yield Pair(tokens, len(first) + 2, random_next)
                chunk = []
                wanted = _wanted(room, short_probability, rng)
            position += 1


def _wanted(room: int, short_probability: float, rng: random.Random) -> int:
    return rng.randint(2, room) if rng.random() < short_probability else room


def _elsewhere(documents: Sequence[list[Tokens]], own: int, wanted: int, rng: random.Random) -> Tokens:
    """At least one sentence from a random place of another document."""
    other = own
    for _ in range(ATTEMPTS):
        other = rng.randrange(len(documents))
        if other != own:
            break
    tokens: Tokens = []
    for sentence in documents[other][rng.randrange(len(documents[other])) :]:
        tokens += sentence
        if len(tokens) >= wanted:
            break
    return tokens


def _truncate(first: Tokens, second: Tokens, room: int, rng: random.Random) -> None:
    """Shortens the longer one, at either end by chance, until both fit."""
    while len(first) + len(second) > room:
        longer = first if len(first) > len(second) else second
        del longer[0 if rng.random() < 0.5 else -1]


def prediction_count(lengths: NDArray[np.integer], share: float, most: int) -> NDArray[np.int64]:
    """How many tokens of examples with these lengths are predicted: `share` of them, at least 1, at most `most`."""
    return np.clip(np.rint(lengths * share), 1, most).astype(np.int64)


def mask(
    tokens: NDArray[np.integer], second_start: int, random_next: bool, count: int, vocabulary: WordPiece, seed: int
) -> Example:
    """An example with `count` of the tokens to predict, drawn from `seed`. [CLS] and [SEP] are never predicted."""
    rng = np.random.Generator(np.random.Philox(key=seed))
    last = len(tokens) - 1
    places = np.arange(1, last)
    places = places[places != second_start - 1]
    positions = np.sort(rng.permutation(places)[:count])
    labels = tokens[positions]
    fate, anything = rng.random(len(positions)), rng.integers(len(vocabulary.tokens), size=len(positions))
    masked = tokens.copy()
    masked[positions] = np.where(fate < REPLACED, vocabulary.mask, np.where(fate < RANDOM, anything, labels))
    return Example(masked, second_start, positions, labels, random_next)
