"""Benchmark of layer_norm: LayerNorm and RMSNorm, with and without a residual add before, as functions and as modules.

Least bytes of N elements: forward 2N (read x, write y), backward 3N (read grad_output and x, write grad_input), with a
residual 4N each way (forward reads two and writes two; backward also reads the gradient that reaches the sum).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dlkit
from dlkit._ops import op as dlkit_op

from ._levels import Levels, P, leaf, levels_of, rows_of, twin_of
from ._runner import DIRECTIONS, DTYPES, Case, Contestant, Inputs, peer

EPS = 1e-5
FUNCTIONS = ("layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm")
MODULES = {"LayerNorm": "layer_norm", "RMSNorm": "rms_norm"}  # variants that go through a module's call

SMALL = ((1, 16), (4, 16), (16, 64), (128, 128), (1024, 128), (64, 1024), (512, 768), (1000, 1003))
# Few long rows, many short ones, and the sizes of real models, up to 128 MB in fp32.
LARGE = (
    (2048, 768),
    (2048, 1024),
    (1, 1048576),
    (131072, 16),
    (8192, 1024),
    (65536, 64),
    (32768, 256),
    (2048, 8192),
    (8192, 4096),
    (512, 65536),
)


QUICK = ((16, 64), (256, 1024), (2048, 1024))


def cases(mode: str, device: str) -> list[Case]:
    both = DIRECTIONS[:2]
    if mode == "quick":
        sizes = QUICK if device == "cpu" else (*QUICK, (8192, 4096))
        found = [
            Case("layer_norm", direction, shape, dtype)
            for dtype in ("fp32", "bf16")
            for direction in both
            for shape in sizes
        ]
        found += [Case("rms_norm", direction, sizes[-1], dtype) for dtype in ("fp32", "bf16") for direction in both]
        found += [Case("add_layer_norm", direction, QUICK[-1], "fp32") for direction in both]
        return [
            *found,
            Case("rms_norm", "backward", (16, 65), "fp32"),
            Case("add_layer_norm", "forward_backward", (16, 64), "fp64"),
            Case("RMSNorm", "forward_backward", (16, 64), "fp32"),
        ]
    if mode == "sweep":
        found = [
            Case(variant, direction, shape, dtype)
            for variant in FUNCTIONS
            for direction in both
            for dtype in ("fp32", "bf16", "fp16", "fp64")
            for shape in SMALL + LARGE
            # The residual forms share the kernels' loops, and fp64 is rare: a few sizes of each are enough.
            if not (variant.startswith("add_") or dtype == "fp64") or shape in ((4, 16), (1024, 128), (8192, 1024))
        ]
        return found + [Case(name, "forward_backward", shape, "fp32") for name in MODULES for shape in SMALL]
    large, largest = (8192, 1024), (8192, 4096)
    found = [Case("layer_norm", direction, shape, "fp32") for direction in both for shape in (large, largest)]
    found += [Case("layer_norm", direction, largest, "bf16") for direction in both]
    found += [Case("add_layer_norm", direction, largest, "fp32") for direction in both]
    found += [Case("rms_norm", direction, shape, "fp32") for direction in both for shape in (large, largest)]
    found += [Case("rms_norm", direction, largest, "bf16") for direction in both]
    found += [Case("add_rms_norm", "forward", largest, "fp32")]
    found += [Case(name, "forward_backward", shape, "fp32") for name in MODULES for shape in ((4, 16), (128, 128))]
    shapes = ((1, 16), (128, 128), (64, 1024), (1000, 1003), (2048, 1024))
    found += [Case("layer_norm", direction, shape, "fp32") for direction in both for shape in shapes]
    found += [Case("layer_norm", direction, (2048, 1024), dtype) for direction in both for dtype in ("bf16", "fp16")]
    if device == "cuda":
        found += [Case("layer_norm", direction, (32768, 4096), "bf16") for direction in both]
        found += [Case("rms_norm", direction, (32768, 4096), "bf16") for direction in both]
    return found


def memory_cases(device: str) -> list[Case]:
    return [Case(variant, "forward_backward", (2048, 1024), "fp32") for variant in FUNCTIONS]


def _function(case: Case) -> str:
    return MODULES.get(case.variant, case.variant)


def _has_residual(case: Case) -> bool:
    return case.variant.startswith("add_")


def _has_bias(case: Case) -> bool:
    return _function(case).endswith("layer_norm")


def inputs(case: Case, device: str, generator: torch.Generator) -> Inputs:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=DTYPES[case.dtype])

    outputs = 2 if _has_residual(case) else 1
    tensors = [normal(*case.shape).requires_grad_() for _ in range(outputs)]
    tensors += [nn.Parameter(normal(case.shape[-1])) for _ in range(1 + _has_bias(case))]
    return Inputs(tuple(tensors), tuple(normal(*case.shape) for _ in range(outputs)))


def _functional(case: Case, function: Callable[..., Any]) -> Contestant:
    """For a function with the signature of torch's: the tensors, then the normalized shape, the parameters and eps."""
    leading = 2 if _has_residual(case) else 1
    shape = case.shape[-1:]
    return lambda *tensors: (function, (*tensors[:leading], shape, *tensors[leading:], EPS))


def _module(case: Case, library: Any) -> Contestant:
    def bind(x: Tensor, *parameters: Tensor) -> tuple[nn.Module, tuple[Tensor]]:
        module = getattr(library, case.variant)(case.shape[-1], eps=EPS)
        for name, parameter in zip(("weight", "bias"), parameters, strict=False):
            setattr(module, name, parameter)
        return module, (x,)

    return bind


def _add_layer_norm(x: Tensor, residual: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    total = x + residual
    return nn.functional.layer_norm(total, *arguments), total


def _add_rms_norm(x: Tensor, residual: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    total = x + residual
    return nn.functional.rms_norm(total, *arguments), total


def contestants(case: Case, device: str) -> dict[str, Contestant]:
    from dlkit import functional as dlkit_functional
    from dlkit import nn as dlkit_nn

    if case.variant in MODULES:
        return {"native": _module(case, nn), "dlkit": _module(case, dlkit_nn)}
    native: dict[str, Callable[..., Any]] = {
        "layer_norm": nn.functional.layer_norm,
        "rms_norm": nn.functional.rms_norm,
        "add_layer_norm": _add_layer_norm,
        "add_rms_norm": _add_rms_norm,
    }
    found = {
        "native": _functional(case, native[case.variant]),
        "dlkit": _functional(case, getattr(dlkit_functional, case.variant)),
    }
    if device == "cuda" and case.dtype != "fp64":
        found.update(_peers(case))
    return found


def _peers(case: Case) -> dict[str, Contestant]:
    """Libraries that have this function; never in place, which would overwrite the given gradient."""
    liger, quack = "liger_kernel.transformers.functional", "quack.rmsnorm"
    llama = (EPS, 0.0, "llama", False)
    if case.variant == "layer_norm":
        found = {"liger": peer(liger, "liger_layer_norm", lambda x, weight, bias: (x, weight, bias, EPS))}
        if case.direction == "forward" and case.dtype == "fp32":  # it has neither autograd nor 16-bit weights
            found["quack"] = peer(quack, "layernorm_fwd", lambda x, weight, bias: (x, weight, bias, EPS))
        return found
    if case.variant == "rms_norm":
        return {
            "liger": peer(liger, "liger_rms_norm", lambda x, weight: (x, weight, *llama)),
            "quack": peer(quack, "rmsnorm", lambda x, weight: (x, weight, None, None, None, None, EPS)),
        }
    if case.variant == "add_rms_norm":
        return {
            "liger": peer(liger, "liger_fused_add_rms_norm", lambda x, residual, weight: (x, residual, weight, *llama)),
            "quack": peer(
                quack, "rmsnorm", lambda x, residual, weight: (x, weight, None, residual, None, None, EPS, True)
            ),
        }
    return {}


def reference(case: Case) -> Callable[..., Any]:
    def formula(x: Tensor, *others: Tensor) -> Any:
        total = x + others[0] if _has_residual(case) else x
        parameters = others[1:] if _has_residual(case) else others
        centred = total - total.mean(-1, keepdim=True) if _has_bias(case) else total
        y = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + EPS) * parameters[0]
        if _has_bias(case):
            y = y + parameters[1]
        return (y, total) if _has_residual(case) else y

    return formula


def tolerances(case: Case) -> Sequence[float]:
    # Two steps of the dtype, and a sum of n accumulated values whose rounding errors add up like a random walk.
    dtype = DTYPES[case.dtype]
    accumulate = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    rows, cols = case.numel // case.shape[-1], case.shape[-1]
    over_row, over_rows = (2 * torch.finfo(dtype).eps + accumulate * count**0.5 for count in (cols, rows))
    tensors = 2 if _has_residual(case) else 1
    outputs = [over_row] * tensors
    gradients = [over_row] * tensors + [over_rows] * (1 + _has_bias(case))
    return {"forward": outputs, "backward": gradients, "forward_backward": outputs + gradients}[case.direction]


def minimal_bytes(case: Case) -> int:
    accumulate = 8 if case.dtype == "fp64" else 4
    rows, cols = case.numel // case.shape[-1], case.shape[-1]
    parameters = (1 + _has_bias(case)) * cols * case.itemsize
    statistics = (1 + _has_bias(case)) * rows * accumulate
    tensors = 4 if _has_residual(case) else 2
    forward = tensors * case.numel * case.itemsize + parameters
    # Reads weight and the statistics, writes a gradient for each parameter.
    backward = (4 if _has_residual(case) else 3) * case.numel * case.itemsize
    backward += cols * case.itemsize + parameters + statistics
    both = forward + statistics + backward
    return {"forward": forward, "backward": backward, "forward_backward": both}[case.direction]


def _row_norm(n: int, cls: type[nn.Module], add: bool, drop: bool) -> Levels:
    x, shape = leaf(*rows_of(n)), (min(n, 64),)
    norm = cls(shape, eps=EPS)
    is_layer = cls is nn.LayerNorm
    parameters = (norm.weight, norm.bias) if is_layer else (norm.weight,)
    base = "layer_norm" if is_layer else "rms_norm"
    if not add:
        function, op = getattr(dlkit.functional, base), dlkit_op(base)
        return levels_of(
            (x,),
            norm,
            twin_of(norm),
            lambda x: function(x, shape, *parameters, EPS),
            lambda x: op(x, shape, *parameters, EPS),
        )
    residual = torch.randn(x.shape).requires_grad_()
    name = f"dropout_add_{base}" if drop else f"add_{base}"
    function, op = getattr(dlkit.functional, name), dlkit_op(name)
    middle = "DropoutAdd" if drop else "Add"
    module_class = getattr(dlkit.nn, middle + cls.__name__)
    module = module_class(shape, P, eps=EPS, prenorm=True) if drop else module_class(shape, eps=EPS)
    for key, parameter in norm.named_parameters():
        setattr(module, key, parameter)

    def native(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        total = (F.dropout(x, P) if drop else x) + residual
        return norm(total), total

    if drop:
        return levels_of(
            (x, residual),
            native,
            module,
            lambda x, residual: function(x, residual, shape, *parameters, P, EPS, prenorm=True),
            lambda x, residual: op(x, residual, shape, P, *parameters, EPS, None, None),
        )
    return levels_of(
        (x, residual),
        native,
        module,
        lambda x, residual: function(x, residual, shape, *parameters, EPS),
        lambda x, residual: op(x, residual, shape, *parameters, EPS),
    )


# For `bench calls`.
CALLS = {
    "LayerNorm": functools.partial(_row_norm, cls=nn.LayerNorm, add=False, drop=False),
    "RMSNorm": functools.partial(_row_norm, cls=nn.RMSNorm, add=False, drop=False),
    "AddLayerNorm": functools.partial(_row_norm, cls=nn.LayerNorm, add=True, drop=False),
    "AddRMSNorm": functools.partial(_row_norm, cls=nn.RMSNorm, add=True, drop=False),
    "DropoutAddLayerNorm": functools.partial(_row_norm, cls=nn.LayerNorm, add=True, drop=True),
    "DropoutAddRMSNorm": functools.partial(_row_norm, cls=nn.RMSNorm, add=True, drop=True),
}
