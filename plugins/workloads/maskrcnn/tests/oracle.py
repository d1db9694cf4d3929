"""`python -m core.run` with a model that finds every object, the third of them four pixels off: an average precision
that no training has to reach, the same on every machine."""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn
from torchvision.ops import roi_align

from core.run import main
from timetrial_maskrcnn.workload import MaskRCNNWorkload


def found(self: MaskRCNNWorkload, model: nn.Module, data: dict[str, Tensor]) -> dict[str, Tensor]:
    """The objects of the batch, in the form of the model's detections."""
    boxes_BM4, labels_BM, masks_BMHW = data["boxes"], data["labels"], data["masks"].float()
    count, most = labels_BM.shape
    number_N1 = torch.arange(count * most)[:, None].float()
    rois_N5 = torch.cat([number_N1, boxes_BM4.view(-1, 4)], dim=1)
    cut_Nss = roi_align(masks_BMHW.flatten(0, 1)[:, None], rois_N5, 28, aligned=True)[:, 0]
    place_BM = data["ids"][:, None] * most + torch.arange(most)
    moved_BM4 = boxes_BM4 + torch.tensor([4.0, 0.0, 4.0, 0.0]) * (place_BM % 3 == 0)[..., None]
    return {
        "boxes": moved_BM4, "scores": (labels_BM > 0) / (place_BM + 1), "labels": labels_BM,
        "masks": cut_Nss.view(count, most, 28, 28),
    }  # fmt: skip


if __name__ == "__main__":
    MaskRCNNWorkload.infer = found
    sys.exit(main())
