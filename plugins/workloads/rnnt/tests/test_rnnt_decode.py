"""Greedy decoding of a batch, against a loop over one utterance as the definition has it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from timetrial_rnnt.decode import greedy
from timetrial_rnnt.layers import Sizes
from timetrial_rnnt.model import Transducer, initialise

pytestmark = pytest.mark.numbers

SIZES = Sizes(
    features=6, classes=7, encoder_hidden=10, pre_layers=1, stack_time=2, post_layers=1, predictor_hidden=9,
    predictor_layers=2, joint_hidden=8, encoder_dropout=0.0, predictor_dropout=0.0, joint_dropout=0.0,
)  # fmt: skip


def transducer(seed: int, blank_bias: float, sharpness: float = 8.0) -> Transducer:
    """An untrained model that says much: its classes are far apart, and the blank is as likely as asked for.
    In float64, or the last bit could choose another symbol in a batch than alone."""
    built = Transducer(SIZES, lambda *_: torch.zeros(()), max_symbols=300, max_per_frame=30)
    initialise(built, 1.0, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        built.joint.output.weight *= sharpness
        built.joint.output.bias[built.joint.blank] += blank_bias
    return built.double().eval()


def one_by_one(model: Transducer, encoded_TJ: Tensor, max_symbols: int, max_per_frame: int) -> list[int]:
    symbols: list[int] = []
    predicted, state = model.prediction.rnn(torch.zeros(1, 1, SIZES.predictor_hidden, dtype=torch.float64))
    for frame in encoded_TJ:
        for _ in range(max_per_frame):
            logits = model.joint(frame[None, None], model.joint.predictor_projection(predicted))
            best = int(logits.argmax())
            if best == model.joint.blank or len(symbols) == max_symbols:
                break
            symbols.append(best)
            predicted, state = model.prediction.rnn(model.prediction.embed(torch.tensor([[best]])), state)
    return symbols


@pytest.mark.parametrize(("limit", "per_frame"), [(300, 6), (300, 2), (300, 1), (7, 6)])
@torch.no_grad()
def test_a_batch_is_decoded_as_each_utterance_alone_would_be(limit: int, per_frame: int) -> None:
    total = stayed = 0
    for seed in range(6):
        model = transducer(seed, blank_bias=0.5 + seed / 2)
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(0, 30, (5,), generator=generator)
        encoded = 3 * torch.randn(5, 30, SIZES.joint_hidden, generator=generator, dtype=torch.float64)
        symbols, counts = greedy(model.prediction, model.joint, encoded, lengths, limit, per_frame)
        assert symbols.shape == (5, limit)
        for row, length in enumerate(lengths.tolist()):
            expected = one_by_one(model, encoded[row, :length], limit, per_frame)
            assert symbols[row, : counts[row]].tolist() == expected
            assert (symbols[row, counts[row] :] == model.joint.blank).all()
            total, stayed = total + len(expected), stayed + (len(expected) > length)
    assert total > 100
    assert per_frame == 1 or limit == 7 or stayed  # some frames have said more than one symbol


@torch.no_grad()
def test_no_utterance_has_more_symbols_than_the_rule_allows() -> None:
    chatty = transducer(0, blank_bias=-100.0)
    lengths = torch.tensor([5, 40, 0])
    encoded = torch.randn(3, 40, SIZES.joint_hidden, dtype=torch.float64)
    symbols, counts = greedy(chatty.prediction, chatty.joint, encoded, lengths, 300, 30)
    assert counts.tolist() == [150, 300, 0]
    assert (symbols[1] != chatty.joint.blank).all()


@torch.no_grad()
def test_what_lies_behind_an_utterances_end_does_not_change_its_text() -> None:
    model = transducer(3, blank_bias=1.0)
    features = torch.randn(2, 60, SIZES.features, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    lengths = torch.tensor([31, 60])
    found = model({"features": features, "feature_lengths": lengths})
    features[0, 31:] = 1e3
    again = model({"features": features, "feature_lengths": lengths})
    # An odd length shares its last encoder frame with one frame of padding, which is 0 in every batch.
    features[0, 31] = 0.0
    assert torch.equal(found["symbols"][1], again["symbols"][1])
    alone = model({"features": features[:1, :40], "feature_lengths": lengths[:1]})
    padded = model({"features": features[:1], "feature_lengths": lengths[:1]})
    assert torch.equal(alone["symbols"], padded["symbols"])
