"""replace() and restore() change the __class__ of layers of torch.nn and of other libraries to dlkit's and back.

Parameters, buffers, hooks, the training flag and state_dict stay what and where they are.
"""

import re
from typing import NamedTuple, TypeVar

import torch
from torch.nn.modules.lazy import LazyModuleMixin

import dlkit.nn
from dlkit import _adopt, _trial

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

NORMS = tuple(cls for cls in TWINS if "Norm" in cls.__name__ and cls is not torch.nn.SyncBatchNorm)

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


def replace(model: Model, *, report: list[Change] | None = None, verify: bool = True) -> Model:
    """Turns every norm and dropout of ``model`` that dlkit's kernels can serve into a layer that they serve, in place.

    Layers of exactly torch's own classes become dlkit's. Norms of other classes are run beside the forms that dlkit has
    on random inputs, forward and backward. Where outputs and gradients agree within rounding in float64, and the order
    of rounding in other dtypes is found too, the layer gets a class that is derived from its own and has the same name.
    Stochastic depth gets such a class too. A layer that computes something else stays as it is, and so does one whose
    forward was replaced on the instance.

    Args:
        model: any module, also a single layer. It may be on the meta device.
        report: a list that receives a :class:`Change` for each layer changed, and for each norm or dropout that was
            left. ``print(*report, sep="\\n")`` shows it.
        verify: run layers of classes that are neither torch's nor registered (:func:`dlkit.register`). False leaves
            them as they are.

    Returns:
        The same object, ``model``.
    """
    changes = []
    for name, module in model.named_modules():
        before = type(module)
        cls, reason = _replacement(module, verify)
        if cls is not None:
            module.__class__ = cls
        if reason:
            changes.append(Change(name, before, type(module), reason))
    if report is not None:
        report.extend(changes)
    return model


DROPS = re.compile("drop_?path|stochastic_?depth|drop_?block", re.IGNORECASE)


def _replacement(module: torch.nn.Module, verify: bool) -> tuple[type[torch.nn.Module] | None, str]:
    """(the class that ``module`` is to have or None, the reason). The reason is empty for layers of other kinds."""
    before = type(module)
    if isinstance(module, tuple(TWINS.values())) or _adopt.adopted(before):
        return None, ""
    # A lazy layer has a class of its own until it has seen an input.
    nominal = getattr(before, "cls_to_become", None) or before
    related = next((cls for cls in TWINS if issubclass(nominal, cls)), None)
    norm = related in NORMS if related else _trial.looks_like_norm(module)
    drops = DROPS.search(before.__name__) is not None and not before.__module__.startswith("dlkit.")
    if not (related or norm or drops or before in _adopt.REGISTERED):
        return None, ""
    if isinstance(module, LazyModuleMixin):
        return None, "it is not initialised: it can be replaced once it has seen an input"
    if "forward" in vars(module):
        return None, "its forward was replaced on the instance"
    if before in _adopt.REGISTERED:
        forward = _adopt.REGISTERED[before](module)
        if forward is None:
            return None, "what is registered for its class leaves it"
        return _adopt.class_for_registered(before, forward), "its class is registered"
    if related is before:
        return TWINS[before], "has a fused twin"
    subclass = why_not_plain(module, related) if related else ""
    if not verify:
        return None, subclass or "its class is not torch's, and verify=False"
    if norm:
        twin = TWINS[related] if related else None
        try:
            proof = _trial.prove(module, twin)
        except _trial.Differs as differs:
            return None, f"{subclass}: {differs}" if subclass else str(differs)
        return _adopt.class_for_norm(before, proof, twin), str(proof)
    if drops:
        drop = _trial.prove_drop(module)
        if drop:
            return _adopt.class_for_drop(before, drop), f"verified: {drop}, in distribution"
        return None, "on random inputs it does something else than drop_path and dropblock2d"
    return None, subclass


def restore(model: Model, *, report: list[Change] | None = None) -> Model:
    """Undoes :func:`replace` and :func:`dlkit.fuse`, in place: each dlkit layer becomes the layer of torch.nn or of
    the other library that it was, and adds and activations of fused layers are where they were.

    A fused layer is left if ``model`` does not hold its surroundings: the Sequential with its activation, or the module
    whose forward() calls it. A layer that was constructed as a fused one is left too.

    Args:
        model: any module, also a single layer.
        report: a list that receives a :class:`Change` for each layer changed, and for each fused layer left.

    Returns:
        The same object, ``model``.
    """
    from dlkit.fusion import unfuse  # which imports this module

    before = {name: type(module) for name, module in model.named_modules()}
    reasons = unfuse(model)
    changes: list[Change] = []
    originals = {twin: original for original, twin in TWINS.items()}
    for name, module in model.named_modules():
        cls = type(module)
        adopted = _adopt.adopted(cls)
        if adopted:
            module.__class__ = adopted[0]
            changes.append(Change(name, cls, adopted[0], "its own forward() is back"))
            continue
        related = next((twin for twin in originals if issubclass(cls, twin)), None)
        if related is None:
            continue
        why = why_not_plain(module, related)
        if not why:
            module.__class__ = originals[cls]
        changes.append(Change(name, cls, type(module), why or "is torch's layer again"))
    if report is not None:
        after = dict(model.named_modules())
        report.extend(Change(name, before[name], type(after[name]), reason) for name, reason in reasons.items())
        report.extend(change for change in changes if change.name not in reasons)
    return model


def can_restore(cls: type) -> bool:
    """Whether :func:`restore` gives layers of this class, in their own model, the class that they had before."""
    from dlkit.fusion import ACTING, FUSED, TRANSFORMERS

    fused = (*FUSED.values(), *ACTING.values(), *TRANSFORMERS.values())
    return cls in (*TWINS.values(), *fused) or _adopt.adopted(cls) is not None


def drop_probability(module: torch.nn.Module) -> str:
    """The name of the attribute with the probability if ``module`` is stochastic depth or DropBlock, else empty."""
    if isinstance(module, (dlkit.nn.DropPath, dlkit.nn.DropBlock2d)):
        return "p"
    adopted = _adopt.adopted(type(module))
    if adopted and adopted[1] == "drop":
        return adopted[2][0].p
    drop = _trial.prove_drop(module) if DROPS.search(type(module).__name__) else None
    return drop.p if drop else ""


def why_not_plain(module: torch.nn.Module, related: type[torch.nn.Module]) -> str:
    """The reason why ``module`` may not be taken for a layer of class ``related``; empty if it may."""
    cls = type(module)
    if isinstance(module, LazyModuleMixin):
        return "it is not initialised: it can be replaced once it has seen an input"
    if issubclass(cls, (dlkit.nn.batch_norm.WithActivation, dlkit.nn.batch_norm.ChosenActivation)):
        return "it does the work of the activation after it too, which cannot be put back here"
    if isinstance(module, (dlkit.nn.CrossEntropyLoss, dlkit.nn.LinearCrossEntropyLoss)) and module.has_own_options():
        return "it has options that torch's layer has not"
    if cls is not related:
        return f"it is a subclass of {label(related)}, which may do something else"
    return "its forward was replaced on the instance" if "forward" in vars(module) else ""
