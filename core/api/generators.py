"""The process-wide random generators that a model may draw from (dropout): torch's, on the CPU and on the device."""

from typing import Any

import torch

__all__ = ["generator_states", "set_generator_states"]


def generator_states(device: torch.device) -> dict[str, Any]:
    """What `set_generator_states` takes back."""
    own = {} if device.type == "cpu" else {"device": torch.get_device_module(device).get_rng_state(device)}
    return {"cpu": torch.get_rng_state(), **own}


def set_generator_states(device: torch.device, states: dict[str, Any]) -> None:
    torch.set_rng_state(states["cpu"])
    if "device" in states and device.type != "cpu":
        torch.get_device_module(device).set_rng_state(states["device"], device)
