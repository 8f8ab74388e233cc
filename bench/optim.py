"""Benchmark of the optimizers: whole step() calls with few large parameters, with many small ones, with clipping.

A case's shape is pairs of a count and a size: 100x64x100x4096 is 100 parameters of 64 elements and 100 of 4,096. native
is torch's default (a loop over parameters on a CPU). Least bytes a parameter: AdamW reads 4 words and writes 3, SGD
reads 2 and writes 1, momentum and RMSprop's average add one each way, and the norm reads the gradient once more.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import dlkit

from ._levels import Levels
from ._runner import DTYPES, Case, Contestant, Inputs

MAX_NORM = 1.0
COMPILED_PER_SET = True  # an optimizer holds its parameters: torch.compile would compile for each set of inputs
OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {  # variant: class, arguments
    "AdamW": ("AdamW", {}),
    "AdamW_clip": ("AdamW", {}),
    "AdamW_amsgrad": ("AdamW", {"amsgrad": True}),
    "Adam": ("Adam", {"weight_decay": 0.01}),
    "SGD": ("SGD", {}),
    "SGD_momentum": ("SGD", {"momentum": 0.9}),
    "RMSprop": ("RMSprop", {}),
}
# bitsandbytes has no kernel for SGD without momentum and for amsgrad. Its SGD has no default rate; torch's is 1e-3.
BITSANDBYTES: dict[str, dict[str, Any]] = {
    "AdamW": {},
    "AdamW_clip": {},
    "Adam": {},
    "SGD_momentum": {"lr": 1e-3},
    "RMSprop": {},
}
WORDS = {"AdamW": 7, "AdamW_clip": 8, "AdamW_amsgrad": 9, "Adam": 7, "SGD": 3, "SGD_momentum": 5, "RMSprop": 5}
LARGE = (24, 1 << 20)
MIXED = (100, 64, 100, 4096)
# One layer of width 768: attention and MLP matrices, biases and two norms, twelve times, and an embedding.
TRANSFORMER = (12, 768 * 2304, 12, 768 * 768, 24, 768 * 3072, 12, 2304, 12, 3072, 72, 768, 1, 50304 * 768)
QUICK = ((1, 64), (10, 1000), (4, 1 << 19))
SWEEP = (
    (1, 1),
    (1, 4096),
    (1, 1 << 18),
    (1, 1 << 22),
    (1, 1 << 26),
    (100, 1),
    (100, 1000),
    (100, 1 << 16),
    (1000, 1),
    (1000, 4096),
    (10000, 1),
    (10000, 1000),
)


def _sizes(case: Case) -> Iterator[int]:
    for count, size in zip(case.shape[::2], case.shape[1::2], strict=True):
        for _ in range(count):
            yield size


def elements(case: Case) -> int:
    return sum(_sizes(case))


def cases(mode: str, device: str) -> list[Case]:
    if mode == "quick":
        shapes = QUICK if device == "cpu" else (*QUICK, LARGE)
        found = [Case("AdamW", "forward", shape, dtype) for dtype in ("fp32", "bf16") for shape in shapes]
        found += [Case(variant, "forward", QUICK[-1], "fp32") for variant in ("AdamW_clip", "SGD_momentum", "RMSprop")]
        return [
            *found,
            Case("AdamW_clip", "forward", (3, 65), "bf16"),
            Case("SGD_momentum", "forward", (2, 1), "fp64"),
            Case("RMSprop", "forward", (2, 300), "fp32"),
        ]
    if mode == "sweep":
        found = [Case("AdamW", "forward", shape, dtype) for shape in SWEEP for dtype in ("fp32", "bf16")]
        found += [Case(variant, "forward", shape, "fp32") for variant in ("SGD", "RMSprop") for shape in SWEEP[::2]]
        return found
    found = [Case(variant, "forward", LARGE, "fp32") for variant in OPTIMIZERS]
    found += [Case(variant, "forward", LARGE, "bf16") for variant in ("AdamW", "AdamW_clip", "SGD_momentum")]
    found += [Case(variant, "forward", MIXED, "fp32") for variant in ("AdamW", "AdamW_clip", "SGD_momentum", "RMSprop")]
    if device == "cuda":
        found += [Case("AdamW", "forward", (100, 1 << 20), dtype) for dtype in ("fp32", "bf16")]
        found += [Case(variant, "forward", TRANSFORMER, "fp32") for variant in ("AdamW", "AdamW_clip")]
    return found


def memory_cases(device: str) -> list[Case]:
    return []


def inputs(case: Case, device: str, generator: torch.Generator) -> Inputs:
    """Parameters, then gradients."""
    dtype = DTYPES[case.dtype]
    draw = [
        tuple(torch.randn(size, generator=generator, device=device, dtype=dtype) for _ in range(2))
        for size in _sizes(case)
    ]
    params, grads = zip(*draw, strict=True)
    return Inputs((*params, *grads), params)


def _step(case: Case, library: Any, **arguments: Any) -> Contestant:
    name, shared = OPTIMIZERS[case.variant]
    clips = case.variant.endswith("_clip")
    fused_clip = library.__name__ == "dlkit.optim"
    if clips and fused_clip:
        arguments["max_norm"] = MAX_NORM

    def bind(*tensors: Tensor) -> tuple[Callable[[], Any], tuple[()]]:
        half = len(tensors) // 2
        params = [tensor.detach().clone().requires_grad_() for tensor in tensors[:half]]
        for param, grad in zip(params, tensors[half:], strict=True):
            param.grad = grad.clone()
        optimizer = getattr(library, name)(params, **shared, **arguments)
        results = tuple(params)

        def run() -> tuple[Tensor, ...]:
            if clips and not fused_clip:
                torch.nn.utils.clip_grad_norm_(params, MAX_NORM)
            optimizer.step()
            return results

        return run, ()

    return bind


def contestants(case: Case, device: str) -> dict[str, Contestant]:
    from dlkit import optim

    found = {"native": _step(case, torch.optim), "foreach": _step(case, torch.optim, foreach=True)}
    if not case.variant.startswith("RMSprop"):
        found["fused"] = _step(case, torch.optim, fused=True)
    found["dlkit"] = _step(case, optim)
    if device == "cuda" and case.dtype != "fp64" and case.variant in BITSANDBYTES:
        # Imported when it is first called: a failure to load is then only its own error.
        found["bitsandbytes"] = lambda *tensors: _step(
            case, importlib.import_module("bitsandbytes.optim"), **BITSANDBYTES[case.variant]
        )(*tensors)
    return found


def reference(case: Case) -> Callable[..., Any]:
    def formula(*tensors: Tensor) -> tuple[Tensor, ...]:
        run, _ = _step(case, torch.optim)(*tensors)
        results: tuple[Tensor, ...] = run()
        return results

    return formula


def tolerances(case: Case) -> Sequence[float]:
    # Relative to a parameter's largest value: a few steps of the dtype, since SGD adds a gradient as large as the
    # parameter.
    return [4 * torch.finfo(DTYPES[case.dtype]).eps] * sum(1 for _ in _sizes(case))


def minimal_bytes(case: Case) -> int:
    return WORDS[case.variant] * elements(case) * case.itemsize


def _optimizer(n: int, name: str, options: dict[str, Any]) -> Levels:
    steps = []
    for library in (torch.optim, dlkit.optim):
        parameter = nn.Parameter(torch.randn(n))
        parameter.grad = torch.randn(n)
        steps.append(getattr(library, name)([parameter], lr=1e-5, **options).step)
    native, mine = steps
    return Levels([], native, mine, None, None)


def _clip(n: int) -> Levels:
    parameter = nn.Parameter(torch.randn(n))
    parameter.grad = torch.randn(n)
    native, mine = (
        functools.partial(function, [parameter], 1e3)
        for function in (nn.utils.clip_grad_norm_, dlkit.optim.clip_grad_norm_)
    )
    return Levels([], native, None, mine, None)


# For `bench calls`.
CALLS = {
    "SGD": functools.partial(_optimizer, name="SGD", options={"momentum": 0.9}),
    "Adam": functools.partial(_optimizer, name="Adam", options={}),
    "AdamW": functools.partial(_optimizer, name="AdamW", options={}),
    "RMSprop": functools.partial(_optimizer, name="RMSprop", options={}),
    "clip_grad_norm_": _clip,
}
