"""Benchmark of batch_norm: training, without more, with ReLU, with a residual add and ReLU; evaluation; module calls.

Native is what users write: F.batch_norm, then add_ and relu_ in place as torchvision's ResNets do. bf16 and fp16 come
with fp32 parameters and running statistics, as under autocast.

Least bytes of N elements count the fewest passes, those of a channel's slice that stays in cache between its
statistics and its use: forward 2N (read x, write y), 3N with a residual; backward 3N (read grad_output and x, write
grad_input), 5N with a residual (y is read for the mask, the residual's gradient written). In channels_last every
channel's slice spans the whole tensor, so training must read x a second time where x is larger than the last-level
cache (and grad_output in backward); the floor does not count that, and there 2/3 of it is the most a forward can reach.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import dlkit
from dlkit._ops import op as dlkit_op

from ._levels import Levels, leaf, levels_of, twin_of
from ._runner import DIRECTIONS, DTYPES, Case, Contestant, Inputs

EPS = 1e-5
MOMENTUM = 0.1  # y does not depend on it: training uses the batch's own statistics
FUNCTIONS = ("batch_norm", "batch_norm_relu", "batch_norm_add_relu", "batch_norm_eval")
ACTIVATED = ("batch_norm_silu",)  # the same loops with the activation in them: a few sizes
MODULES = ("BatchNorm1d",)  # variants that go through a module's call
LAYOUTS = ("contiguous", "channels_last")

ROWS = ((4, 16), (128, 128), (64, 1024), (1000, 1003), (131072, 64), (8192, 1024), (32768, 1024))
# Tiny inputs, few and many channels, small and large images, a volume, one sample; up to 128 MB in fp32.
IMAGES = (
    (2, 3, 4, 4),
    (4, 16, 8, 8),
    (8, 64, 14, 14),
    (16, 512, 7, 7),
    (32, 64, 28, 28),
    (16, 3, 224, 224),
    (64, 2048, 7, 7),
    (8, 64, 16, 28, 28),
    (64, 256, 28, 28),
    (1, 64, 512, 512),
    (128, 64, 56, 56),
    (64, 128, 64, 64),
)


QUICK = ((2, 3, 4, 4), (8, 64, 14, 14), (32, 64, 28, 28))


def cases_of(variant: str, direction: str, shape: tuple[int, ...], dtype: str) -> list[Case]:
    """One case, or one per layout where there are two."""
    layouts = LAYOUTS if len(shape) > 3 else ("",)
    return [Case(variant, direction, shape, dtype, layout) for layout in layouts]


def quick_cases(variant: str, shapes: tuple[tuple[int, ...], ...], device: str) -> list[Case]:
    """Both directions of these shapes in fp32, the last one in bf16 too; on a GPU a larger one too."""
    if device != "cpu":
        shapes = (*shapes, (128, 64, 56, 56))
    return [
        case
        for direction in DIRECTIONS[:2]
        for shape in shapes
        for dtype in (("fp32", "bf16") if shape == shapes[-1] else ("fp32",))
        for case in cases_of(variant, direction, shape, dtype)
    ]


def cases(mode: str, device: str) -> list[Case]:
    both = DIRECTIONS[:2]
    if mode == "quick":
        found = quick_cases("batch_norm", QUICK, device)
        found += [
            case
            for variant in FUNCTIONS[1:]
            for direction in both
            for case in cases_of(variant, direction, QUICK[-1], "fp32")
        ]
        return [
            *found,
            *cases_of("batch_norm", "backward", (128, 16), "bf16"),
            *cases_of("batch_norm_relu", "backward", (4, 16, 5, 5), "bf16"),
            *cases_of("batch_norm_add_relu", "forward_backward", (4, 16, 5, 5), "fp32"),
            *cases_of("batch_norm_eval", "backward", (4, 16, 5, 5), "fp64"),
            *cases_of("BatchNorm1d", "forward_backward", (16, 64), "fp32"),
        ]
    if mode == "sweep":
        few = ((64, 1024), (8, 64, 14, 14), (64, 256, 28, 28))
        chosen = [
            (variant, direction, shape, dtype)
            for variant in FUNCTIONS
            for direction in both
            for dtype in ("fp32", "bf16", "fp16", "fp64")
            for shape in ROWS + IMAGES
            # The forms share the kernels' loops: all sizes of every form in fp32, of the most common two in bf16.
            if dtype == "fp32" or (dtype == "bf16" and variant in FUNCTIONS[:2]) or shape in few
        ]
    else:
        chosen = [
            (variant, direction, shape, dtype)
            for variant in FUNCTIONS
            for direction in both
            for shape in ((128, 64, 56, 56), (64, 256, 28, 28))
            for dtype in ("fp32", "bf16")
        ]
        chosen += [("batch_norm", direction, (8192, 1024), dtype) for direction in both for dtype in ("fp32", "bf16")]
        chosen += [
            ("batch_norm", direction, shape, "fp32") for direction in both for shape in ((2, 3, 4, 4), (8, 64, 14, 14))
        ]
        chosen += [
            (variant, direction, shape, dtype)
            for variant in ACTIVATED
            for direction in both
            for shape in ((8, 64, 14, 14), (128, 64, 56, 56))
            for dtype in ("fp32", "bf16")
        ]
        if device == "cuda":
            chosen += [(variant, way, (256, 128, 56, 56), "bf16") for variant in FUNCTIONS for way in both]
    chosen += [("BatchNorm1d", "forward_backward", shape, "fp32") for shape in ROWS[:3]]
    return [case for one in chosen for case in cases_of(*one)]


def memory_cases(device: str) -> list[Case]:
    return [Case(variant, "forward_backward", (64, 64, 28, 28), "fp32", "contiguous") for variant in FUNCTIONS]


def _has_residual(case: Case) -> bool:
    return case.variant == "batch_norm_add_relu"


def _has_relu(case: Case) -> bool:
    return case.variant.endswith("_relu")


def _training(case: Case) -> bool:
    return case.variant != "batch_norm_eval"


def inputs(case: Case, device: str, generator: torch.Generator) -> Inputs:
    dtype = DTYPES[case.dtype]

    def normal() -> Tensor:
        values = torch.randn(case.shape, generator=generator, device=device, dtype=dtype)
        return values.contiguous(memory_format=case.memory_format)

    channels = torch.randn(3, case.shape[1], generator=generator, device=device, dtype=_parameter_dtype(case))
    tensors = [normal().requires_grad_() for _ in range(1 + _has_residual(case))]
    tensors += [nn.Parameter(channels[0].clone()), nn.Parameter(channels[1].clone())]
    tensors += [channels[2].clone(), torch.rand_like(channels[2]) + 0.5]
    grad_output = normal()
    if _has_relu(case) and case.direction != "forward":
        # ReLU's gradient jumps at 0, and within the rounding of its input the reference may be on the other side:
        # elements there get no gradient.
        with torch.no_grad():
            before = _before_relu(case, *(tensor.double() for tensor in tensors))
            grad_output[before.abs() < 1e-4 + 8 * torch.finfo(dtype).eps] = 0
    return Inputs(tuple(tensors), (grad_output,))


def _parameter_dtype(case: Case) -> torch.dtype:
    return torch.float64 if case.dtype == "fp64" else torch.float32


def _native_relu(*arguments: Any) -> Tensor:
    return nn.functional.batch_norm(*arguments).relu_()


def _native_add_relu(*arguments: Any) -> Tensor:
    *arguments_of_norm, residual = arguments
    return nn.functional.batch_norm(*arguments_of_norm).add_(residual).relu_()


def _native_silu(*arguments: Any) -> Tensor:
    return nn.functional.silu(nn.functional.batch_norm(*arguments), inplace=True)


def _functional(case: Case, function: Callable[..., Any]) -> Contestant:
    def bind(*tensors: Tensor) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        x, *residual, weight, bias, mean, var = tensors
        # Each contestant has its own running statistics: native's graph saves them, and another's update would
        # invalidate it.
        running = mean.clone(), var.clone()
        return function, (x, *running, weight, bias, _training(case), MOMENTUM, EPS, *residual)

    return bind


def _module(case: Case, library: Any) -> Contestant:
    def bind(x: Tensor, weight: Tensor, bias: Tensor, *running: Tensor) -> tuple[nn.Module, tuple[Tensor]]:
        module = getattr(library, case.variant)(case.shape[1], eps=EPS, momentum=MOMENTUM, device=x.device)
        module.weight, module.bias = weight, bias
        return module, (x,)

    return bind


def contestants(case: Case, device: str) -> dict[str, Contestant]:
    from dlkit import functional as dlkit_functional
    from dlkit import nn as dlkit_nn

    if case.variant in MODULES:
        return {"native": _module(case, nn), "dlkit": _module(case, dlkit_nn)}
    pairs: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
        "batch_norm": (nn.functional.batch_norm, dlkit_functional.batch_norm),
        "batch_norm_eval": (nn.functional.batch_norm, dlkit_functional.batch_norm),
        "batch_norm_relu": (_native_relu, dlkit_functional.batch_norm_relu),
        "batch_norm_add_relu": (_native_add_relu, dlkit_functional.batch_norm_relu),
        "batch_norm_silu": (_native_silu, dlkit_functional.batch_norm_act),
    }
    native, dlkit = pairs[case.variant]
    return {"native": _functional(case, native), "dlkit": _functional(case, dlkit)}


def _before_relu(case: Case, x: Tensor, *others: Tensor) -> Tensor:
    shape = (1, -1, *(1 for _ in case.shape[2:]))
    weight, bias, mean, var = (tensor.view(shape) for tensor in others[-4:])
    if _training(case):
        over = (0, *range(2, len(case.shape)))
        mean = x.mean(over, keepdim=True)
        var = (x - mean).square().mean(over, keepdim=True)
    z = (x - mean) / torch.sqrt(var + EPS) * weight + bias
    return z + others[0] if _has_residual(case) else z


def reference(case: Case) -> Callable[..., Any]:
    def formula(*tensors: Tensor) -> Tensor:
        z = _before_relu(case, *tensors)
        return z.relu() if _has_relu(case) else nn.functional.silu(z) if case.variant in ACTIVATED else z

    return formula


def tolerances(case: Case) -> Sequence[float]:
    # Two steps of the dtype, and a sum of n accumulated values whose rounding errors add up like a random walk.
    accumulated = torch.finfo(_parameter_dtype(case)).eps
    walk = accumulated * (case.numel // case.shape[1]) ** 0.5
    outputs = [2 * torch.finfo(DTYPES[case.dtype]).eps + walk]
    gradients = outputs * (1 + _has_residual(case)) + [2 * accumulated + walk] * 2
    return {"forward": outputs, "backward": gradients, "forward_backward": outputs + gradients}[case.direction]


def minimal_bytes(case: Case) -> int:
    tensor = case.numel * case.itemsize
    channel = case.shape[1] * _parameter_dtype(case).itemsize  # a parameter, its gradient, or a statistic
    # Training reads and writes the running statistics, evaluation reads them; both read weight and bias.
    forward = (2 + _has_residual(case)) * tensor + (6 if _training(case) else 4) * channel
    # Reads weight (with an activation bias as well, to find z), mean and rstd; writes both parameters' gradients.
    backward = (5 if _has_residual(case) else 3) * tensor + 5 * channel
    finds_z = case.variant in ACTIVATED or (_has_relu(case) and not _has_residual(case))
    backward += channel if finds_z else 0
    statistics = 2 * channel  # written for backward
    both = forward + statistics + backward
    return {"forward": forward, "backward": backward, "forward_backward": both}[case.direction]


def _batch_norm(n: int, relu: bool) -> Levels:
    channels = max(1, min(n // 2, 64))
    x = leaf(max(2, n // channels), channels)  # one value a channel is no batch
    norm = nn.BatchNorm1d(channels)
    twin: Any = twin_of(norm)
    if relu:
        twin.__class__ = dlkit.nn.BatchNormReLU1d
    state = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    function = dlkit.functional.batch_norm_relu if relu else dlkit.functional.batch_norm
    counted, op = norm.num_batches_tracked, dlkit_op("batch_norm")
    return levels_of(
        (x,),
        (lambda x: torch.relu(norm(x))) if relu else norm,
        twin,
        lambda x: function(x, *state, True, 0.1, EPS),
        lambda x: op(x, *state, None, counted, True, 0.1, EPS, int(relu)),
    )


# For `bench calls`.
CALLS = {
    "BatchNorm1d": functools.partial(_batch_norm, relu=False),
    "BatchNormReLU1d": functools.partial(_batch_norm, relu=True),
}
