"""What can be set under `workload`: types, ranges and meaning. Imports without torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from core.api.config import EvalConfig, checked

SIZES = ("tiny", "mini", "small", "medium", "base", "large")


@dataclass(kw_only=True)
class BertConfig:
    """`conf/workload/*.yaml` holds the values of the two options."""

    RENAMED: ClassVar[Mapping[str, str]] = {
        "data_set": "embedded_data",
        "target": "targets.masked_lm_accuracy",
        "eval_batch_size": "eval.batch_size",
        "eval_every_samples": "eval.every",
        "warmup_steps": "lr_warmup_steps",
        "start_warmup_step": "lr_warmup_start_step",
    }

    embedded_data: str | None = checked(choices=("articles",))
    """Read where data.root is null; `articles`: the Wikipedia articles in the gensim wheel. data.root is a folder that
    `core.prepare` has written."""
    vocab_file: str | None
    """For `core.prepare`: BERT's vocab.txt, one token a line; `starter`: the starter checkpoint's; null trains one of
    `vocab_size` tokens."""
    vocab_size: int = checked(at_least=64, at_most=65536)
    lower_case: bool
    sequence_length: int = checked(at_least=8)
    """Tokens in a row, padding included."""
    max_predictions: int = checked(at_least=1)
    """Most masked tokens in a row."""
    masked_share: float = checked(above=0, at_most=0.9)
    """Share of a row's tokens that are predicted."""
    short_probability: float = checked(at_least=0, at_most=1)
    """Share of pairs that fill only a random part of the row."""
    masking: str = checked(choices=("static", "dynamic"))
    """`static`: masks are drawn in the preparation; `dynamic`: anew in every epoch."""
    duplicates: int = checked(at_least=1)
    """For `core.prepare`: how many times each document is made into pairs (and masks); the reference's dupe factor."""
    held_out: float = checked(at_least=0, at_most=0.9)
    """For `core.prepare`: share of the documents that is kept for evaluation."""
    shard_mib: float = checked(above=0)
    """For `core.prepare`: MiB of text that become one shard, whose second sentences come from within it."""
    max_eval_samples: int | None = checked(at_least=1)
    """Maximum number of examples to evaluate; they are taken evenly spaced from a larger evaluation set."""
    synthetic_fill: float = checked(above=0, at_most=1)
    """Of `data=synthetic`: mean share of a row that is not padding; lengths are spread evenly around it."""

    size: str = checked(choices=SIZES)
    """2 layers of 128 (tiny) to 24 of 1,024 (large)."""
    max_positions: int = checked(at_least=8)
    """Position embeddings; at least `sequence_length`."""
    attn_implementation: str = checked(choices=("eager", "sdpa"))
    """transformers' name: attention written out, or torch's scaled_dot_product_attention."""
    dropout: float = checked(at_least=0, at_most=0.9)
    """Of hidden states and of attention. Two ranks draw other masks than one."""
    init_std: float = checked(above=0)
    init_checkpoint: str | None
    """`starter`: the checkpoint in this package; a file (README: "Checkpoints"); null: from scratch."""

    global_batch_size: int = checked(at_least=1)
    max_epochs: int = checked(at_least=1)
    targets: dict[str, float] = checked(keys=("masked_lm_accuracy",), above=0, at_most=1)
    """Masked-LM accuracy over the whole evaluation set."""
    eval: EvalConfig
    """`every: null` is the rules' formula, floor(0.05 * (230.23 * batch size + 3,000,000), 25,000) samples, and
    `batch_size: null` the global batch size."""

    optimizer: str = checked(choices=("lamb", "adamw"))
    base_learning_rate: float = checked(above=0)
    training_steps: int = checked(at_least=1)
    """Step at which the polynomial decay has reached 0."""
    lr_warmup_steps: int = checked(at_least=0)
    lr_warmup_start_step: int = checked(at_most=0)
    """The warm-up counts its steps from here, as the reference does: -100 begins 100 steps up the line."""
    poly_power: float = checked(above=0)
    beta_1: float = checked(at_least=0, at_most=0.9999)
    beta_2: float = checked(at_least=0, at_most=0.99999)
    epsilon: float = checked(above=0)
    weight_decay: float = checked(at_least=0)
    """Not applied to biases and layer normalisation."""
    bias_correction: bool
    max_grad_norm: float | None = checked(at_least=0)
    """Gradients are scaled down to this global norm; null or 0: never. Of `lamb` alone."""
