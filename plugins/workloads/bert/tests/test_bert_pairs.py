"""Vocabulary, sentence pairs and masks."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.api.errors import DataError
from timetrial_bert import wordpiece
from timetrial_bert.pairs import mask, pairs, prediction_count
from timetrial_bert.workload import BertWorkload

MakeWorkload = Callable[..., BertWorkload]

LETTERS = wordpiece.WordPiece([*wordpiece.SPECIAL, *(f"w{i}" for i in range(200))], lower_case=True)
FIRST = len(wordpiece.SPECIAL)

sentence = st.lists(st.integers(FIRST, 150), min_size=1, max_size=12)
corpus = st.lists(st.lists(sentence, min_size=1, max_size=8), min_size=1, max_size=5)


@given(corpus, st.integers(8, 40), st.floats(0, 1), st.integers(0, 99))
@settings(max_examples=150, deadline=None)
def test_every_pair_is_well_formed(documents: list[list[list[int]]], length: int, short: float, seed: int) -> None:
    made = list(pairs(documents, length, short, LETTERS, random.Random(seed)))
    assert made
    for pair in made:
        assert len(pair.tokens) <= length
        assert pair.tokens[0] == LETTERS.cls
        assert pair.tokens[pair.second_start - 1] == pair.tokens[-1] == LETTERS.sep
        assert pair.tokens.count(LETTERS.sep) == 2
        assert 2 < pair.second_start < len(pair.tokens) - 1  # neither sentence is empty


def test_half_of_the_second_sentences_come_from_elsewhere_and_each_sentence_is_used() -> None:
    documents = [[[FIRST + d] * 3 for _ in range(40)] for d in range(20)]
    made = list(pairs(documents, 15, 0.0, LETTERS, random.Random(0)))
    share = sum(p.random_next for p in made) / len(made)
    assert 0.4 < share < 0.65  # more than half: a chunk of one sentence has no next one
    for pair in made:
        first, second = pair.tokens[1], pair.tokens[pair.second_start]
        assert (first == second) != pair.random_next
    used = {token for pair in made for token in pair.tokens}
    assert used >= {FIRST + d for d in range(20)}


def test_the_same_seed_gives_the_same_pairs() -> None:
    documents = [[[FIRST + d, FIRST + s] for s in range(9)] for d in range(6)]
    first, again, other = (list(pairs(documents, 16, 0.5, LETTERS, random.Random(seed))) for seed in (1, 1, 2))
    assert first == again != other


def test_short_pairs_fill_about_half_of_a_row() -> None:
    documents = [[[FIRST + d] * 2 for _ in range(400)] for d in range(20)]
    fill = [len(p.tokens) / 64 for p in pairs(documents, 64, 1.0, LETTERS, random.Random(0))]
    assert 0.4 < np.mean(fill) < 0.65


@given(st.integers(2, 60), st.integers(1, 20), st.integers(0, 2**127 - 1))
@settings(max_examples=100, deadline=None)
def test_a_mask_hides_only_words_and_can_be_undone(words: int, count: int, seed: int) -> None:
    tokens = np.array([LETTERS.cls, *range(FIRST, FIRST + words), LETTERS.sep, FIRST, LETTERS.sep])
    example = mask(tokens, words + 2, False, count, LETTERS, seed)
    assert len(example.masked_positions) == min(count, words + 1)
    assert np.all(np.diff(example.masked_positions) > 0)
    assert not {0, words + 1, len(tokens) - 1} & set(example.masked_positions.tolist())
    restored = example.input_ids.copy()
    restored[example.masked_positions] = example.masked_labels
    assert np.array_equal(restored, tokens)


def test_of_masked_tokens_eight_tenths_are_hidden_and_one_tenth_stay() -> None:
    tokens = np.array([LETTERS.cls, *[FIRST + 3] * 30, LETTERS.sep, FIRST + 3, LETTERS.sep])
    seen = [mask(tokens, 32, False, 20, LETTERS, seed) for seed in range(400)]
    shown = np.concatenate([e.input_ids[e.masked_positions] for e in seen])
    assert np.mean(shown == LETTERS.mask) == pytest.approx(0.8, abs=0.02)
    assert np.mean(shown == FIRST + 3) == pytest.approx(0.1, abs=0.02)


def test_prediction_counts_follow_the_reference() -> None:
    assert prediction_count(np.array([4, 64, 100, 512, 600]), 0.15, 76).tolist() == [1, 10, 15, 76, 76]


def test_training_a_vocabulary_twice_gives_the_same_tokens() -> None:
    texts = ["the cat sat on the mat", "a cat, a mat and the hat", "Zebras zigzag", "l'été à la mer"] * 3
    first, second = (wordpiece.train(texts, 60, lower_case=True) for _ in range(2))
    assert first == second
    assert first[:5] == list(wordpiece.SPECIAL)
    assert wordpiece.UNKNOWN not in {first[i] for s in wordpiece.WordPiece(first, True).encode(texts) for i in s}


def test_a_file_that_is_no_vocabulary_is_refused(tmp_path: Path) -> None:
    (tmp_path / "v.txt").write_text("[PAD]\nthe\n")
    with pytest.raises(DataError, match=r"lacks \[UNK\], \[CLS\]"):
        wordpiece.load(tmp_path / "v.txt", lower_case=True)
    with pytest.raises(DataError, match="cannot read the vocabulary"):
        wordpiece.load(tmp_path / "none.txt", lower_case=True)


def test_dynamic_masks_change_with_the_epoch_and_static_ones_do_not(make: MakeWorkload) -> None:
    workload = make("bert")
    for masking, changes in (("dynamic", True), ("static", False)):
        workload.config.masking = masking
        first, second = (workload.examples.train([3], epoch)[0] for epoch in (1, 2))
        assert (first.masked_positions.tolist() != second.masked_positions.tolist()) == changes
