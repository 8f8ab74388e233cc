"""The activations that an op may compute after its own result: names, numbers, torch's functions and layers."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

GELUS = {"none": "gelu", "tanh": "gelu_tanh"}  # by torch's argument approximate

# As csrc/common/activation.h numbers them. 0 is none.
ACTIVATIONS = {
    "relu": 1,
    "gelu": 2,
    "gelu_tanh": 3,
    "silu": 4,
    "hardswish": 5,
    "relu6": 6,
    "leaky_relu": 7,
}


def number_of(name: str, activation: Any) -> int:
    """The number of an activation that the caller of the function or layer ``name`` gave by its name."""
    if activation is None:
        return 0
    if not isinstance(activation, str):
        raise TypeError(f"{name}(): expected activation to be a str or None, got {type(activation).__name__}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"{name}(): expected activation to be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    return ACTIVATIONS[activation]


def activated(z: Tensor, number: int, negative_slope: float) -> Tensor:
    """act(z), computed by torch's own functions."""
    if number == 0:
        return z
    if number == 2 or number == 3:
        return F.gelu(z, approximate="none" if number == 2 else "tanh")
    if number == 7:
        return F.leaky_relu(z, negative_slope)
    functions: dict[int, Any] = {1: torch.relu, 4: F.silu, 5: F.hardswish, 6: F.relu6}
    y: Tensor = functions[number](z)
    return y


def layer_activation(layer: torch.nn.Module) -> tuple[str, float] | None:
    """(name, negative_slope) of a layer of exactly torch's class; None if it is none of these activations."""
    if type(layer) is torch.nn.GELU:
        name = GELUS.get(layer.approximate)
        return None if name is None else (name, 0.0)
    if type(layer) is torch.nn.LeakyReLU:
        return "leaky_relu", float(layer.negative_slope)
    name = LAYERS.get(type(layer))
    return None if name is None else (name, 0.0)


LAYERS: dict[type[torch.nn.Module], str] = {
    torch.nn.ReLU: "relu",
    torch.nn.SiLU: "silu",
    torch.nn.Hardswish: "hardswish",
    torch.nn.ReLU6: "relu6",
}
