"""What can be set under `workload`: types, ranges and meaning. Imports without torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from core.api.config import EvalConfig, checked


@dataclass(kw_only=True)
class RnntConfig:
    """`conf/workload/*.yaml` holds the values of the two options."""

    RENAMED: ClassVar[Mapping[str, str]] = {
        "data_set": "embedded_data",
        "target": "targets.word_error_rate",
        "eval_batch_size": "eval.batch_size",
        "eval_every": "eval.every",
        "eval_first": "eval.first",
        "warmup_epochs": "lr_warmup_epochs",
    }

    embedded_data: str | None = checked(choices=("digits",))
    """Read where data.root is null; `digits`: digit strings spoken by espeak-ng. data.root is a folder that
    `core.prepare` has written."""
    tokens: str = checked(choices=("letters", "sentencepieces"))
    """What transcripts are made of; must agree with the preparation. The embedded digits are spelt in letters."""
    vocab_size: int = checked(at_least=2, at_most=65535)
    """Tokens, the blank not counted."""
    sentencepiece_model: str | None
    """For `core.prepare`: a given model; null trains one of `vocab_size` pieces."""
    eval_folder: str
    """For `core.prepare`: the part of LibriSpeech to evaluate on; those that begin with "train" are trained on."""
    max_duration: float = checked(above=0)
    """Seconds; for `core.prepare`: longer training utterances are left out, and counted."""
    buckets: int = checked(at_least=1)
    """Of utterances, by duration; a batch comes from one of them, mostly."""
    pad_frames_to: int = checked(at_least=1)
    """Spliced frames; a batch is padded to a multiple, so that there are few different shapes."""
    features_by: str = checked(choices=("threads", "device"))
    """Log-mel features are computed for each utterance by the threads that read it, or for the batch on the device."""
    synthetic_seconds: float = checked(above=0)
    synthetic_labels: int = checked(at_least=1)
    """Of `data=synthetic`: the length of an utterance, and of its transcript."""

    mels: int = checked(at_least=1)
    splice_frames: int = checked(at_least=1)
    """Frames of 10 ms that are put end to end, and become one."""
    trim_silence_db: float | None = checked(at_most=0)
    """Quieter ends of an utterance are cut off; null: none are."""
    speed_min: float = checked(above=0)
    speed_max: float = checked(above=0)
    """Training utterances are played at a random speed between the two, in hundredths."""
    freq_masks: int = checked(at_least=0)
    freq_mask_max: int = checked(at_least=0)
    """SpecAugment: how many bands are masked, and the most mels in each."""
    time_masks: int = checked(at_least=0)
    time_mask_max: float = checked(at_least=0, at_most=1)
    """SpecAugment: how many stretches are hidden, and at most so much of the utterance each."""

    encoder_hidden: int = checked(at_least=1)
    pre_layers: int = checked(at_least=1)
    """LSTM layers before the time reduction."""
    stack_time: int = checked(at_least=1)
    """The time reduction: spliced frames that become one encoder frame."""
    post_layers: int = checked(at_least=1)
    predictor_hidden: int = checked(at_least=1)
    predictor_layers: int = checked(at_least=1)
    joint_hidden: int = checked(at_least=1)
    encoder_dropout: float = checked(at_least=0, at_most=0.9)
    predictor_dropout: float = checked(at_least=0, at_most=0.9)
    joint_dropout: float = checked(at_least=0, at_most=0.9)
    """Two ranks draw other masks than one."""
    init_scale: float = checked(above=0)
    """The initial weights and biases of the LSTMs are torch's times this."""

    global_batch_size: int = checked(at_least=1)
    max_epochs: int = checked(at_least=1)
    targets: dict[str, float] = checked(keys=("word_error_rate",), above=0, at_most=1)
    """Word error rate over the whole evaluation set."""
    eval: EvalConfig
    """`every: null` is one epoch, and `batch_size: null` the global batch size."""
    max_symbols: int = checked(at_least=1)
    max_symbols_per_frame: int = checked(at_least=1)
    """Limits of decoding: of an utterance, and of one encoder frame."""

    base_learning_rate: float = checked(above=0)
    min_learning_rate: float = checked(at_least=0)
    lr_warmup_epochs: float = checked(at_least=0)
    hold_epochs: float = checked(at_least=0)
    decay_per_epoch: float = checked(above=0, at_most=1)
    """After warm-up and hold, the learning rate is multiplied by it in each epoch."""
    beta_1: float = checked(at_least=0, at_most=0.9999)
    beta_2: float = checked(at_least=0, at_most=0.99999)
    epsilon: float = checked(above=0)
    weight_decay: float = checked(at_least=0)
    max_grad_norm: float | None = checked(at_least=0)
    """Gradients are scaled down to this global norm; null or 0: never."""
    ema: float = checked(at_least=0, at_most=0.99999)
    """Decay, at each step, of the average of the weights that is evaluated; 0: the weights themselves are."""
