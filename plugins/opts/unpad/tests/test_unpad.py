"""Unpadded batches and attention, against transformers' own network on the padded ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from core.api.types import Batch
from core.testing.contexts import hooks_of
from timetrial_bert.seams import IGNORED
from timetrial_unpad.attention import flash, grouped, nested, one_by_one
from timetrial_unpad.batch import Counts, unpad
from timetrial_unpad.encoder import Encoder
from timetrial_unpad.plugin import Unpad, UnpadConfig

pytestmark = pytest.mark.numbers

LENGTHS = (5, 12, 1, 12, 7, 16)
WIDTH, PREDICTIONS, VOCABULARY = 16, 3, 50


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
        "next_sentence_labels": torch.arange(rows),  # their numbers, to follow them
        "mlm_scale": torch.full((rows,), 0.5),
    }


def network(dropout: float = 0.0, heads: int = 2, hidden: int = 24) -> Any:
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, num_hidden_layers=2, num_attention_heads=heads, intermediate_size=32,
        max_position_embeddings=WIDTH, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
        attn_implementation="sdpa",
    )  # fmt: skip
    return BertModel(config, add_pooling_layer=False)


def padded(bert: Any, data: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """States at the masked positions [B, P, H] and at [CLS] [B, H]."""
    hidden = bert(
        data["input_ids"], attention_mask=data["attention_mask"], token_type_ids=data["token_type_ids"]
    ).last_hidden_state
    return torch.stack([h[p] for h, p in zip(hidden, data["masked_positions"], strict=True)]), hidden[:, 0]


def sequences(result: Tensor, cu_seqlens: Tensor) -> list[Tensor]:
    return list(result.split(cu_seqlens.diff().tolist()))


def reference_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float) -> Tensor:
    """Written out, sequence by sequence."""
    results: list[Tensor] = []
    for a, b, c in zip(*(sequences(t, cu_seqlens) for t in (q, k, v)), strict=True):
        weights = (torch.einsum("qad,kad->aqk", a, b) * scale).softmax(-1)
        results.append(torch.einsum("aqk,kad->qad", weights, c))
    return torch.cat(results)


def test_every_token_label_and_position_is_found_again_and_no_padding() -> None:
    data = batch()
    flat, counts = unpad(data, 1, counts := Counts()), counts
    assert (counts.tokens, counts.positions, counts.filling) == (sum(LENGTHS), len(LENGTHS) * WIDTH, 0)
    assert flat["input_ids"].shape == (1, sum(LENGTHS))
    borders, order = flat["cu_seqlens"].tolist(), flat["next_sentence_labels"].tolist()
    masked, firsts = flat["picked"].split([len(flat["masked_labels"]), len(LENGTHS)])
    assert firsts.tolist() == borders[:-1]
    labels = iter(zip(masked.tolist(), flat["masked_labels"].tolist(), strict=True))
    for start, stop, number in zip(borders, borders[1:], order, strict=False):
        length = LENGTHS[number]
        assert stop - start == length
        for key in ("input_ids", "token_type_ids"):
            assert torch.equal(flat[key][0, start:stop], data[key][number, :length])
        assert torch.equal(flat["position_ids"][0, start:stop], torch.arange(length))
        for place, label in zip(data["masked_positions"][number], data["masked_labels"][number], strict=True):
            if label != IGNORED:
                assert next(labels) == (start + int(place), int(label))
    assert next(labels, None) is None
    assert [LENGTHS[n] for n in order] == sorted(LENGTHS, reverse=True)
    assert torch.equal(flat["mlm_scale"], data["mlm_scale"])


def test_sizes_are_filled_up_to_a_multiple() -> None:
    data = batch()
    exact = unpad(data)
    for round_to in (5, 53, 64):
        flat = unpad(data, round_to, counts := Counts())
        tokens, predictions = flat["input_ids"].shape[1], len(flat["masked_labels"])
        assert tokens % round_to == predictions % round_to == 0
        assert tokens == counts.tokens + counts.filling and 1 <= counts.filling <= round_to
        assert flat["cu_seqlens"].diff().max() <= flat["longest"]
        assert flat["cu_seqlens"][-1] == tokens and len(flat["cu_seqlens"]) == len(LENGTHS) + 2
        assert (flat["masked_labels"] != IGNORED).sum() == len(exact["masked_labels"])


@pytest.mark.parametrize("round_to", [1, 64])
@pytest.mark.parametrize(("heads", "hidden"), [(1, 24), (3, 24), (2, 40)])
def test_states_and_gradients_are_those_of_the_padded_batch(heads: int, hidden: int, round_to: int) -> None:
    data = batch()
    bert = network(heads=heads, hidden=hidden)
    expected_masked, expected_cls = padded(bert, data)
    labelled = data["masked_labels"] != IGNORED
    expected_masked[labelled].square().sum().add(expected_cls.pow(3).sum()).backward()
    gradients = [p.grad.clone() for p in bert.parameters()]
    bert.zero_grad()

    encoder, flat = Encoder(None), unpad(data, round_to)
    masked, cls = encoder(bert, flat)
    used = flat["masked_labels"] != IGNORED
    order = flat["next_sentence_labels"]
    masked[used].square().sum().add(cls.pow(3).sum()).backward()
    torch.testing.assert_close(cls, expected_cls[order], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        masked[used], torch.cat([expected_masked[n][labelled[n]] for n in order]), rtol=1e-4, atol=1e-5
    )
    for p, expected in zip(bert.parameters(), gradients, strict=True):
        torch.testing.assert_close(p.grad, expected, rtol=1e-3, atol=1e-4)
    assert encoder.unpadded and not encoder.padded


def test_evaluation_gives_the_same_states() -> None:
    data, bert = batch(), network(dropout=0.5).eval()
    with torch.no_grad():
        _, expected = padded(bert, data)
        flat = unpad(data)
        _, cls = Encoder(None)(bert, flat)
    torch.testing.assert_close(cls, expected[flat["next_sentence_labels"]], rtol=1e-4, atol=1e-5)


def test_attention_dropout_is_drawn_and_its_mean_is_the_attention_without() -> None:
    q, k, v = torch.randn(3, 10, 2, 4)
    borders = torch.tensor([0, 6, 10], dtype=torch.int32)
    draws = torch.stack([one_by_one(q, k, v, borders, 0.3, None) for _ in range(4000)])
    assert not torch.equal(draws[0], draws[1])
    torch.testing.assert_close(draws.mean(0), flash(q, k, v, borders, None), rtol=0.1, atol=0.06)
    bert = network(dropout=0.3)
    encoder = Encoder(None)
    encoder(bert, unpad(batch()))
    assert encoder.kernel == "scaled_dot_product_attention by length"


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("kernel", ["flash", "one_by_one", "nested"])
def test_each_kernel_attends_within_sequences_as_written_out(kernel: str) -> None:
    generator = torch.Generator().manual_seed(2)
    wanting = [torch.randn(11, 2, 8, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(3)]
    borders = torch.tensor([0, 4, 8, 10, 11], dtype=torch.int32)
    kernels = {
        "flash": lambda q, k, v: flash(q, k, v, borders, 0.3),
        "one_by_one": lambda q, k, v: one_by_one(q, k, v, borders, 0.0, 0.3),
        "nested": lambda q, k, v: nested(q, k, v, borders, 16, 0.0, 0.3),  # as on a GPU
    }
    result, expected = kernels[kernel](*wanting), reference_attention(*wanting, borders, 0.3)
    torch.testing.assert_close(result, expected)
    weights = torch.randn(result.shape, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(
        torch.autograd.grad((result * weights).sum(), wanting), torch.autograd.grad((expected * weights).sum(), wanting)
    )


def test_flash_attention_passes_gradcheck() -> None:
    wanting = [torch.randn(5, 1, 3, dtype=torch.float64).requires_grad_() for _ in range(3)]
    borders = torch.tensor([0, 2, 4, 5], dtype=torch.int32)
    assert torch.autograd.gradcheck(lambda q, k, v: flash(q, k, v, borders, None), wanting)


def test_no_sequence_sees_another() -> None:
    q, k, v = torch.randn(3, 12, 2, 4)
    borders = torch.tensor([0, 5, 8, 12], dtype=torch.int32)
    before = sequences(flash(q, k, v, borders, None), borders)
    for t in (q, k, v):
        t[5:8] += 1.0
    after = sequences(flash(q, k, v, borders, None), borders)
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [True, False, True]


def test_equally_long_sequences_are_attended_to_together() -> None:
    found = grouped(torch.tensor([0, 4, 8, 8, 10, 11, 12]))
    assert [(g.sequences, g.length) for g in found] == [(2, 4), (1, 2), (2, 1)]


def test_under_autocast_attention_is_bfloat16_and_close() -> None:
    data, bert = batch(), network()
    flat = unpad(data)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, cls = Encoder(None)(bert, flat)
    cls.float().sum().backward()
    _, expected = padded(bert, data)
    torch.testing.assert_close(cls.float(), expected[flat["next_sentence_labels"]], rtol=0.1, atol=0.1)


@pytest.mark.parametrize("purpose", ["train", "evaluate", "warm_up"])
def test_every_batch_is_unpadded_whatever_its_purpose_and_keeps_its_weight(purpose: str) -> None:
    opt, stream = Unpad(UnpadConfig(round_to=1)), [Batch(batch(), samples=12, weight=0.5)] * 2
    for _ in range(2):  # two epochs, or evaluations
        one, other = hooks_of(opt).transform(ctx=None, batches=stream, purpose=purpose)
        assert (one.samples, one.weight) == (12, 0.5)
        assert torch.equal(one.data["input_ids"], unpad(batch())["input_ids"])
        assert torch.equal(other.data["picked"], one.data["picked"])
    assert opt._counts is not None and opt._counts.batches == 4


def test_a_padded_batch_goes_to_the_workloads_own_encoder_and_is_no_evidence() -> None:
    opt = Unpad(UnpadConfig(round_to=1))
    assert not opt.verify().active
    data, bert = batch(), network()
    encoder = opt._encoder = Encoder(padded)
    opt._counts = Counts()
    _, expected = encoder(bert, data)
    encoder(bert, unpad(data, 1, opt._counts))
    _, again = encoder(bert, data)  # now through this plugin's attention function
    torch.testing.assert_close(again, expected)
    evidence = opt.verify()
    assert not evidence.active and "COMPUTED WITH PADDING" in evidence.summary


def test_nothing_to_remove_is_no_evidence() -> None:
    opt = Unpad(UnpadConfig(round_to=1))
    data = batch()
    data["attention_mask"][:] = True
    opt._encoder, opt._counts = Encoder(None), Counts()
    opt._encoder(network(), unpad(data, 1, opt._counts))
    assert not opt.verify().active


def test_layers_are_called_as_modules_so_that_hooks_and_checkpointing_see_them() -> None:
    bert, seen = network(), list[nn.Module]()
    for layer in bert.encoder.layer:
        layer.register_forward_hook(lambda module, *_: seen.append(module))
    Encoder(None)(bert, unpad(batch()))
    assert seen == list(bert.encoder.layer)
