"""What can be set under `workload`: types, ranges and meaning. Imports without torch."""

from dataclasses import dataclass

from core.api.config import checked


@dataclass(kw_only=True)
class ToyConfig:
    examples: int = checked(at_least=1)
    eval_examples: int = checked(at_least=1)
    features: int = checked(at_least=1)
    hidden: int = checked(at_least=1)
    classes: int = checked(at_least=2)
    global_batch_size: int = checked(at_least=1)
    learning_rate: float = checked(above=0)
    momentum: float = checked(at_least=0, at_most=1)
    max_epochs: int = checked(at_least=1)
    target: float = checked(at_least=0, at_most=1)
    eval_every: int = checked(at_least=1)
    dropout: float = checked(at_least=0, at_most=0.99)
