"""The configuration of both backends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar


@dataclass(kw_only=True)
class NoSettings:
    """They have none."""

    RENAMED: ClassVar[Mapping[str, str]] = {"ddp": "/opt.ddp", "bucket_cap_mb": "/opt.ddp.bucket_cap_mib"}
