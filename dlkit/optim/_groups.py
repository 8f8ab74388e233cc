"""Weight decay on matrices only."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn


def param_groups(
    model: nn.Module | Iterable[tuple[str, Tensor]], weight_decay: float, **options: Any
) -> list[dict[str, Any]]:
    """Param groups of a model: weight decay on matrices and filters, none on biases, scales and normalization layers.

    Args:
        model: a module, or what its ``named_parameters()`` gives.
        weight_decay: of parameters with two dimensions or more that belong to no normalization layer; others have 0.
        options: entries of both groups.

    Returns:
        One group or two, each with the parameters' names, which error messages use. Parameters that do not require a
        gradient are left out; one that is used in several places is there once.
    """
    norms: set[int] = set()
    if isinstance(model, nn.Module):
        for module in model.modules():
            if "Norm" in type(module).__name__:
                norms.update(id(p) for p in module.parameters(recurse=False))
        named: Iterable[tuple[str, Tensor]] = model.named_parameters()
    else:
        named = model
    decayed: list[tuple[str, Tensor]] = []
    others: list[tuple[str, Tensor]] = []
    for name, param in named:
        if param.requires_grad:
            (decayed if param.dim() >= 2 and id(param) not in norms else others).append((name, param))
    groups = [
        {"params": decayed, "weight_decay": weight_decay, **options},
        {"params": others, "weight_decay": 0.0, **options},
    ]
    return [group for group in groups if group["params"]]
