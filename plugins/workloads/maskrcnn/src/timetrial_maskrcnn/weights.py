"""ImageNet-pretrained weights of the backbone, and the names under which MLPerf's rules list the others."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from core.api.errors import DataError

LAYOUT = "a state dict of torchvision's resnet50, as .safetensors, or as .pth written by torch.save"


def load(body: nn.Module, path: Path) -> None:
    """Fills a ResNet-50 without its classifier from a file (`LAYOUT`). DataError where the file does not fit.

    Nothing in the file is executed: a pickle is read with `weights_only`.
    """
    try:
        states: dict[str, Tensor] = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, weights_only=True, map_location="cpu")
        )
        wanted = body.state_dict()
        own = {name: states[name] for name in wanted}
        body.load_state_dict(own)
    except KeyError as error:
        raise DataError(f"workload.pretrained={path} has no {error}: {LAYOUT} is expected") from None
    except Exception as error:  # each format raises its own errors
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"workload.pretrained={path} cannot be used ({reason}): {LAYOUT} is expected") from None


CLOSED_NAMES = (
    *(f"FPN_{kind}_block{number}" for number in range(1, 5) for kind in ("inner", "layer")),
    *(f"RPNHead_{part}" for part in ("conv", "cls", "bbox")),
    *(f"ROI_BOX_FEATURE_EXTRACTOR_{part}" for part in ("fc6", "fc7")),
    *(f"ROI_BOX_PREDICTOR_{part}" for part in ("cls", "bbox")),
    *(f"ROI_MASK_FEATURE_EXTRACTOR_fcn{number}" for number in range(1, 5)),
    *(f"ROI_MASK_PREDICTOR_{part}" for part in ("fcn5", "fcn_logits")),
)
"""compliance_checker/training_1.1.0/closed_maskrcnn.yaml: every layer but the pretrained backbone."""
