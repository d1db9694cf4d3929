"""Packed batches against transformers' own network on the padded ones, and sequences against their neighbours."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import BertConfig, BertModel

from core.api.types import Batch
from core.testing.contexts import hooks_of
from timetrial_bert.seams import IGNORED
from timetrial_sequence_packing.encoder import Encoder
from timetrial_sequence_packing.packing import Counts, Rounding, best_fit, narrowest, pack
from timetrial_sequence_packing.plugin import SequencePacking, SequencePackingConfig

pytestmark = pytest.mark.numbers

LENGTHS = (5, 12, 1, 11, 7, 16, 4)
WIDTH, PREDICTIONS, VOCABULARY = 16, 3, 50
CONFIG = SequencePackingConfig(round_rows_to=1, round_length_to=1, round_predictions_to=1)


def batch() -> dict[str, Tensor]:
    """A padded batch with sequences of `LENGTHS`, as the workload `bert` has it."""
    generator = torch.Generator().manual_seed(0)
    rows = len(LENGTHS)
    mask = torch.arange(WIDTH) < torch.tensor(LENGTHS)[:, None]
    used = torch.arange(PREDICTIONS) < torch.tensor(LENGTHS).clamp_max(2)[:, None]
    places = torch.stack([torch.randint(n, (PREDICTIONS,), generator=generator) for n in LENGTHS])
    labels = torch.randint(VOCABULARY, (rows, PREDICTIONS), generator=generator)
    return {
        "input_ids": torch.randint(1, VOCABULARY, (rows, WIDTH), generator=generator) * mask,
        "token_type_ids": ((torch.arange(WIDTH) > 3) & mask).long(),
        "attention_mask": mask,
        "masked_positions": places * used,
        "masked_labels": labels.masked_fill(~used, IGNORED),
        "next_sentence_labels": torch.arange(rows),
        "mlm_scale": torch.full((rows,), 0.5),
    }


def network(attention: str = "sdpa", dropout: float = 0.0) -> Any:
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=WIDTH, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
        attn_implementation=attention,
    )  # fmt: skip
    return BertModel(config, add_pooling_layer=False)


def padded(bert: Any, data: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """States at the masked positions [B, P, H] and at [CLS] [B, H]."""
    hidden = bert(
        data["input_ids"], attention_mask=data["attention_mask"], token_type_ids=data["token_type_ids"]
    ).last_hidden_state
    return torch.stack([h[p] for h, p in zip(hidden, data["masked_positions"], strict=True)]), hidden[:, 0]


@given(st.lists(st.integers(1, 20), min_size=1, max_size=40), st.integers(1, 9))
def test_no_two_sequences_overlap_none_leaves_its_row_and_rows_are_few(lengths: list[int], multiple: int) -> None:
    for places, width in ((best_fit(lengths, 20), 20), narrowest(lengths, 20, multiple)):
        assert width <= 20 and (width == 20 or width % multiple == 0)
        taken = {(row, start + n) for (row, start), length in zip(places, lengths, strict=True) for n in range(length)}
        assert len(taken) == sum(lengths)
        assert all(start + length <= width for (_, start), length in zip(places, lengths, strict=True))
        rows = 1 + max(row for row, _ in places)
        assert {row for row, _ in places} == set(range(rows))
        assert rows <= 11 / 9 * len(lengths) and rows <= max(1, 2 * sum(lengths) / 20 + 1)


def test_rows_become_no_longer_than_they_must() -> None:
    places, width = narrowest([6, 6, 4, 4, 2, 2], 16, 1)
    assert (max(row for row, _ in places), width) == (1, 12)
    assert narrowest([6, 6, 4, 4, 2, 2], 16, 8)[1] == 16


@pytest.mark.parametrize("rounding", [Rounding(), Rounding(rows=4, length=8, predictions=16), Rounding(length=WIDTH)])
def test_every_token_label_and_position_is_found_again(rounding: Rounding) -> None:
    data, counts = batch(), Counts()
    found = pack(data, rounding, counts)
    rows, width = found["input_ids"].shape
    assert rows % rounding.rows == 0 and width % rounding.length == 0
    assert (counts.sequences, counts.rows, counts.tokens) == (len(LENGTHS), rows, sum(LENGTHS))
    assert counts.positions == rows * width and counts.padded_positions == len(LENGTHS) * WIDTH
    assert (found["segments"] > 0).sum() == sum(LENGTHS)
    predictions = len(found["masked_labels"])
    assert predictions % rounding.predictions == 0
    masked, firsts = found["picked"].split([predictions, len(LENGTHS)])
    expected: list[tuple[int, int]] = []
    for number, (first, length) in enumerate(zip(firsts.tolist(), LENGTHS, strict=True)):
        mine = slice(first, first + length)
        for key in ("input_ids", "token_type_ids"):
            assert torch.equal(found[key].flatten()[mine], data[key][number, :length])
        assert torch.equal(found["position_ids"].flatten()[mine], torch.arange(length))
        segment = found["segments"].flatten()[mine].unique()
        row = found["segments"][first // width]
        assert len(segment) == 1 and (row == segment).sum() == length
        for place, label in zip(data["masked_positions"][number], data["masked_labels"][number], strict=True):
            if label != IGNORED:
                expected.append((first + int(place), int(label)))
    pairs = list(zip(masked.tolist(), found["masked_labels"].tolist(), strict=True))
    assert pairs[: len(expected)] == expected
    assert {label for _, label in pairs[len(expected) :]} <= {IGNORED}
    assert torch.equal(found["next_sentence_labels"], data["next_sentence_labels"])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("rounding", [Rounding(), Rounding(rows=4, length=WIDTH, predictions=16)])
def test_states_and_gradients_are_those_of_the_padded_batch(attention: str, rounding: Rounding) -> None:
    data, bert = batch(), network(attention)
    expected_masked, expected_cls = padded(bert, data)
    labelled = data["masked_labels"] != IGNORED
    expected_masked[labelled].square().sum().add(expected_cls.pow(3).sum()).backward()
    gradients = [p.grad.clone() for p in bert.parameters()]
    bert.zero_grad()

    found = pack(data, rounding)
    masked, cls = Encoder(None)(bert, found)
    masked = masked[found["masked_labels"] != IGNORED]
    masked.square().sum().add(cls.pow(3).sum()).backward()
    torch.testing.assert_close(cls, expected_cls, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(masked, expected_masked[labelled], rtol=1e-4, atol=1e-5)
    for p, expected in zip(bert.parameters(), gradients, strict=True):
        torch.testing.assert_close(p.grad, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_no_token_attends_across_a_boundary(attention: str) -> None:
    """Another sequence in the row changes all its tokens: the states of the others keep their bits."""
    found, bert = pack(batch(), Rounding()), network(attention).eval()
    firsts = found["picked"][len(found["masked_labels"]) :].tolist()
    width = found["input_ids"].shape[1]
    states: list[Tensor] = []
    bert.register_forward_hook(lambda *_: None)
    bert.encoder.register_forward_hook(lambda _, __, output: states.append(output.last_hidden_state.flatten(0, 1)))
    with torch.no_grad():
        Encoder(None)(bert, found)
        neighbours = 0
        for number, (first, length) in enumerate(zip(firsts, LENGTHS, strict=True)):
            changed = found["input_ids"].clone()
            changed.view(-1)[first : first + length] = changed.view(-1)[first : first + length] % (VOCABULARY - 1) + 1
            Encoder(None)(bert, {**found, "input_ids": changed})
            for other, (start, tokens) in enumerate(zip(firsts, LENGTHS, strict=True)):
                same = torch.equal(states[-1][start : start + tokens], states[0][start : start + tokens])
                assert same == (other != number)
                neighbours += other != number and start // width == first // width
    assert neighbours > 0


def test_evaluation_gives_the_same_states() -> None:
    data, bert = batch(), network(dropout=0.5).eval()
    with torch.no_grad():
        torch.testing.assert_close(
            Encoder(None)(bert, pack(data, Rounding()))[1], padded(bert, data)[1], rtol=1e-4, atol=1e-5
        )


def test_under_autocast_it_stays_close_and_finite() -> None:
    data, bert = batch(), network()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, cls = Encoder(None)(bert, pack(data, Rounding(rows=4)))
    cls.float().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in bert.parameters())
    torch.testing.assert_close(cls.float(), padded(bert, data)[1], rtol=0.1, atol=0.1)


@pytest.mark.parametrize("purpose", ["train", "evaluate", "warm_up"])
def test_every_batch_is_packed_whatever_its_purpose_and_keeps_its_weight(purpose: str) -> None:
    opt, stream = SequencePacking(CONFIG), [Batch(batch(), samples=12, weight=0.5)] * 2
    for _ in range(2):  # two epochs, or evaluations
        one, other = hooks_of(opt).transform(ctx=None, batches=stream, purpose=purpose)
        assert (one.samples, one.weight) == (12, 0.5)
        assert torch.equal(one.data["input_ids"], pack(batch(), Rounding())["input_ids"])
        assert torch.equal(other.data["picked"], one.data["picked"])
    assert opt._counts is not None and opt._counts.batches == 4


def test_a_padded_batch_goes_to_the_workloads_own_encoder_and_is_no_evidence() -> None:
    opt = SequencePacking(CONFIG)
    assert not opt.verify().active
    data, bert = batch(), network()
    encoder, counts = opt._encoder, opt._counts = Encoder(padded), Counts()
    encoder(bert, data)
    encoder(bert, pack(data, Rounding(), counts))
    evidence = opt.verify()
    assert not evidence.active and "COMPUTED UNPACKED" in evidence.summary


def test_full_rows_are_no_evidence() -> None:
    opt = SequencePacking(CONFIG)
    data = batch()
    data["attention_mask"][:] = True
    opt._encoder, opt._counts = Encoder(None), Counts()
    opt._encoder(network(), pack(data, Rounding(), opt._counts))
    assert not opt.verify().active
