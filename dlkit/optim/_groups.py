"""Weight decay on matrices only."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy


def param_groups(
    model: nn.Module | Iterable[tuple[str, Tensor]], weight_decay: float, **options: Any
) -> list[dict[str, Any]]:
    """Param groups of a model: weight decay on matrices and filters, none on biases, scales and normalization layers.

    Args:
        model: a module, or the pairs of its ``named_parameters()``. Names that a module's ``no_weight_decay()``
            returns, as timm's models have it, get no decay either.
        weight_decay: the decay of parameters with two dimensions or more that belong to no normalization layer; others
            have 0.
        options: further entries of both groups.

    Returns:
        One group or two, each with the parameters' names, which error messages use. Parameters that do not require a
        gradient are left out; one that is used in several places is there once.

    Raises:
        TypeError: the items are not pairs of a name and a parameter, for example those of ``model.parameters()``.
        ValueError: a parameter is lazy, and its shape not known yet.
    """
    undecayed: set[int] = set()
    if isinstance(model, nn.Module):
        for module in model.modules():
            if "Norm" in type(module).__name__:
                undecayed.update(id(p) for p in module.parameters(recurse=False))
            if callable(listed := getattr(module, "no_weight_decay", None)):
                own = dict(module.named_parameters(remove_duplicate=False))
                undecayed.update(id(own[name]) for name in listed() if name in own)
        named: Iterable[Any] = model.named_parameters()
    else:
        named = model
    decayed: list[tuple[str, Tensor]] = []
    others: list[tuple[str, Tensor]] = []
    for item in named:
        if not (isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str)):
            raise TypeError(
                "param_groups(): expected a module, or pairs of a name and a parameter as model.named_parameters() "
                f"gives them, got {type(item).__name__}"
            )
        name, param = item
        if is_lazy(param):
            raise ValueError(
                f"param_groups(): expected parameters with a shape, and {name!r} is lazy; run the model once before"
            )
        if param.requires_grad:
            (decayed if param.dim() >= 2 and id(param) not in undecayed else others).append((name, param))
    groups = [
        {"params": decayed, "weight_decay": weight_decay, **options},
        {"params": others, "weight_decay": 0.0, **options},
    ]
    return [group for group in groups if group["params"]]
