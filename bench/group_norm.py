"""Benchmark of group_norm: GroupNorm of 32 groups and InstanceNorm, as functions and as modules.

Least bytes of N elements: forward 2N (read x, write y), backward 3N (read grad_output and x, write grad_input). That
counts one read, which holds while one group of one sample (in channels_last: one sample) stays in cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import dlkit
from dlkit._ops import op as dlkit_op

from ._levels import Levels, leaf, levels_of, twin_of
from ._runner import DIRECTIONS, DTYPES, Case, Contestant, Inputs, peer
from .batch_norm import cases_of, quick_cases

EPS = 1e-5
GROUPS = 32
FUNCTIONS = ("group_norm", "instance_norm")
MODULES = ("GroupNorm",)  # variants that go through a module's call

# Tiny inputs, few and many channels, small and large images, a volume, one sample; up to 128 MB in fp32.
IMAGES = (
    (1, 32, 4, 4),
    (4, 64, 8, 8),
    (8, 64, 14, 14),
    (16, 512, 7, 7),
    (32, 64, 28, 28),
    (8, 32, 128, 128),
    (64, 2048, 7, 7),
    (8, 64, 16, 28, 28),
    (64, 256, 28, 28),
    (1, 64, 512, 512),
    (128, 64, 56, 56),
    (64, 128, 64, 64),
)
ROWS = ((4, 512), (128, 1024), (8192, 1024))  # at least 16 values a group: results for 2 close values are never exact


QUICK = ((2, 64, 4, 4), (8, 64, 14, 14), (32, 64, 28, 28))


def cases(mode: str, device: str) -> list[Case]:
    both = DIRECTIONS[:2]
    if mode == "quick":
        found = quick_cases("group_norm", QUICK, device)
        found += [case for direction in both for case in cases_of("instance_norm", direction, QUICK[-1], "fp32")]
        return [
            *found,
            *cases_of("group_norm", "backward", (2, 64, 5, 5), "bf16"),
            *cases_of("instance_norm", "forward_backward", (2, 3, 5, 5), "fp32"),
            *cases_of("GroupNorm", "forward_backward", (16, 512), "fp64"),
        ]
    large = ((128, 64, 56, 56), (64, 256, 28, 28))
    if mode == "sweep":
        few = ((8, 64, 14, 14), (64, 256, 28, 28))
        chosen = [
            (variant, direction, shape, dtype)
            for variant in FUNCTIONS
            for direction in both
            for dtype in ("fp32", "bf16", "fp16", "fp64")
            for shape in (ROWS if variant == "group_norm" else ()) + IMAGES
            # The forms share the kernels' loops: all sizes in fp32, and group_norm's also in bf16.
            if dtype == "fp32" or (dtype == "bf16" and variant == "group_norm") or shape in few
        ]
    else:
        chosen = [
            ("group_norm", direction, shape, dtype)
            for direction in both
            for shape in large
            for dtype in ("fp32", "bf16")
        ]
        chosen += [("instance_norm", direction, large[0], "fp32") for direction in both]
        chosen += [
            ("group_norm", direction, shape, "fp32") for direction in both for shape in ((1, 32, 4, 4), (8, 64, 14, 14))
        ]
        if device == "cuda":
            chosen += [("group_norm", direction, (256, 128, 56, 56), "bf16") for direction in both]
    chosen += [("GroupNorm", "forward_backward", shape, "fp32") for shape in ROWS[:2]]
    return [case for one in chosen for case in cases_of(*one)]


def memory_cases(device: str) -> list[Case]:
    return [Case(variant, "forward_backward", (64, 64, 28, 28), "fp32", "contiguous") for variant in FUNCTIONS]


def _groups(case: Case) -> int:
    return case.shape[1] if case.variant == "instance_norm" else GROUPS


def inputs(case: Case, device: str, generator: torch.Generator) -> Inputs:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=DTYPES[case.dtype])

    x, grad_output = (normal(*case.shape).contiguous(memory_format=case.memory_format) for _ in range(2))
    parameters = [nn.Parameter(normal(case.shape[1])) for _ in range(2)]
    return Inputs((x.requires_grad_(), *parameters), (grad_output,))


def _functional(case: Case, library: Any) -> Contestant:
    if case.variant == "instance_norm":
        return lambda x, weight, bias: (library.instance_norm, (x, None, None, weight, bias, True, 0.1, EPS))
    return lambda x, weight, bias: (library.group_norm, (x, GROUPS, weight, bias, EPS))


def _module(case: Case, library: Any) -> Contestant:
    def bind(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[nn.Module, tuple[Tensor]]:
        module = getattr(library, case.variant)(GROUPS, case.shape[1], eps=EPS)
        module.weight, module.bias = weight, bias
        return module, (x,)

    return bind


def contestants(case: Case, device: str) -> dict[str, Contestant]:
    from dlkit import functional as dlkit_functional
    from dlkit import nn as dlkit_nn

    if case.variant in MODULES:
        return {"native": _module(case, nn), "dlkit": _module(case, dlkit_nn)}
    found = {"native": _functional(case, nn.functional), "dlkit": _functional(case, dlkit_functional)}
    if device == "cuda" and case.variant == "group_norm" and case.dtype != "fp64" and case.layout != "channels_last":
        found["liger"] = peer(
            "liger_kernel.transformers.functional",
            "liger_group_norm",
            lambda x, weight, bias: (x, weight, bias, case.shape[1], GROUPS, EPS),
        )
    return found


def reference(case: Case) -> Callable[..., Any]:
    def formula(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        grouped = x.reshape(case.shape[0], _groups(case), -1)
        centred = grouped - grouped.mean(-1, keepdim=True)
        xhat = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + EPS)
        shape = (1, -1, *(1 for _ in case.shape[2:]))
        return xhat.view(case.shape) * weight.view(shape) + bias.view(shape)

    return formula


def tolerances(case: Case) -> Sequence[float]:
    # Two steps of the dtype, and a sum of n accumulated values whose rounding errors add up like a random walk.
    dtype = DTYPES[case.dtype]
    accumulated = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    counts = (case.numel // (case.shape[0] * _groups(case)), case.numel // case.shape[1])
    over_group, over_channel = (2 * torch.finfo(dtype).eps + accumulated * count**0.5 for count in counts)
    gradients = [over_group, over_channel, over_channel]
    return {"forward": [over_group], "backward": gradients, "forward_backward": [over_group, *gradients]}[
        case.direction
    ]


def minimal_bytes(case: Case) -> int:
    tensor, parameter = case.numel * case.itemsize, case.shape[1] * case.itemsize
    statistics = 2 * case.shape[0] * _groups(case) * (8 if case.dtype == "fp64" else 4)
    forward = 2 * tensor + 2 * parameter
    # Reads weight and the statistics, writes both parameters' gradients.
    backward = 3 * tensor + 3 * parameter + statistics
    both = forward + statistics + backward
    return {"forward": forward, "backward": backward, "forward_backward": both}[case.direction]


def _group_norm(n: int) -> Levels:
    channels = max(2, min(n // 2, 32))
    x, groups = leaf(1, channels, max(1, n // channels)), max(1, channels // 2)
    norm, op = nn.GroupNorm(groups, channels), dlkit_op("group_norm")
    parameters = (norm.weight, norm.bias)
    return levels_of(
        (x,),
        norm,
        twin_of(norm),
        lambda x: dlkit.functional.group_norm(x, groups, *parameters, EPS),
        lambda x: op(x, groups, *parameters, EPS),
    )


def _instance_norm(n: int) -> Levels:
    channels = max(1, min(n // 2, 32))
    x = leaf(1, channels, max(2, n // channels))
    norm, op = nn.InstanceNorm1d(channels, affine=True), dlkit_op("instance_norm")
    parameters = (norm.weight, norm.bias)
    return levels_of(
        (x,),
        norm,
        twin_of(norm),
        lambda x: dlkit.functional.instance_norm(x, None, None, *parameters),
        lambda x: op(x, None, None, *parameters, True, 0.1, EPS),
    )


# For `bench calls`.
CALLS = {
    "GroupNorm": _group_norm,
    "InstanceNorm1d": _instance_norm,
}
