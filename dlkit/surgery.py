"""replace() and restore(): torch.nn layers to their fused twins and back, in place, by changing __class__.

Parameters, buffers, hooks, the training flag and state_dict stay what and where they are.
"""

from typing import NamedTuple, TypeVar

import torch
from torch.nn.modules.lazy import LazyModuleMixin

import dlkit.nn

TWINS: dict[type[torch.nn.Module], type[torch.nn.Module]] = {
    torch.nn.LayerNorm: dlkit.nn.LayerNorm,
    torch.nn.RMSNorm: dlkit.nn.RMSNorm,
    torch.nn.BatchNorm1d: dlkit.nn.BatchNorm1d,
    torch.nn.BatchNorm2d: dlkit.nn.BatchNorm2d,
    torch.nn.BatchNorm3d: dlkit.nn.BatchNorm3d,
    torch.nn.SyncBatchNorm: dlkit.nn.SyncBatchNorm,
    torch.nn.GroupNorm: dlkit.nn.GroupNorm,
    torch.nn.InstanceNorm1d: dlkit.nn.InstanceNorm1d,
    torch.nn.InstanceNorm2d: dlkit.nn.InstanceNorm2d,
    torch.nn.InstanceNorm3d: dlkit.nn.InstanceNorm3d,
    torch.nn.Dropout: dlkit.nn.Dropout,
    torch.nn.Dropout1d: dlkit.nn.Dropout1d,
    torch.nn.Dropout2d: dlkit.nn.Dropout2d,
    torch.nn.Dropout3d: dlkit.nn.Dropout3d,
    torch.nn.AlphaDropout: dlkit.nn.AlphaDropout,
    torch.nn.FeatureAlphaDropout: dlkit.nn.FeatureAlphaDropout,
    torch.nn.MultiheadAttention: dlkit.nn.MultiheadAttention,
    torch.nn.CrossEntropyLoss: dlkit.nn.CrossEntropyLoss,
}
if hasattr(torch.nn, "LinearCrossEntropyLoss"):  # torch 2.13
    TWINS[torch.nn.LinearCrossEntropyLoss] = dlkit.nn.LinearCrossEntropyLoss

Model = TypeVar("Model", bound=torch.nn.Module)


def label(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


class Change(NamedTuple):
    """The change of one layer: its name in the model, its class before and after, and the reason."""

    name: str
    before: type[torch.nn.Module]
    after: type[torch.nn.Module]
    reason: str

    def __str__(self) -> str:
        outcome = "left as it is" if self.before is self.after else f"now {label(self.after)}"
        return f"{self.name or '(the model itself)'}: {label(self.before)}, {outcome}: {self.reason}"


def replace(model: Model, *, report: list[Change] | None = None) -> Model:
    """Turns every layer of ``model`` that has a fused twin into it, in place.

    Exactly torch's own classes are changed. A subclass, or a layer whose forward was replaced on the instance, may do
    something else and is left alone.

    Args:
        model: any module; itself a layer, perhaps.
        report: a list that receives a :class:`Change` for each layer changed, and for each that was left and could have
            been meant. ``print(*report, sep="\\n")`` shows it.

    Returns:
        The same object, ``model``.
    """
    return _change(model, TWINS, "has a fused twin", report)


def restore(model: Model, *, report: list[Change] | None = None) -> Model:
    """Undoes :func:`replace` and :func:`dlkit.fuse`: every dlkit layer that has a twin in torch.nn becomes it, in
    place, and the adds and ReLUs that fused layers took in are where they were.

    A fused layer is left where what it belongs to is not in ``model``: the Sequential with its ReLU, or the module
    whose forward() calls it. So is one that was made as such.

    Args:
        model: any module; itself a layer, perhaps.
        report: a list that receives a :class:`Change` for each layer changed, and for each fused layer left.

    Returns:
        The same object, ``model``.
    """
    from dlkit.fusion import unfuse  # which imports this module

    before = {name: type(module) for name, module in model.named_modules()}
    reasons = unfuse(model)
    changes: list[Change] = []
    _change(model, {twin: original for original, twin in TWINS.items()}, "is torch's layer again", changes)
    if report is not None:
        after = dict(model.named_modules())
        report.extend(Change(name, before[name], type(after[name]), reason) for name, reason in reasons.items())
        report.extend(change for change in changes if change.name not in reasons)
    return model


def can_restore(cls: type) -> bool:
    """Whether :func:`restore` makes layers of torch.nn of those of this class, in the model that they belong to."""
    from dlkit.fusion import FUSED, TRANSFORMERS

    return cls in (*TWINS.values(), *FUSED.values(), *TRANSFORMERS.values())


def _change(
    model: Model,
    table: dict[type[torch.nn.Module], type[torch.nn.Module]],
    reason: str,
    report: list[Change] | None,
) -> Model:
    changes = []
    for name, module in model.named_modules():
        before = type(module)
        # An uninitialised layer is of a class of its own until it has seen an input.
        nominal = getattr(before, "cls_to_become", None) or before
        related = next((cls for cls in table if issubclass(nominal, cls)), None)
        if related is None or (table is TWINS and issubclass(before, tuple(TWINS.values()))):
            continue
        why = why_not_plain(module, related)
        if not why:
            module.__class__ = table[before]
        changes.append(Change(name, before, type(module), why or reason))
    if report is not None:
        report.extend(changes)
    return model


def why_not_plain(module: torch.nn.Module, related: type[torch.nn.Module]) -> str:
    """Why ``module`` may not be taken for a layer of class ``related``; empty if it may."""
    cls = type(module)
    if isinstance(module, LazyModuleMixin):
        return "it is not initialised: it can be replaced once it has seen an input"
    if issubclass(cls, (dlkit.nn.batch_norm._BatchNormReLU, dlkit.nn.SyncBatchNormReLU)):
        return "it does the work of the ReLU behind it too, which cannot be put back here"
    if isinstance(module, (dlkit.nn.CrossEntropyLoss, dlkit.nn.LinearCrossEntropyLoss)) and module.has_own_options():
        return "it has options that torch's layer has not"
    if cls is not related:
        return f"it is a subclass of {label(related)}, which may do something else"
    return "its forward was replaced on the instance" if "forward" in vars(module) else ""
