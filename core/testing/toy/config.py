"""What can be set under `workload`: types, ranges and meaning. Imports without torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from core.api.config import EvalConfig, checked


@dataclass(kw_only=True)
class ToyConfig:
    RENAMED: ClassVar[Mapping[str, str]] = {
        "target": "targets.accuracy",
        "eval_every": "eval.every",
    }

    examples: int = checked(at_least=1)
    eval_examples: int = checked(at_least=1)
    features: int = checked(at_least=1)
    hidden: int = checked(at_least=1)
    classes: int = checked(at_least=2)
    global_batch_size: int = checked(at_least=1)
    learning_rate: float = checked(above=0)
    momentum: float = checked(at_least=0, at_most=1)
    max_epochs: int = checked(at_least=1)
    targets: dict[str, float] = checked(keys=("accuracy",), at_least=0, at_most=1)
    eval: EvalConfig
    dropout: float = checked(at_least=0, at_most=0.99)
