"""Initial weights that torch.nn.init lacks: layer-sequential unit variance.

One pass of a batch is enough for a whole model: before a layer runs, its weights are scaled until its output for its
input has variance 1, and the next layer's input is computed with the scaled weights. A layer is linear in its weights:
one scaling is enough, unless its bias has a part in the variance.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

__all__ = ["lsuv_"]

Model = TypeVar("Model", bound=nn.Module)

LAYERS = (nn.Linear, nn.modules.conv._ConvNd)


@torch.no_grad()
def lsuv_(
    model: Model,
    batch: Any,
    *,
    tolerance: float = 0.1,
    max_iterations: int = 10,
    orthogonal: bool = True,
    generator: torch.Generator | None = None,
) -> Model:
    """Layer-sequential unit variance: scales each layer's weights so that its output on ``batch`` has variance 1.

    The layers are those of class ``Linear`` and ``Conv`` (transposed ones too), in the order in which they run. The
    variance is over all elements of the output, before the activation. A layer, or a weight, that is used more than
    once is set at its first use. Two kinds of layers stay as they are: those with a frozen weight, and those that are
    not called, which causes a warning (``MultiheadAttention`` multiplies by the weights of its output layer without
    calling it).

    The batch passes once, without gradients. Dropout is off; BatchNorm normalizes by the batch, as in the first step of
    training. Training flags, buffers and the random state after the pass are those before it. Only the orthogonal start
    draws, as :func:`torch.nn.init.orthogonal_` does.

    Args:
        model: is changed in place.
        batch: the model's input: a tensor, a tuple or list of positional arguments, or a mapping of keyword
            arguments. Some hundred samples of the training data, on the model's device.
        tolerance: how far from 1 the variance may be.
        max_iterations: scalings of one layer, at most.
        orthogonal: begin with orthogonal weights and zero biases, as in the paper. False: begin with the present ones.
        generator: to draw the orthogonal weights from (default: torch's).

    Returns:
        ``model``.

    Raises:
        ValueError: the model has no layer to set, a weight that cannot be set, or a tolerance or number of iterations
            below what is possible.
        RuntimeError: a layer's output is not finite, has no variance or fewer than two elements, or its weight is zero.
            The message names the layer and what to do. After any error, the model's own and Ctrl-C included, all
            weights are as they were.

    Source: `Mishkin and Matas, All you need is a good init <https://arxiv.org/abs/1511.06422>`_, 2016, algorithm 1.
    """
    if not tolerance > 0:
        raise ValueError(f"lsuv_(): expected tolerance to be above 0, got {tolerance}")
    if max_iterations < 1:
        raise ValueError(f"lsuv_(): expected max_iterations to be at least 1, got {max_iterations}")
    root = getattr(model, "_orig_mod", model)  # inside torch.compile's wrapper, so that hooks run
    layers = _layers(root)
    scaler = _Scaler(tolerance, max_iterations)
    kept = {param: param.clone() for _, layer in layers for param in layer.parameters(recurse=False)}
    handles = []
    try:
        if orthogonal:
            _start(layers, generator)
        with _as_in_a_first_step(root), _random_state_kept(root):
            for name, layer in layers:
                handles.append(layer.register_forward_pre_hook(scaler.hook(name), with_kwargs=True))
            if isinstance(batch, Mapping):
                root(**batch)
            else:
                root(*batch if isinstance(batch, (tuple, list)) else (batch,))
    except BaseException:
        for param, value in kept.items():
            param.copy_(value)
        raise
    finally:
        for handle in handles:
            handle.remove()
    missed = [(name, layer) for name, layer in layers if layer.weight not in scaler.done]
    for _, layer in missed:
        for param in layer.parameters(recurse=False):
            param.copy_(kept[param])
    if missed:
        names = ", ".join(repr(name) for name, _ in missed)
        scaler.warnings.append(f"the batch did not reach {names} as a module, so the weights there are as they were")
    for text in scaler.warnings:
        warnings.warn(f"lsuv_(): {text}", stacklevel=3)  # 3: the caller, past no_grad's wrapper
    return model


def _layers(model: nn.Module) -> list[tuple[str, Any]]:
    """(name, layer) of those to set; raises where there is none, or one cannot be set."""
    found = [
        (name or type(layer).__name__, layer) for name, layer in model.named_modules() if isinstance(layer, LAYERS)
    ]
    if not found:
        raise ValueError(
            f"lsuv_(): expected a model with Linear or Conv layers, got a {type(model).__name__} without any"
        )
    for name, layer in found:
        weight = layer._parameters.get("weight")
        if weight is None:
            raise ValueError(
                f"lsuv_(): the weight of layer {name!r} is computed from others (a parametrization or weight_norm); "
                "call lsuv_() before that is added"
            )
        if isinstance(weight, nn.parameter.UninitializedParameter):
            raise ValueError(f"lsuv_(): layer {name!r} has no weight yet; run a batch through the lazy model first")
        if weight.is_meta:
            raise ValueError(
                f"lsuv_(): the weight of layer {name!r} is on the meta device; call model.to_empty() first"
            )
        if not weight.is_floating_point():
            raise ValueError(f"lsuv_(): expected layer {name!r} to have floating-point weights, got {weight.dtype}")
    found = [(name, layer) for name, layer in found if layer.weight.requires_grad]
    if not found:
        raise ValueError(
            "lsuv_(): the weights of all Linear and Conv layers are frozen; set requires_grad on those to set"
        )
    return found


def _start(layers: list[tuple[str, Any]], generator: torch.Generator | None) -> None:
    """Orthogonal weights and zero biases, in the order of the model; a weight that layers share is drawn once."""
    weights = {layer.weight: None for _, layer in layers}
    for weight in weights:
        if weight.dtype in (torch.float16, torch.bfloat16):  # QR is there for fp32 and fp64 only
            weight.copy_(nn.init.orthogonal_(torch.empty_like(weight, dtype=torch.float32), generator=generator))
        else:
            nn.init.orthogonal_(weight, generator=generator)
    for _, layer in layers:
        if layer.bias is not None:
            layer.bias.zero_()


class _Scaler:
    """Scales a layer's weight when its input arrives. `done` holds the weights that are scaled already."""

    def __init__(self, tolerance: float, max_iterations: int) -> None:
        self.tolerance = tolerance
        self.max_iterations = max_iterations
        self.done: set[Tensor] = set()
        self.warnings: list[str] = []

    def hook(self, name: str) -> Any:
        def scale(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if layer.weight not in self.done:
                self.done.add(layer.weight)
                self.scale(name, layer, args, kwargs)

        return scale

    def scale(self, name: str, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not layer.weight.any():
            raise RuntimeError(
                f"lsuv_(): the weight of layer {name!r} is zero, which no scaling changes; begin with orthogonal=True"
            )
        for iteration in range(self.max_iterations + 1):
            variance = _variance(name, layer.forward(*args, **kwargs), args)
            if abs(variance - 1) <= self.tolerance:
                return
            if iteration < self.max_iterations:
                layer.weight.div_(math.sqrt(variance))
        self.warnings.append(
            f"the output of layer {name!r} has variance {variance:.3g} after max_iterations={self.max_iterations} "
            f"scalings of its weight; {self._remedy(layer)}"
        )

    def _remedy(self, layer: Any) -> str:
        of_bias = 0.0 if layer.bias is None else float(layer.bias.float().var(correction=0))
        if of_bias > self.tolerance:
            return f"its bias alone gives {of_bias:.3g}: begin with zero biases, as orthogonal=True does"
        return f"set max_iterations or tolerance={self.tolerance:g} higher"


def _variance(name: str, output: Any, args: tuple[Any, ...]) -> float:
    elements = output.numel()
    if elements < 2:
        raise RuntimeError(
            f"lsuv_(): the output of layer {name!r} has {elements} element{'s' * (elements != 1)}, and so no variance; "
            "give a batch of more samples"
        )
    values = output.float() if output.dtype in (torch.float16, torch.bfloat16) else output
    variance = float(values.var(correction=0))
    if not math.isfinite(variance):
        given = [arg for arg in args if isinstance(arg, Tensor) and not bool(arg.isfinite().all())]
        if given:
            raise RuntimeError(
                f"lsuv_(): the input of layer {name!r} is not finite; look for NaN or infinity in the batch, and in "
                "what the model does before this layer"
            )
        raise RuntimeError(
            f"lsuv_(): the output of layer {name!r} is not finite though its input is; look at its weight and bias, or "
            "run lsuv_() in fp32"
        )
    # A variance this small is the rounding error of a constant output. No scaling would make a signal of it.
    if variance <= (torch.finfo(values.dtype).eps * float(values.abs().max())) ** 2:
        raise RuntimeError(
            f"lsuv_(): the output of layer {name!r} is constant (variance {variance:.3g}); give a batch of different "
            "samples, and see that an activation before the layer is not 0 for all of them"
        )
    return variance


@contextlib.contextmanager
def _as_in_a_first_step(model: nn.Module) -> Iterator[None]:
    """Dropout off, but layers that keep running statistics normalize by the batch. Flags and buffers are put back."""
    modules = list(model.modules())
    flags = [module.training for module in modules]
    buffers = [(m, name, b, b.clone()) for m in modules for name, b in m._buffers.items() if b is not None]
    try:
        for module in modules:
            module.training = "running_mean" in module._buffers
        yield
    finally:
        for module, flag in zip(modules, flags, strict=True):
            module.training = flag
        for module, name, buffer, value in buffers:
            buffer.copy_(value)
            module._buffers[name] = buffer


@contextlib.contextmanager
def _random_state_kept(model: nn.Module) -> Iterator[None]:
    """Restores the random state of the CPU and of the devices that the model is on."""
    devices = {param.device for param in model.parameters()} - {torch.device("cpu")}
    with contextlib.ExitStack() as stack:
        for kind in {device.type for device in devices} or {"cuda"}:
            indices = [device.index or 0 for device in devices if device.type == kind]
            stack.enter_context(torch.random.fork_rng(indices, device_type=kind))
        yield
