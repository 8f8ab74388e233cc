"""Neighbours in torch.nn.Sequential, which is taken to be called as a whole."""

from typing import Any

import torch

from dlkit.fusion._layers import become_fused, become_plain, does_nothing, took_in, why_left
from dlkit.fusion._other_activations import activation_of


def is_sequential(module: torch.nn.Module) -> bool:
    return type(module).forward is torch.nn.Sequential.forward and "forward" not in vars(module)


def fuse_sequential(owner: torch.nn.Module, paths: list[str]) -> dict[str, str]:
    reasons = {}
    children = list(owner._modules.items())
    following = dict(zip((name for name, _ in children), children[1:], strict=False))
    for path in paths:
        name, relu = following.get(path, ("", None))
        while name and does_nothing(relu) is not None:
            name, relu = following.get(name, ("", None))
        activation = None if relu is None else activation_of(relu)
        if relu is None or activation is None:
            reasons[path] = "no activation follows it"
        elif why_left(relu):
            reasons[path] = f"the activation after it is left: {why_left(relu)}"
        else:
            become_fused(owner.get_submodule(path), activation)
            identity = torch.nn.Identity().train(relu.training)
            # The activation, for restore(); no child of it, so that names and hooks stay.
            vars(identity)["_dlkit_relu"] = relu
            owner.register_module(name, identity)
            reasons[path] = f"takes in the {type(relu).__name__} after it ({name})"
            reasons[name] = f"its work is done by the layer before it ({path})"
    return reasons


def unfuse_sequential(owner: torch.nn.Module) -> dict[str, str]:
    reasons: dict[str, str] = {}
    if not is_sequential(owner):
        return reasons
    children: list[tuple[str, Any]] = list(owner._modules.items())
    last: Any = None
    for relu_path, relu in children:
        (path, layer), original = last or ("", None), None
        if relu is not None:
            original = vars(relu).get("_dlkit_relu")
            last = last if original is None and does_nothing(relu) is not None else (relu_path, relu)
        if layer is None or original is None or not took_in(layer):
            continue
        become_plain(layer)
        owner.register_module(relu_path, original.train(relu.training))
        reasons[path] = f"leaves the activation to the layer after it ({relu_path}) again"
        reasons[relu_path] = "is back"
    return reasons
