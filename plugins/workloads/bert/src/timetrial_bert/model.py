"""BERT for pre-training: transformers' own network in one forward pass that ends in the loss.

Devlin et al. (2018), arXiv:1810.04805. Shape suffixes: B rows of the batch, S tokens of a row, P predictions of a row,
N predictions of all rows (B x P), H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertForPreTraining
from transformers.initialization import no_init_weights

from core.api.types import Outputs
from timetrial_bert.seams import IGNORED

SIZES = {
    "tiny": (2, 128, 2),
    "mini": (4, 256, 4),
    "small": (4, 512, 8),
    "medium": (8, 512, 8),
    "base": (12, 768, 12),
    "large": (24, 1024, 16),
}
"""Layers, hidden size and heads: base and large are Devlin et al.'s, the others Turc et al.'s (arXiv:1908.08962)."""

EXPANSION = 4
"""Inner size of the feed-forward part, in hidden sizes (Devlin et al., section 3)."""

Encode = Callable[[nn.Module, dict[str, Tensor]], tuple[Tensor, Tensor]]
"""Component "bert.encoder": `(BertModel, data) -> (hidden_BPH at the masked positions, hidden_BH at [CLS])`."""


class MaskedLMLoss(Protocol):
    """Component "bert.mlm_loss"."""

    def __call__(
        self, hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor, labels_N: Tensor, *, count_correct: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The cross-entropy summed over the labels that are not IGNORED, a float32 scalar; and with `count_correct` at
        how many of them the largest logit is the label's, an int64 scalar, else None."""
        ...


class PreTraining(nn.Module):
    """`forward(data)` -> losses, and in evaluation counts, for one batch (its layout: `timetrial_bert.batch`).

    Everything happens inside `forward`, so that DistributedDataParallel sees one forward pass. The network's own
    parameters keep transformers' names under the prefix "network.".
    """

    def __init__(self, config: BertConfig, encode: Encode, mlm_loss: MaskedLMLoss) -> None:
        super().__init__()
        with no_init_weights():  # `initialise` fills them, from the run's seed
            self.network = BertForPreTraining(config)
        self.network.tie_weights()
        self.encode, self.mlm_loss = encode, mlm_loss

    def forward(self, data: dict[str, Tensor]) -> Outputs:
        """In training {"loss"}: the mean over the local examples of each one's share of the masked-LM loss plus its
        next-sentence loss, a scalar with gradient. In evaluation sums over the batch: "correct", "masked",
        "next_correct" and "examples" (int64), "mlm_loss_sum" (float32)."""
        bert: Any = self.network.bert
        heads = self.network.cls
        hidden_BPH, cls_BH = self.encode(bert, data)
        labels_N = data["masked_labels"].flatten()
        predictions = heads.predictions
        mlm_sum, correct = self.mlm_loss(
            predictions.transform(hidden_BPH.flatten(0, -2)),
            predictions.decoder.weight,
            predictions.decoder.bias,
            labels_N,
            count_correct=not self.training,
        )
        next_labels = data["next_sentence_labels"].flatten()
        next_logits = heads.seq_relationship(bert.pooler.activation(bert.pooler.dense(cls_BH.flatten(0, -2))))
        examples = (next_labels != IGNORED).sum()
        if correct is None:
            next_sum = F.cross_entropy(next_logits, next_labels, reduction="sum", ignore_index=IGNORED)
            return {"loss": (mlm_sum * data["mlm_scale"].flatten()[0] + next_sum) / examples}
        return {
            "correct": correct,
            "masked": (labels_N != IGNORED).sum(),
            "mlm_loss_sum": mlm_sum,
            "next_correct": (next_logits.argmax(-1) == next_labels).sum(),
            "examples": examples,
        }


def network_config(
    size: str, *, vocab_size: int, max_positions: int, dropout: float, attention: str, init_std: float
) -> BertConfig:
    """transformers' configuration of one of `SIZES`. `attention` is "eager" (written-out softmax) or "sdpa"."""
    layers, hidden, heads = SIZES[size]
    return BertConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=EXPANSION * hidden,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        max_position_embeddings=max_positions,
        initializer_range=init_std,
        attn_implementation=attention,  # pyright: ignore[reportCallIssue] (the parent class takes it)
    )


@torch.no_grad()
def initialise(model: PreTraining, generator: torch.Generator) -> None:
    """Matrices and embeddings normal, cut off at two deviations, biases 0, layer normalisation 1 and 0 (reference:
    language_model/tensorflow/bert/modeling.py, create_initializer)."""
    std = model.network.config.initializer_range
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            nn.init.trunc_normal_(parameter, std=std, a=-2 * std, b=2 * std, generator=generator)
        else:
            nn.init.constant_(parameter, 1.0 if name.endswith("LayerNorm.weight") else 0.0)
    embeddings = model.network.bert.embeddings
    embeddings.position_ids.copy_(torch.arange(embeddings.position_ids.shape[-1]))
    embeddings.token_type_ids.zero_()


def encode(bert: Any, data: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The whole padded batch through the encoder: hidden states [B, P, H] at the masked positions, [B, H] at [CLS].

    Goes around `BertModel.forward`, which looks into the mask to find out whether it can be left out, and would make
    the host wait for the device.
    """
    hidden_BSH = bert.embeddings(input_ids=data["input_ids"], token_type_ids=data["token_type_ids"])
    mask_B11S = data["attention_mask"][:, None, None, :]
    if bert.config._attn_implementation == "eager":  # adds the mask to the scores
        lowest = torch.finfo(hidden_BSH.dtype).min
        mask_B11S = torch.zeros_like(mask_B11S, dtype=hidden_BSH.dtype).masked_fill(~mask_B11S, lowest)
    hidden_BSH = bert.encoder(hidden_BSH, attention_mask=mask_B11S).last_hidden_state
    return gather_rows(hidden_BSH, data["masked_positions"]), hidden_BSH[:, 0]


def gather_rows(hidden_BSH: Tensor, positions_BP: Tensor) -> Tensor:
    """[B, P, H]: of each row, the states at its positions."""
    rows, length, size = hidden_BSH.shape
    starts = torch.arange(rows, device=positions_BP.device)[:, None] * length
    return hidden_BSH.reshape(-1, size).index_select(0, (positions_BP + starts).flatten()).view(rows, -1, size)


def mlm_loss(
    hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor, labels_N: Tensor, *, count_correct: bool
) -> tuple[Tensor, Tensor | None]:
    """The plain `MaskedLMLoss`: all logits [N, V] at once."""
    logits_NV = F.linear(hidden_NH, weight_VH, bias_V)
    loss = F.cross_entropy(logits_NV.float(), labels_N, reduction="sum", ignore_index=IGNORED)
    return loss, (logits_NV.argmax(-1) == labels_N).sum() if count_correct else None
