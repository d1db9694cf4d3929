"""The recurrent neural network transducer of MLPerf v1.1. `timetrial_rnnt.layers` explains the letters in names."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from timetrial_rnnt import decode
from timetrial_rnnt.layers import Encoder, Joint, Prediction, Sizes

greedy: Any = torch.compiler.disable(decode.greedy)  # how many turns it takes depends on what is heard
Loss = Callable[[nn.Module, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


class Transducer(nn.Module):
    """In training, a batch to its loss; in evaluation, to its text. `loss` is the seam "rnnt.loss"."""

    def __init__(self, sizes: Sizes, loss: Loss, *, max_symbols: int, max_per_frame: int) -> None:
        super().__init__()
        self.encoder, self.prediction, self.joint = Encoder(sizes), Prediction(sizes), Joint(sizes)
        self.transducer_loss = loss
        self.max_symbols, self.max_per_frame = max_symbols, max_per_frame

    def forward(self, data: dict[str, Tensor]) -> dict[str, Tensor]:
        """`data` as `timetrial_rnnt.batch` documents it. In training {"loss"}, a mean over B; in evaluation {"symbols"
        [B, max_symbols] int64, filled up with the blank, "counts" [B] int64}."""
        encoded = self.joint.encoder_projection(self.encoder(data["features"]))
        lengths = -(-data["feature_lengths"] // self.encoder.stack_time)
        if not self.training:
            symbols, counts = greedy(
                self.prediction, self.joint, encoded, lengths, self.max_symbols, self.max_per_frame
            )
            return {"symbols": symbols, "counts": counts}
        predicted = self.joint.predictor_projection(self.prediction(data["labels"]))
        losses = self.transducer_loss(self.joint, encoded, predicted, data["labels"], lengths, data["label_lengths"])
        return {"loss": losses.mean()}


def initialise(model: nn.Module, scale: float, generator: torch.Generator) -> None:
    """As the reference: torch's usual distributions; forget gates biased by 1 in all; then weights and biases of the
    LSTMs times `scale` (rnn_speech_recognition/pytorch/common/rnn.py)."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                _uniform(module.parameters(), module.in_features, generator)
            elif isinstance(module, nn.Embedding):
                module.weight.normal_(generator=generator)
            elif isinstance(module, nn.LSTM):
                _uniform(module.parameters(), module.hidden_size, generator)
                forget = slice(module.hidden_size, 2 * module.hidden_size)
                for name, parameter in module.named_parameters():
                    if name.startswith("bias"):
                        parameter[forget] = 1.0 if name.startswith("bias_ih") else 0.0
                    parameter *= scale


def _uniform(parameters: Any, fan: int, generator: torch.Generator) -> None:
    for parameter in parameters:
        parameter.uniform_(-1 / math.sqrt(fan), 1 / math.sqrt(fan), generator=generator)
