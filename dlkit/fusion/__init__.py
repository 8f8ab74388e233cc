"""fuse(): BatchNorm or GroupNorm and the activation after it, or the residual add and the activation, become one
layer, in place. torch's transformer layers become those that do dropout, residual add and norm in one pass, by a change
of class.

Neighbours in torch.nn.Sequential are fused as they stand (_sequential.py). Elsewhere the forward() that calls the norm
is traced (_tracing.py), and loses its add and activation (_traced.py) in a class of its own (_derived.py). Norms of
other libraries take in the activation that is their child (_own_activations.py). Activations of other libraries are
run to find what they compute (_other_activations.py). _layers.py says of single layers what they become, and why one
is left.
"""

from collections import Counter
from typing import TypeVar

import torch

from dlkit.fusion._derived import _new as _new  # pickles of fused models name it here
from dlkit.fusion._layers import ACTING, FUSED, NORMS, PLAIN, Left, why_left
from dlkit.fusion._own_activations import fuse_own_activations
from dlkit.fusion._sequential import fuse_sequential, is_sequential, unfuse_sequential
from dlkit.fusion._traced import ADDS, ADDS_IN_PLACE, FUNCTIONS, fuse_traced, unfuse_traced
from dlkit.fusion._transformers import TRANSFORMERS, fuse_transformers, unfuse_transformer
from dlkit.surgery import Change

__all__ = ["ACTING", "ADDS", "ADDS_IN_PLACE", "FUNCTIONS", "FUSED", "PLAIN", "TRANSFORMERS", "Left", "fuse", "unfuse"]

Model = TypeVar("Model", bound=torch.nn.Module)


def fuse(model: Model, *, report: list[Change] | None = None) -> Model:
    """Fuses every BatchNorm and GroupNorm that an activation follows, with or without a residual add between, and in
    torch's transformer layers dropout, residual add and LayerNorm, in place. The activations are ReLU, ReLU6,
    LeakyReLU, SiLU, Hardswish and GELU, as torch's layers and functions, and layers of other classes that are proven to
    compute the same.

    The norm becomes :class:`dlkit.nn.BatchNormReLU2d` (``1d``, ``3d``, :class:`dlkit.nn.SyncBatchNormReLU`), with
    another activation :class:`dlkit.nn.BatchNormAct2d` and its kin or :class:`dlkit.nn.GroupNormAct`, by a change of
    its class: names, parameters, buffers, state_dict and results stay what they are, in training and in evaluation. In
    a Sequential, which is taken to be called as a whole, an Identity takes the activation's place. A module whose
    forward() loses its add and activation gets a class derived from its own, of the same name; it can be copied,
    pickled and compiled as before. :class:`torch.nn.TransformerEncoderLayer` and ``TransformerDecoderLayer``, norm
    first or last, become :class:`dlkit.nn.TransformerEncoderLayer` and ``TransformerDecoderLayer``: the same layers, of
    which training runs fused, and evaluation as in torch.

    Left as they are: layers of other classes, with hooks, registered or called more than once, or whose result is used
    by something else as well, and what is called by a forward() that torch.fx cannot trace faithfully. Fusing again
    changes nothing. :func:`dlkit.restore` undoes it. Tools that would make another layer of a fused one, and lose the
    activation, are refused: ``torch.nn.SyncBatchNorm.convert_sync_batchnorm``, ``fuse_conv_bn_eval`` and their like.

    Args:
        model: any module, complete: a fused forward() does not see what is added to its module later.
        report: a list that receives a :class:`Change` for everything changed, and for each norm and transformer
            layer left. ``print(*report, sep="\\n")`` shows it.

    Returns:
        The same object, ``model``.
    """
    before = {name: type(module) for name, module in model.named_modules(remove_duplicate=False)}
    registrations = Counter(id(child) for module in model.modules() for child in module._modules.values())
    reasons: dict[str, str] = {}
    for owner_name, paths in _layers_by_owner(model).items():
        owner = model.get_submodule(owner_name)
        prefix = owner_name + "." if owner_name else ""
        usable = []
        for path in paths:
            layer = owner.get_submodule(path)
            why = why_left(layer)
            if layer is model:
                why = why or "it is the whole model"
            elif registrations[id(layer)] > 1:
                why = why or "it is registered in several places"
            if why:
                reasons[prefix + path] = why
            else:
                usable.append(path)
        if not usable:
            continue
        if is_sequential(owner):
            found = fuse_sequential(owner, usable)
        else:
            try:
                found = fuse_traced(owner, usable)
            except Left as left:
                found = dict.fromkeys(usable, str(left))
        reasons.update({(prefix + path).rstrip("."): reason for path, reason in found.items()})
    reasons.update(fuse_own_activations(model))
    reasons.update(fuse_transformers(model))
    if report is not None:
        report.extend(
            Change(name, before[name], type(module), reasons[name])
            for name, module in model.named_modules()
            if name in reasons
        )
    return model


def _layers_by_owner(model: torch.nn.Module) -> dict[str, list[str]]:
    """The name of each module whose forward() calls norms, by all appearances, and their names inside it."""
    owners: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if not isinstance(module, NORMS) or isinstance(module, (*FUSED.values(), *ACTING.values())):
            continue
        owner = name.rpartition(".")[0]
        while owner and isinstance(model.get_submodule(owner), (torch.nn.ModuleList, torch.nn.ModuleDict)):
            owner = owner.rpartition(".")[0]
        owners.setdefault(owner, []).append(name[len(owner) :].lstrip("."))
    return owners


def unfuse(model: torch.nn.Module) -> dict[str, str]:
    """Undoes :func:`fuse` wherever all that it changed is in ``model``, and says what became of it."""
    reasons = {}
    for name, owner in list(model.named_modules()):
        prefix = name + "." if name else ""
        for part in (unfuse_traced, unfuse_sequential, unfuse_transformer):
            reasons.update({(prefix + path).rstrip("."): reason for path, reason in part(owner).items()})
    return reasons
