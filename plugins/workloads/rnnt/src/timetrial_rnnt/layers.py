"""The three networks of a transducer: encoder, prediction network and joint network.

Letters in names of tensors: B utterances, T encoder frames, F features of a spliced frame, H width of the encoder,
P of the prediction network, J of the joint network, U labels, V classes (the last of them is the blank).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of all layers; `config.py` says what each is."""

    features: int
    classes: int
    encoder_hidden: int
    pre_layers: int
    post_layers: int
    stack_time: int
    predictor_hidden: int
    predictor_layers: int
    joint_hidden: int
    encoder_dropout: float
    predictor_dropout: float
    joint_dropout: float


class Recurrent(nn.Module):
    """LSTM layers, with dropout between them and after the last."""

    def __init__(self, inputs: int, hidden: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.lstm = nn.LSTM(inputs, hidden, layers, batch_first=True, dropout=dropout if layers > 1 else 0.0)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        x, after = self.lstm(x, state)
        return self.dropout(x), after


class Encoder(nn.Module):
    """Spliced frames [B, T x stack_time, F] to [B, T, H]: LSTMs, then `stack_time` neighbouring frames become one, then
    LSTMs at the lower rate. It depends only on the past, so what follows an utterance's end does not change it."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        hidden, dropout = sizes.encoder_hidden, sizes.encoder_dropout
        self.stack_time = sizes.stack_time
        self.pre_rnn = Recurrent(sizes.features, hidden, sizes.pre_layers, dropout)
        self.post_rnn = Recurrent(hidden * self.stack_time, hidden, sizes.post_layers, dropout)

    def forward(self, features_BTF: Tensor) -> Tensor:
        x, _ = self.pre_rnn(features_BTF)
        x = F.pad(x, (0, 0, 0, -x.shape[1] % self.stack_time))
        x = x.reshape(x.shape[0], x.shape[1] // self.stack_time, -1)
        return self.post_rnn(x)[0]


class Prediction(nn.Module):
    """The labels so far [B, U] to [B, U+1, P]: what may come next, before each label and after the last."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        hidden = sizes.predictor_hidden
        self.embed = nn.Embedding(sizes.classes - 1, hidden)
        self.rnn = Recurrent(hidden, hidden, sizes.predictor_layers, sizes.predictor_dropout)

    def forward(self, labels_BU: Tensor) -> Tensor:
        embedded = F.pad(self.embed(labels_BU), (0, 0, 1, 0))  # the start is a vector of zeros
        return self.rnn(embedded)[0]


class Joint(nn.Module):
    """Encoder frame and prediction to logits: projections to the common width J, and

        h_BTUJ = activation(encoded_BTJ[:, :, None] + predicted_BUJ[:, None])
        logits_BTUV = output(dropout(h_BTUJ))

    `forward` takes both already projected. The class `blank` is the last one.
    """

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.encoder_projection = nn.Linear(sizes.encoder_hidden, sizes.joint_hidden)
        self.predictor_projection = nn.Linear(sizes.predictor_hidden, sizes.joint_hidden)
        self.activation = nn.ReLU()
        self.dropout = nn.Dropout(sizes.joint_dropout)
        self.output = nn.Linear(sizes.joint_hidden, sizes.classes)
        self.blank = sizes.classes - 1

    def forward(self, encoded_BTJ: Tensor, predicted_BUJ: Tensor) -> Tensor:
        h_BTUJ = self.activation(encoded_BTJ[:, :, None] + predicted_BUJ[:, None])
        return self.output(self.dropout(h_BTUJ))
