"""The plugin's front: light to import, and every YAML key known."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

import timetrial_resnet
from core.api.config import validate
from core.api.errors import UsageError
from timetrial_resnet.plugin import ResNet

CONF = Path(timetrial_resnet.__file__).parent / "conf" / "workload"
OPTIONS = ("resnet", "resnet_fashion", "resnet_mlperf")


def test_plugin_imports_without_torch() -> None:
    code = "import sys, timetrial_resnet.plugin; sys.exit('torch' in sys.modules or 'torchvision' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", OPTIONS)
def test_yaml_has_exactly_the_fields_of_the_schema(name: str) -> None:
    assert list(OmegaConf.load(CONF / f"{name}.yaml")) == [f.name for f in dataclasses.fields(ResNet.Config)]


@pytest.mark.parametrize(
    "override", ["targets.top1=1.5", "momentum=-0.1", "base_learning_rate=0", "arch=resnet9", "stem=tiny"]
)
def test_values_out_of_range_are_refused(override: str) -> None:
    node = OmegaConf.merge(OmegaConf.load(CONF / "resnet.yaml"), OmegaConf.from_dotlist([override]))
    with pytest.raises(UsageError, match=override.split("=")[0]):
        validate(ResNet.Config, node, "workload")
