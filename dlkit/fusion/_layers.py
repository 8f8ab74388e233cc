"""Single layers: what a norm becomes where it takes in an activation and back, and why a layer is left as it is.

Between norm and activation may stand what does nothing: an Identity, a dropout or stochastic depth with a probability
of 0. It stays where it is, since it does nothing to an activation's result either. Before a residual add it is left
out, and the new forward() raises if it has begun to do something.
"""

from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm

import dlkit.nn
from dlkit.fusion._other_activations import activation_of
from dlkit.nn._layer import HOOKS
from dlkit.surgery import TWINS, drop_probability, why_not_plain

FUSED: dict[type[torch.nn.Module], type[torch.nn.Module]] = {
    torch.nn.BatchNorm1d: dlkit.nn.BatchNormReLU1d,
    torch.nn.BatchNorm2d: dlkit.nn.BatchNormReLU2d,
    torch.nn.BatchNorm3d: dlkit.nn.BatchNormReLU3d,
    torch.nn.SyncBatchNorm: dlkit.nn.SyncBatchNormReLU,
    dlkit.nn.BatchNorm1d: dlkit.nn.BatchNormReLU1d,
    dlkit.nn.BatchNorm2d: dlkit.nn.BatchNormReLU2d,
    dlkit.nn.BatchNorm3d: dlkit.nn.BatchNormReLU3d,
    dlkit.nn.SyncBatchNorm: dlkit.nn.SyncBatchNormReLU,
}
# With any other activation, which is an attribute of theirs.
ACTING: dict[type[torch.nn.Module], type[torch.nn.Module]] = {
    torch.nn.BatchNorm1d: dlkit.nn.BatchNormAct1d,
    torch.nn.BatchNorm2d: dlkit.nn.BatchNormAct2d,
    torch.nn.BatchNorm3d: dlkit.nn.BatchNormAct3d,
    torch.nn.SyncBatchNorm: dlkit.nn.SyncBatchNormAct,
    torch.nn.GroupNorm: dlkit.nn.GroupNormAct,
    dlkit.nn.BatchNorm1d: dlkit.nn.BatchNormAct1d,
    dlkit.nn.BatchNorm2d: dlkit.nn.BatchNormAct2d,
    dlkit.nn.BatchNorm3d: dlkit.nn.BatchNormAct3d,
    dlkit.nn.SyncBatchNorm: dlkit.nn.SyncBatchNormAct,
    dlkit.nn.GroupNorm: dlkit.nn.GroupNormAct,
}
NORMS = (_BatchNorm, torch.nn.GroupNorm)
# By what a fused layer is now: it may have been synchronised since.
PLAIN: dict[type[torch.nn.Module], type[torch.nn.Module]] = {
    fused: plain for plain, fused in (*FUSED.items(), *ACTING.items()) if plain.__module__.startswith("dlkit.")
}


class Left(Exception):
    """Why a layer, or every layer that a forward() calls, is left as it is."""


def why_left(layer: torch.nn.Module) -> str:
    """Why a norm or activation may not be taken for what its class says; empty if it may."""
    if type(layer) not in ACTING and activation_of(layer) is None:
        return why_not_plain(layer, next((cls for cls in ACTING if isinstance(layer, cls)), _BatchNorm))
    if "forward" in vars(layer):
        return "its forward was replaced on the instance"
    return "it has hooks, which would see other values" if any(getattr(layer, hooks) for hooks in HOOKS) else ""


def does_nothing(layer: Any) -> list[tuple[str, Any]] | None:
    """The attributes, by name and value, that tell that ``layer`` gives its input back; None if it may not."""
    if layer is None or "forward" in vars(layer) or any(getattr(layer, hooks) for hooks in HOOKS):
        return None
    if type(layer) is torch.nn.Identity:
        return [("__class__", torch.nn.Identity)]
    plain = any(
        type(layer) in pair for pair in TWINS.items() if issubclass(pair[0], torch.nn.modules.dropout._DropoutNd)
    )
    p = "p" if plain else drop_probability(layer)
    return [(p, getattr(layer, p))] if p and not getattr(layer, p) else None


def become_fused(layer: torch.nn.Module, activation: tuple[str, float]) -> None:
    if activation[0] == "relu" and type(layer) in FUSED:
        layer.__class__ = FUSED[type(layer)]
    else:
        layer.__class__ = ACTING[type(layer)]
        vars(layer)["activation"], vars(layer)["negative_slope"] = activation
    vars(layer)["_dlkit_took_in"] = True  # not made so: restore() may put the activation back


def become_plain(layer: torch.nn.Module) -> None:
    for name in ("_dlkit_took_in", "activation", "negative_slope"):
        vars(layer).pop(name, None)
    layer.__class__ = PLAIN[type(layer)]


def took_in(layer: torch.nn.Module) -> bool:
    return "_dlkit_took_in" in vars(layer) and type(layer) in PLAIN
