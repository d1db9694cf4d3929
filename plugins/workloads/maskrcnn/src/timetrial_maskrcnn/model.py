"""Mask R-CNN (He et al. 2017) on a feature pyramid (Lin et al. 2017), put together from torchvision's parts.

    images -> backbone, pyramid -> region proposals -> box head -> boxes and classes -> mask head -> masks

Letters as in regions.py. Every loss is a mean over images of a sum over the image's sampled regions by its fixed
budget, so that the ranks of a run agree with one rank that holds all images: torchvision divides by what the whole
local batch has sampled, which is the same number where the images fill their budgets.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import resnet50
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import MultiScaleRoIAlign, roi_align
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from torchvision.ops.misc import FrozenBatchNorm2d

from timetrial_maskrcnn.boxes import decode, encode
from timetrial_maskrcnn.regions import Parts, clip

if TYPE_CHECKING:
    from timetrial_maskrcnn.config import MaskRCNNConfig

BETA = 1 / 9
"""Of the smooth L1 loss of region proposals (the reference's RPN)."""
RPN_DELTA_WEIGHTS, BOX_DELTA_WEIGHTS = (1.0, 1.0, 1.0, 1.0), (10.0, 10.0, 5.0, 5.0)
"""Scale of the box regression targets (Fast R-CNN's code, and the reference)."""
ASPECT_RATIOS = (0.5, 1.0, 2.0)
UNTRAINED_RESIDUAL = 0.25
"""Scale of a block's residual in an untrained ResNet-50, whose frozen normalisation normalises nothing: its 16 blocks
then multiply the variance by about (1 + 1/16)^16 = 2.6, and not by 2^16, with which losses grow within six steps."""
GROUP = 8
"""Channels a group of group normalisation, in the small backbone."""


class MaskRCNN(nn.Module):
    """`forward(data)` -> losses while training, else detections. `data` is described in `timetrial_maskrcnn.batch`."""

    def __init__(self, config: MaskRCNNConfig, channels: int, classes: int, parts: Parts) -> None:
        """`channels` of the images; `classes` without the background."""
        super().__init__()
        self.config, self.parts = config, parts
        self.backbone, levels = _backbone(config, channels)
        width = config.fpn_channels
        self.anchors = AnchorGenerator(tuple((s,) for s in config.anchor_sizes), (ASPECT_RATIOS,) * len(levels))
        self.rpn = RPNHead(width, len(ASPECT_RATIOS))
        scale, samples = config.canonical_scale, config.region_samples
        pooled = partial(MultiScaleRoIAlign, levels[:-1], sampling_ratio=samples, canonical_scale=scale)
        self.box_pool, self.mask_pool = pooled(7), pooled(14)
        self.box_head = TwoMLPHead(width * 7 * 7, config.box_head_width)
        self.box_predictor = FastRCNNPredictor(config.box_head_width, classes + 1)
        layers = config.mask_head_layers
        self.mask_head = MaskRCNNHeads(width, layers, 1)
        self.mask_predictor = MaskRCNNPredictor(layers[-1], layers[-1], classes + 1)
        for layer, deviation in ((self.box_predictor.cls_score, 0.01), (self.box_predictor.bbox_pred, 0.001)):
            nn.init.normal_(layer.weight, std=deviation)  # as in the reference
            nn.init.zeros_(layer.bias)

    def forward(self, data: Mapping[str, Tensor]) -> dict[str, Tensor]:
        images_BCHW = data["images"]
        features = self.backbone(images_BCHW)
        objectness_BA, deltas_BA4, level_sizes = self._propose(list(features.values()))
        anchors_A4 = self._anchors(images_BCHW, list(features.values()))
        if not self.training:
            return self._detect(
                data, features, self._proposals(data, objectness_BA, deltas_BA4, anchors_A4, level_sizes)
            )
        losses = self._rpn_losses(data, objectness_BA, deltas_BA4, anchors_A4)
        proposals = self._proposals(data, objectness_BA, deltas_BA4, anchors_A4, level_sizes)
        losses |= self._head_losses(data, features, *proposals)
        return {"loss": torch.stack(list(losses.values())).sum(), **{k: v.detach() for k, v in losses.items()}}

    # ------------------------------------------------------------------------------------------- region proposals

    def _propose(self, features: list[Tensor]) -> tuple[Tensor, Tensor, list[int]]:
        """Objectness logits [B, A] and box deltas [B, A, 4] of all levels, and how many anchors each level has."""
        objectness, deltas = self.rpn(features)
        flat = [o.permute(0, 2, 3, 1).flatten(1) for o in objectness]
        flat_deltas = [d.permute(0, 2, 3, 1).reshape(len(d), -1, 4) for d in deltas]
        return torch.cat(flat, 1).float(), torch.cat(flat_deltas, 1).float(), [f.shape[1] for f in flat]

    def _anchors(self, images_BCHW: Tensor, features: list[Tensor]) -> Tensor:
        return self.anchors(ImageList(images_BCHW, [tuple(images_BCHW.shape[-2:])]), features)[0].float()

    @torch.no_grad()
    def _proposals(
        self, data: Mapping[str, Tensor], objectness_BA: Tensor, deltas_BA4: Tensor, anchors_A4: Tensor,
        level_sizes: list[int],
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        config, train = self.config, self.training
        return self.parts.proposals(
            objectness_BA.sigmoid(), decode(deltas_BA4, anchors_A4, RPN_DELTA_WEIGHTS), level_sizes, data["sizes"],
            config.proposals_before_nms, config.proposals_train if train else config.proposals_eval, config.rpn_nms_iou,
        )  # fmt: skip

    def _rpn_losses(
        self, data: Mapping[str, Tensor], objectness_BA: Tensor, deltas_BA4: Tensor, anchors_A4: Tensor
    ) -> dict[str, Tensor]:
        config = self.config
        foreground_BA, background_BA, object_BA = self.parts.anchor_targets(
            anchors_A4, data["boxes"], data["labels"], data["seeds"], config.rpn_budget, 0.5, 0.7, 0.3
        )
        matched_BA4 = data["boxes"].gather(1, object_BA[..., None].expand(-1, -1, 4))
        wanted_BA4 = encode(matched_BA4, anchors_A4, RPN_DELTA_WEIGHTS)
        norm = config.rpn_budget * len(objectness_BA)
        sampled_BA = foreground_BA | background_BA
        objectness = F.binary_cross_entropy_with_logits(objectness_BA, foreground_BA.float(), reduction="none")
        box = F.smooth_l1_loss(deltas_BA4, wanted_BA4, beta=BETA, reduction="none").sum(-1)
        return {
            "loss_objectness": (objectness * sampled_BA).sum() / norm,
            "loss_rpn_box": torch.where(foreground_BA, box, 0.0).sum() / norm,
        }

    # ------------------------------------------------------------------------------------------------------- heads

    def _pool(self, pool: MultiScaleRoIAlign, features: Mapping[str, Tensor], data: Any, boxes_BR4: Tensor) -> Tensor:
        return self.parts.region_features(pool, features, boxes_BR4, tuple(data["images"].shape[-2:]))

    def _head_losses(
        self, data: Mapping[str, Tensor], features: Mapping[str, Tensor], proposals_BP4: Tensor, real_BP: Tensor,
        anchors_BP: Tensor,
    ) -> dict[str, Tensor]:  # fmt: skip
        config = self.config
        with torch.no_grad():
            regions_BR4, labels_BR, object_BR = self.parts.region_targets(
                proposals_BP4, real_BP, anchors_BP, data["boxes"], data["labels"], data["seeds"],
                config.region_budget, config.region_foreground, 0.5,
            )  # fmt: skip
            matched_BR4 = data["boxes"].gather(1, object_BR[..., None].expand(-1, -1, 4))
            wanted_BR4 = encode(matched_BR4, regions_BR4, BOX_DELTA_WEIGHTS)
        logits, deltas = self.box_predictor(self.box_head(self._pool(self.box_pool, features, data, regions_BR4)))
        labels_N, norm = labels_BR.flatten(), labels_BR.numel()
        deltas_N4 = deltas.float().view(norm, -1, 4)[torch.arange(norm, device=labels_N.device), labels_N.clamp_min(0)]
        box_N = F.smooth_l1_loss(deltas_N4, wanted_BR4.view(-1, 4), beta=BETA, reduction="none").sum(-1)
        return {
            "loss_class": F.cross_entropy(logits.float(), labels_N, ignore_index=-1, reduction="sum") / norm,
            "loss_box": torch.where(labels_N > 0, box_N, 0.0).sum() / norm,
            "loss_mask": self._mask_loss(data, features, regions_BR4, labels_BR, object_BR),
        }

    def _mask_loss(
        self, data: Mapping[str, Tensor], features: Mapping[str, Tensor], regions_BR4: Tensor, labels_BR: Tensor,
        object_BR: Tensor,
    ) -> Tensor:  # fmt: skip
        """Mean over images of the mean over an image's foreground regions (F of them at most, which come first)."""
        most = int(self.config.region_budget * self.config.region_foreground)
        regions_BF4, labels_BF, object_BF = regions_BR4[:, :most], labels_BR[:, :most], object_BR[:, :most]
        logits = self.mask_predictor(self.mask_head(self._pool(self.mask_pool, features, data, regions_BF4)))
        side, count = logits.shape[-1], labels_BF.numel()
        own_Nss = logits.float()[torch.arange(count, device=logits.device), labels_BF.flatten().clamp_min(0)]
        with torch.no_grad():
            masks_BMHW = data["masks"]
            number_BF = object_BF + torch.arange(len(object_BF), device=object_BF.device)[:, None] * masks_BMHW.shape[1]
            rois_N5 = torch.cat([number_BF.view(-1, 1).float(), regions_BF4.reshape(-1, 4)], dim=1)
            wanted_Nss = roi_align(masks_BMHW.flatten(0, 1)[:, None].float(), rois_N5, side, 1.0, aligned=True)[:, 0]
        loss_BF = (
            F.binary_cross_entropy_with_logits(own_Nss, wanted_Nss, reduction="none").mean((1, 2)).view_as(labels_BF)
        )
        real_BF = labels_BF > 0
        return ((loss_BF * real_BF).sum(1) / real_BF.sum(1).clamp_min(1)).mean()

    # -------------------------------------------------------------------------------------------------- detection

    def _detect(
        self, data: Mapping[str, Tensor], features: Mapping[str, Tensor], proposals: tuple[Tensor, Tensor, Tensor]
    ) -> dict[str, Tensor]:
        """boxes [B, D, 4], scores [B, D] (0 where there is none), labels [B, D], mask probabilities [B, D, 28, 28]."""
        (boxes_BP4, real_BP, _), config = proposals, self.config
        logits, deltas = self.box_predictor(self.box_head(self._pool(self.box_pool, features, data, boxes_BP4)))
        deltas_BPK4 = deltas.float().view(*boxes_BP4.shape[:2], -1, 4)
        decoded_BPK4 = decode(deltas_BPK4, boxes_BP4[:, :, None], BOX_DELTA_WEIGHTS)
        boxes_BPK4 = clip(decoded_BPK4, data["sizes"][:, None, None])
        scores_BPK = logits.float().softmax(-1).view(*boxes_BP4.shape[:2], -1)
        boxes_BD4, scores_BD, labels_BD = self.parts.detections(
            scores_BPK, boxes_BPK4, real_BP, config.detections, config.least_score, config.nms_iou
        )
        masks = self.mask_predictor(self.mask_head(self._pool(self.mask_pool, features, data, boxes_BD4)))
        own = masks[torch.arange(len(masks), device=masks.device), labels_BD.flatten()].float().sigmoid()
        return {
            "boxes": boxes_BD4, "scores": scores_BD, "labels": labels_BD,
            "masks": own.view(*labels_BD.shape, *own.shape[1:]),
        }  # fmt: skip


def _backbone(config: MaskRCNNConfig, channels: int) -> tuple[BackboneWithFPN, list[str]]:
    """The backbone with its pyramid, and the names of the pyramid's levels, finest first."""
    if config.backbone == "resnet50":
        body, widths = resnet50(norm_layer=FrozenBatchNorm2d), [256, 512, 1024, 2048]
        del body.fc, body.avgpool
        for frozen in (body.conv1, body.layer1):  # as in the reference: the stem and the first stage
            frozen.requires_grad_(False)
        if config.pretrained == "random":
            for block in (module for module in body.modules() if isinstance(module, Bottleneck)):
                block.bn3.weight.fill_(UNTRAINED_RESIDUAL)
    else:
        widths = [config.width * 2**stage for stage in range(4)]
        body = _small(channels, widths)
    names = {f"layer{stage + 1}": str(stage) for stage in range(4)}
    backbone = BackboneWithFPN(body, names, widths, config.fpn_channels, LastLevelMaxPool())
    return backbone, [*names.values(), "pool"]


def _small(channels: int, widths: list[int]) -> nn.Sequential:
    """A ResNet of one basic block a stage, with group normalisation: statistics of a batch would differ with the number
    of ranks, and frozen ones need pretraining. Strides as ResNet-50's: 4, 8, 16 and 32."""

    def norm(width: int) -> nn.Module:
        return nn.GroupNorm(max(1, width // GROUP), width)

    def stage(before: int, after: int, stride: int) -> nn.Module:
        shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), norm(after))
        return BasicBlock(before, after, stride, None if before == after and stride == 1 else shortcut, norm_layer=norm)

    stem = nn.Sequential(
        nn.Conv2d(channels, widths[0], 3, 2, 1, bias=False),
        norm(widths[0]),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2, 1),
    )
    stages = {f"layer{i + 1}": stage(widths[max(0, i - 1)], w, 1 if i == 0 else 2) for i, w in enumerate(widths)}
    return nn.Sequential(OrderedDict(stem=stem, **stages))
