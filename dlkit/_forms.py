"""Norms written by others, in terms of dlkit's functions: what a class may compute, and in which order it rounds.

A :class:`Form` says what is computed. Its ``rounding``, for each pair of dtypes (input, weight), says where the result
becomes 16 bits wide: that order decides most of the last bits.

=========  ===========================================================================
"end"      statistics, weight and bias in fp32 (fp64), then one rounding: Gemma, OLMo
"input"    rounded to the input's dtype, then times the weight: Llama
"weight"   rounded to the weight's dtype, then times the weight: T5
"wide"     not rounded: 16-bit input and fp32 weight give an fp32 result, as in T5
=========  ===========================================================================
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dlkit import functional as F
from dlkit._activation import layer_activation
from dlkit.nn._layer import HOOKS
from dlkit.nn.batch_norm import normalize

ROUNDINGS = ("end", "input", "weight", "wide")
Dtypes = tuple[torch.dtype, torch.dtype | None]


class Form(NamedTuple):
    """What a norm computes; ``weight``, ``bias`` and ``eps`` are names of attributes, or a number."""

    norm: str  # "rms", "layer", "frozen" (a BatchNorm of constants), or "twin": a subclass of torch's own
    # "last"; "heads": that alone, with a weight of more dimensions; "first": dimension 1; "dense": that, with a result
    # in the input's layout, and served for channels_last alone: two transpositions would make it three times as slow
    layout: str = "last"
    weight: str = ""
    bias: str = ""
    eps: str | float = 0.0
    one_plus: bool = False  # the weight is stored less 1
    gate: str = ""  # a second input, in SiLU, multiplies "before" or "after"
    children: tuple[str, ...] = ()  # called on the result, in turn
    acts: bool = False  # of the children the last is an activation, which the norm takes in; the others do nothing
    casts: bool = False  # a twin whose result has the input's dtype under autocast too
    proven: tuple[type, str] | None = None  # the activation's class, if it is of another library, and what it computes

    def __str__(self) -> str:
        names = {"rms": "RMSNorm", "layer": "LayerNorm", "frozen": "BatchNorm of constants", "twin": "torch's norm"}
        text = [names[self.norm]]
        layouts = {
            "first": ["over channels"],
            "dense": ["over channels of channels_last input"],
            "heads": ["of each head"],
        }
        text += layouts.get(self.layout, [])
        text += ["weight 1 + w"] * self.one_plus + ["no weight"] * (self.norm in ("rms", "layer") and not self.weight)
        text += [f"gated {self.gate} it"] * bool(self.gate)
        text += ["with its activation"] if self.acts else [f"then {name}" for name in self.children]
        return ", ".join(text)


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def computes(form: Form, rounding: Mapping[Dtypes, str], twin: Any = None) -> Callable[..., Tensor]:
    """``forward(module, input)``, or ``(module, input, gate)``, of this form; ``twin``: dlkit's class for "twin"."""
    if form.norm == "twin":
        return _of_twin(form, twin)
    if form.norm == "frozen":
        return _frozen(form)

    def normalize(x: Tensor, shape: Any, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        rms = form.norm == "rms"
        y = F.rms_norm(x, shape, weight, eps) if rms else F.layer_norm(x, shape, weight, bias, eps)
        return y if y.dtype == x.dtype else y.to(x.dtype)  # autocast widens it

    def norm(module: Any, x: Tensor) -> Tensor:
        weight = getattr(module, form.weight) if form.weight else None
        bias = getattr(module, form.bias) if form.bias else None
        eps = getattr(module, form.eps) if isinstance(form.eps, str) else form.eps
        if weight is None:
            return normalize(x, x.shape[-1:], None, None, eps)
        order, dtype = rounding[x.dtype, weight.dtype], x.dtype
        if order in ("end", "wide"):
            weight = weight if weight.dtype == dtype and not form.one_plus else _wide(weight)
            weight = 1.0 + weight if form.one_plus else weight
            bias = bias if bias is None else bias.to(weight.dtype)
            x = _wide(x) if order == "wide" else x
            if form.layout != "heads":
                return normalize(x, weight.shape, weight, bias, eps)
            y = normalize(_wide(x), x.shape[-1:], None, None, eps) * weight
            y = y if bias is None else y + bias
            return y if order == "wide" else y.to(dtype)
        shape = x.shape[-1:] if form.layout == "heads" else weight.shape
        y = normalize(x, shape, None, None, eps)
        y = (1.0 + weight if form.one_plus else weight) * (y.to(weight.dtype) if order == "weight" else y)
        return y if bias is None else y + bias

    if form.gate:
        return _gated(form, rounding, norm)
    return _by_layout(form, norm)


def _by_layout(form: Form, norm: Callable[[Any, Tensor], Tensor]) -> Callable[..., Tensor]:
    if form.layout in ("last", "heads"):
        return norm

    return lambda module, input: norm(module, input.movedim(1, -1)).movedim(-1, 1)


def _gated(form: Form, rounding: Mapping[Dtypes, str], norm: Callable[[Any, Tensor], Tensor]) -> Callable[..., Tensor]:
    silu = torch.nn.functional.silu

    def gated(module: Any, input: Tensor, gate: Tensor) -> Tensor:
        wide_gate = silu(_wide(gate))
        if form.gate == "after":
            return (norm(module, input) * wide_gate).to(input.dtype)
        weight = getattr(module, form.weight)
        eps = getattr(module, form.eps) if isinstance(form.eps, str) else form.eps
        x = _wide(input) * wide_gate
        if rounding[input.dtype, weight.dtype] == "end":
            return F.rms_norm(x, weight.shape, weight, eps).to(input.dtype)
        return weight * F.rms_norm(x, weight.shape, None, eps).to(input.dtype)

    return gated


def _group_norm_act(module: Any, input: Tensor, residual: None, activation: str, negative_slope: float) -> Tensor:
    weight, bias = module.weight, module.bias
    return F.group_norm_act(input, module.num_groups, weight, bias, module.eps, residual, activation, negative_slope)


def _of_twin(form: Form, twin_class: Any) -> Callable[..., Tensor]:
    twin: Callable[[Any, Tensor], Tensor] = twin_class.forward
    act = _group_norm_act if issubclass(twin_class, torch.nn.GroupNorm) else normalize

    def forward(module: Any, input: Tensor) -> Tensor:
        activation = own_activation(module, form.proven) if form.acts else None
        if activation is not None:
            return act(module, input, None, *activation)
        y = twin(module, input)
        if form.casts:
            y = y.to(input.dtype)
        for name in form.children:
            y = getattr(module, name)(y)
        return y

    return _by_layout(form, forward if form.children or form.casts else twin)


def own_activation(module: torch.nn.Module, proven: tuple[type, str] | None = None) -> tuple[str, float] | None:
    """(name, negative_slope) of the last child, if that is a plain activation and the others are plain Identities.

    ``proven``: a class of another library, and the name of what it computes.
    """
    children = list(module._modules.values())
    if any(c is None or "forward" in vars(c) or any(getattr(c, hooks) for hooks in HOOKS) for c in children):
        return None
    if not children or any(type(child) is not torch.nn.Identity for child in children[:-1]):
        return None
    last: Any = children[-1]
    return (proven[1], 0.0) if proven and type(last) is proven[0] else layer_activation(last)


def _frozen(form: Form) -> Callable[..., Tensor]:
    def forward(module: Any, input: Tensor) -> Tensor:
        eps = getattr(module, form.eps) if isinstance(form.eps, str) else form.eps
        weight, bias = getattr(module, form.weight), getattr(module, form.bias)
        y = F.batch_norm(input, module.running_mean, module.running_var, weight, bias, False, 0.0, eps)
        for name in form.children:
            y = getattr(module, name)(y)
        return y

    return forward


def drops(kind: str, p: str) -> Callable[..., Tensor]:
    """``forward(module, input)`` of stochastic depth ("path") or DropBlock ("block") with probability ``module.p``."""

    def drop_path(module: Any, input: Tensor) -> Tensor:
        return F.drop_path(input, getattr(module, p) or 0.0, module.training)

    def drop_block(module: Any, input: Tensor) -> Tensor:
        inplace = bool(getattr(module, "inplace", False))
        return F.dropblock2d(input, getattr(module, p) or 0.0, module.block_size, module.training, inplace)

    return drop_path if kind == "path" else drop_block
