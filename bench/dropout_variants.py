"""Benchmark of dropout's variants: whole channels, alpha, whole samples, blocks.

Native is users' code: torch's own op where there is one, and for DropPath and DropBlock the code of timm and
torchvision. Masks differ between contestants: the check is of the values of kept elements and of their number.

Least bytes of N elements: 2N either way (read x, write y); whole channels or samples that are dropped need not be read,
which the floor does not count. DropBlock must know how many elements it keeps before it writes the first: that is a
count over bits, not over the tensor, and its floor is 2N too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ._runner import DIRECTIONS, DTYPES, Case, Contestant, Inputs

P = {"drop_path": 0.1, "dropblock2d": 0.1}  # 0.5 else
BLOCK = 7
FUNCTIONS = ("dropout2d", "alpha_dropout", "feature_alpha_dropout", "drop_path", "dropblock2d")
LAYOUTS = ("contiguous", "channels_last")
SATURATED = -1.7580993408473766
IMAGES = ((64, 256, 28, 28), (8, 64, 14, 14))


def cases_of(variant: str, direction: str, shape: tuple[int, ...], dtype: str) -> list[Case]:
    return [Case(variant, direction, shape, dtype, layout) for layout in LAYOUTS]


def cases(mode: str, device: str) -> list[Case]:
    both = DIRECTIONS[:2]
    if mode == "quick":
        images = IMAGES[1:] if device == "cpu" else IMAGES
        chosen = [(variant, way, shape, "fp32") for variant in FUNCTIONS for way in both for shape in images]
        chosen += [("dropout2d", "forward_backward", (4, 16, 8, 8), "bf16")]
        return [case for one in chosen for case in cases_of(*one)]
    shapes = IMAGES if mode == "default" else (*IMAGES, (2, 3, 4, 4), (16, 512, 7, 7), (128, 64, 56, 56))
    dtypes = ("fp32", "bf16") if mode == "default" else ("fp32", "bf16", "fp16", "fp64")
    chosen = [
        (variant, way, shape, dtype) for variant in FUNCTIONS for way in both for shape in shapes for dtype in dtypes
    ]
    return [case for one in chosen for case in cases_of(*one)]


def memory_cases(device: str) -> list[Case]:
    variants = ("dropout", *FUNCTIONS)
    return [Case(variant, "forward_backward", (64, 64, 28, 28), "fp32", "contiguous") for variant in variants]


def _p(case: Case) -> float:
    return P.get(case.variant, 0.5)


def inputs(case: Case, device: str, generator: torch.Generator) -> Inputs:
    dtype = DTYPES[case.dtype]

    def normal() -> Tensor:
        values = torch.randn(case.shape, generator=generator, device=device, dtype=dtype)
        # Away from 0, which marks a dropped element.
        values = values + values.sign() * 0.25
        return values.contiguous(memory_format=case.memory_format)

    return Inputs((normal().requires_grad_(),), (normal(),))


def _native_drop_path(x: Tensor, p: float) -> Tensor:
    return x * x.new_empty((len(x), *[1] * (x.dim() - 1))).bernoulli_(1 - p).div_(1 - p)


def _native_dropblock2d(x: Tensor, p: float) -> Tensor:
    samples, channels, height, width = x.shape
    size = min(BLOCK, height, width)
    rows, columns = height - size + 1, width - size + 1
    gamma = p * height * width / (size**2 * rows * columns)
    noise = x.new_empty((samples, channels, rows, columns)).bernoulli_(gamma)
    noise = nn.functional.pad(noise, [size - 1] * 4)
    noise = 1 - nn.functional.max_pool2d(noise, size, 1)
    return x * noise * (noise.numel() / (1e-6 + noise.sum(dtype=torch.float32))).to(x.dtype)


def contestants(case: Case, device: str) -> dict[str, Contestant]:
    from dlkit import functional as fused

    p = _p(case)

    def bound(function: Callable[..., Any], *arguments: Any) -> Contestant:
        return lambda x: (function, (x, *arguments))

    if case.variant == "dropblock2d":
        return {"native": bound(_native_dropblock2d, p), "dlkit": bound(fused.dropblock2d, p, BLOCK)}
    if case.variant == "drop_path":
        return {"native": bound(_native_drop_path, p), "dlkit": bound(fused.drop_path, p)}
    training = (p, True)
    return {
        "native": bound(getattr(nn.functional, case.variant), *training),
        "dlkit": bound(getattr(fused, case.variant), *training),
    }


def _form(case: Case) -> tuple[float, float, float]:
    """(scale, shift) of kept elements and the value of dropped ones; DropBlock's scale is known only with its mask."""
    p = _p(case)
    if case.variant == "dropblock2d":
        return 1.0, 0.0, 0.0
    if not case.variant.endswith("alpha_dropout"):
        return 1 / (1 - p), 0.0, 0.0
    scale = 1 / math.sqrt((SATURATED**2 * p + 1) * (1 - p))
    return scale, -SATURATED * scale * p, SATURATED * scale * (1 - p)


def reference(case: Case) -> Callable[..., Any]:
    """The op without dropping."""
    scale, shift, _ = _form(case)
    return lambda x: x * scale + shift


def settled(case: Case, inputs: Inputs) -> Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """Puts the reference's values where something was dropped; NaN everywhere if too much or too little was."""
    scale, shift, dropped_value = _form(case)
    dtype = DTYPES[case.dtype]
    # Value and gradient of each element if it is kept, and if it is dropped.
    value = (inputs.tensors[0].detach().double() * scale + shift, dropped_value)
    gradient = (inputs.grad_outputs[0].double() * scale, 0.0)
    kinds = {"forward": [value], "backward": [gradient], "forward_backward": [value, gradient]}[case.direction]

    def settle(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(one(output.detach(), *kind) for output, kind in zip(outputs, kinds, strict=True))

    def one(output: Tensor, kept: Tensor, constant: float) -> Tensor:
        gone = (output.double() - constant).abs() <= 4 * torch.finfo(dtype).eps
        share = gone.double().mean().item()
        # The number of independent draws, and the allowed deviation of the dropped share.
        draws = {"drop_path": case.shape[0], "alpha_dropout": case.numel}.get(
            case.variant, case.shape[0] * case.shape[1]
        )
        p = _p(case)
        if abs(share - p) > 6 * math.sqrt(p * (1 - p) / draws) + 0.02:
            return torch.full_like(output, math.nan)
        if case.variant == "dropblock2d":
            output = (output.double() * (1 - share)).to(dtype)
        return torch.where(gone, kept.to(dtype), output)

    return settle


def tolerances(case: Case) -> Sequence[float]:
    outputs = [4 * torch.finfo(DTYPES[case.dtype]).eps]
    return outputs * (2 if case.direction == "forward_backward" else 1)


def minimal_bytes(case: Case) -> int:
    return 2 * case.numel * case.itemsize * (2 if case.direction == "forward_backward" else 1)
