"""The network in one forward pass, against transformers' own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from timetrial_bert.config import SIZES as CHOICES
from timetrial_bert.model import SIZES, gather_rows, mlm_loss, network_config
from timetrial_bert.seams import IGNORED
from timetrial_bert.workload import BertWorkload

pytestmark = pytest.mark.numbers

MakeWorkload = Callable[..., BertWorkload]

SMALL = ("size=tiny", "vocab_size=200", "sequence_length=24", "max_positions=24", "global_batch_size=6", "dropout=0")


def built(make: MakeWorkload, *more: str) -> tuple[Any, Any, dict[str, Tensor]]:
    workload = make("bert", *SMALL, "init_checkpoint=null", "synthetic_fill=0.6", *more, source="synthetic")
    (batch,) = workload.example_batches()
    return workload, workload.build_model(), batch.data


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_loss_is_that_of_transformers_own_forward_pass(make: MakeWorkload, attention: str) -> None:
    _, model, data = built(make, f"attn_implementation={attention}")
    labels_BS = torch.full_like(data["input_ids"], IGNORED)
    for row, position, label in zip(
        torch.arange(6).repeat_interleave(12), data["masked_positions"].flatten(), data["masked_labels"].flatten(),
        strict=True,
    ):  # fmt: skip
        if label != IGNORED:
            labels_BS[row, position] = label
    expected = model.network(
        data["input_ids"],
        attention_mask=data["attention_mask"].long(),
        token_type_ids=data["token_type_ids"],
        labels=labels_BS,
        next_sentence_label=data["next_sentence_labels"],
    ).loss
    torch.testing.assert_close(model(data)["loss"], expected, atol=1e-5, rtol=1e-5)


def test_padding_changes_nothing(make: MakeWorkload) -> None:
    _, model, data = built(make)
    before = model(data)["loss"]
    data["input_ids"] = data["input_ids"].masked_fill(~data["attention_mask"], 77)
    torch.testing.assert_close(model(data)["loss"], before)


def test_ranks_with_other_shares_of_the_predictions_add_up_to_one_rank(make: MakeWorkload) -> None:
    """What DistributedDataParallel computes: the mean over ranks of weighted losses and of their gradients."""
    _, model, data = built(make)
    assert len({int(n) for n in (data["masked_labels"] != IGNORED).sum(1)}) > 1
    whole = model(data)["loss"]
    whole.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    total = torch.zeros(())
    for rows in (slice(0, 4), slice(4, 6)):
        part = {name: tensor[rows] for name, tensor in data.items()}
        weight = len(part["input_ids"]) * 2 / 6
        loss = model(part)["loss"] * weight / 2
        loss.backward()
        total += loss.detach()
    torch.testing.assert_close(total, whole.detach())
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], atol=1e-6, rtol=1e-4)


def test_evaluation_counts_what_is_right(make: MakeWorkload) -> None:
    _, model, data = built(make)
    model.eval()
    with torch.no_grad():
        found = model(data)
        scores = model.network(
            data["input_ids"],
            attention_mask=data["attention_mask"].long(),
            token_type_ids=data["token_type_ids"],
        )
    best = gather_rows(scores.prediction_logits, data["masked_positions"]).argmax(-1)
    used = data["masked_labels"] != IGNORED
    assert found["masked"] == used.sum() and found["examples"] == 6
    assert found["correct"] == ((best == data["masked_labels"]) & used).sum()
    assert found["next_correct"] == (scores.seq_relationship_logits.argmax(-1) == data["next_sentence_labels"]).sum()


def test_the_loss_of_no_predictions_is_zero_with_a_gradient() -> None:
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(7, 4)
    loss, correct = mlm_loss(hidden, weight, torch.zeros(7), torch.full((3,), IGNORED), count_correct=True)
    loss.backward()
    assert (loss, correct) == (0, 0)
    assert hidden.grad is not None
    assert not hidden.grad.any()
    labels = torch.tensor([1, IGNORED, 5])
    loss, correct = mlm_loss(hidden.detach(), weight, torch.zeros(7), labels, count_correct=False)
    assert correct is None
    torch.testing.assert_close(
        loss, F.cross_entropy(hidden[[0, 2]] @ weight.T, labels[[0, 2]], reduction="sum").detach()
    )


def test_weights_come_from_the_seed_and_are_shared(make: MakeWorkload) -> None:
    (_, one, _), (_, again, _) = built(make), built(make)
    other = make("bert", *SMALL, "init_checkpoint=null", seed=2, source="synthetic").build_model()
    for (name, p), q, r in zip(one.named_parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
        assert p.ndim == 1 or not torch.equal(p, r), name
    network = one.network
    assert network.cls.predictions.decoder.weight is network.bert.embeddings.word_embeddings.weight
    assert network.bert.embeddings.position_ids.tolist() == [list(range(24))]


def test_blocks_are_the_encoder_layers(make: MakeWorkload) -> None:
    workload, model, _ = built(make)
    assert [type(b).__name__ for b in workload.blocks(model)] == ["BertLayer"] * 2


def test_large_has_the_references_size() -> None:
    from transformers import BertForPreTraining

    config = network_config("large", vocab_size=30522, max_positions=512, dropout=0.1, attention="sdpa", init_std=0.02)
    with torch.device("meta"):
        network = BertForPreTraining(config)
    assert sum(p.numel() for p in network.parameters()) == 336_226_108  # as published, both heads included
    assert set(SIZES) == set(CHOICES)


def test_synthetic_rows_are_filled_as_asked(make: MakeWorkload) -> None:
    for fill in (0.3, 0.5, 1.0):
        workload = make("bert", f"synthetic_fill={fill}", "global_batch_size=512", source="synthetic")
        (batch,) = workload.example_batches()
        data, mask = batch.data, batch.data["attention_mask"]
        assert mask.float().mean() == pytest.approx(fill, abs=0.05)
        assert torch.equal(mask, mask.cummin(1).values)  # padding comes last
        used = data["masked_labels"] != IGNORED
        assert torch.all(mask.gather(1, data["masked_positions"]) | ~used)
        assert data["mlm_scale"][0] == pytest.approx(512 / int(used.sum()))
