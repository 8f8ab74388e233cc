"""Norms of other libraries that have their activation as a child, and take it in."""

import torch

from dlkit import _adopt, _forms
from dlkit._activation import layer_activation
from dlkit.fusion._layers import NORMS
from dlkit.fusion._other_activations import activation_of, settings
from dlkit.surgery import _replacement


def fuse_own_activations(model: torch.nn.Module) -> dict[str, str]:
    """Fuses what it can, and says for each such layer what became of it."""
    reasons = {}
    for name, module in model.named_modules():
        if not isinstance(module, NORMS) or not module._modules:
            continue
        served = type(module) if _adopt.adopted(type(module)) else _replacement(module, True)[0]
        adopted = _adopt.adopted(served) if served else None
        if served is None or adopted is None or adopted[2][0].norm != "twin" or adopted[2][0].acts:
            continue
        *_, last = module._modules.values()
        proven = None
        if last is not None and not settings(last) and (found := activation_of(last)) and not layer_activation(last):
            proven = type(last), found[0]
        if _forms.own_activation(module, proven) is not None:
            module.__class__ = _adopt.class_with_activation(served, proven)
            reasons[name] = f"takes in its {type(last).__name__}"
        else:
            reasons[name] = f"no plain activation follows its norm: it ends in a {type(last).__name__}"
    return reasons
