"""Benchmark of cross_entropy: classes, label smoothing, probabilities, pixels, the layer, with a linear layer before
it.

Least bytes of N logits: forward N (reads them), backward 2N (reads them, writes the gradient); targets are int64, or N
more for probabilities. linear_cross_entropy, whose shape is (rows, features, classes), is bound by its three matrix
products; its bytes are those of input, weight and their gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import dlkit
from dlkit._ops import op as dlkit_op

from ._levels import Levels, leaf, levels_of, rows_of, twin_of
from ._runner import DIRECTIONS, DTYPES, Case, Contestant, Inputs, peer

SMOOTHING = 0.1
VARIANTS = ("cross_entropy", "smoothed", "probabilities", "CrossEntropyLoss", "linear_cross_entropy")
QUICK = ((128, 10), (256, 1000))
SMALL = ((1, 2), (16, 10), (128, 10), (64, 100), (512, 32), (16, 1000), (2, 21, 16, 16), (8, 5000))
LARGE = (
    (4096, 1000),
    (2048, 32000),
    (65536, 10),
    (16384, 100),
    (256, 1000),
    (32, 128000),
    (8, 21, 128, 128),
    (2, 150, 128, 128),
)


def cases(mode: str, device: str) -> list[Case]:
    both = DIRECTIONS[:2]
    if mode == "quick":
        found = [Case("cross_entropy", direction, shape, "fp32") for direction in both for shape in QUICK]
        found += [Case("cross_entropy", direction, QUICK[-1], "bf16") for direction in both]
        found += [Case(variant, "forward_backward", QUICK[-1], "fp32") for variant in ("smoothed", "probabilities")]
        return [
            *found,
            Case("cross_entropy", "forward_backward", (2, 21, 16, 16), "fp32"),
            Case("CrossEntropyLoss", "forward_backward", QUICK[0], "fp32"),
            Case("linear_cross_entropy", "forward_backward", (256, 64, 1000), "fp32"),
        ]
    if mode == "sweep":
        return [
            Case(variant, direction, shape, dtype)
            for variant in VARIANTS[:3]
            for direction in both
            for dtype in ("fp32", "bf16", "fp16", "fp64")
            for shape in SMALL + LARGE
            if variant == "cross_entropy" or shape in ((128, 10), (4096, 1000), (8, 21, 128, 128))
        ]
    large = ((4096, 1000), (2048, 32000))
    found = [Case("cross_entropy", direction, shape, "fp32") for direction in DIRECTIONS for shape in large]
    found += [Case("smoothed", "forward_backward", shape, "fp32") for shape in large]
    found += [Case("probabilities", "forward_backward", large[0], "fp32")]
    found += [Case("cross_entropy", direction, large[1], "bf16") for direction in DIRECTIONS]
    found += [Case("cross_entropy", "forward_backward", (8, 21, 128, 128), "fp32")]
    found += [Case("cross_entropy", "forward_backward", shape, "fp32") for shape in ((65536, 10), (16384, 100))]
    found += [Case("CrossEntropyLoss", "forward_backward", shape, "fp32") for shape in ((1, 2), (128, 10))]
    found += [Case("linear_cross_entropy", "forward_backward", (2048, 512, 32000), "fp32")]
    return found


def memory_cases(device: str) -> list[Case]:
    return [
        Case("cross_entropy", "forward_backward", (2048, 8000), "fp32"),
        Case("smoothed", "forward_backward", (2048, 8000), "fp32"),
        Case("linear_cross_entropy", "forward_backward", (2048, 512, 32000), "fp32"),
    ]


def _is_linear(case: Case) -> bool:
    return case.variant == "linear_cross_entropy"


def _sizes(case: Case) -> tuple[int, int]:
    """(rows, classes)."""
    classes = case.shape[2] if _is_linear(case) else case.shape[1]
    return case.shape[0] if _is_linear(case) else case.numel // classes, classes


def _smoothing(case: Case) -> float:
    return SMOOTHING if case.variant == "smoothed" else 0.0


def inputs(case: Case, device: str, generator: torch.Generator) -> Inputs:
    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).mul_(scale).to(DTYPES[case.dtype])

    rows, classes = _sizes(case)
    logits = [normal(*case.shape[:2])] if _is_linear(case) else [normal(*case.shape, scale=2.0)]
    if _is_linear(case):
        logits.append(normal(classes, case.shape[1], scale=0.05))
    if case.variant == "probabilities":
        target = normal(*case.shape).float().softmax(1).to(DTYPES[case.dtype])
    else:
        sizes = (rows,) if _is_linear(case) else (case.shape[0], *case.shape[2:])
        target = torch.randint(0, classes, sizes, generator=generator, device=device)
    # Gradients of a mean would underflow fp16: there the loss is scaled, as by a GradScaler.
    grad_output = normal(1, scale=1024.0 if case.dtype == "fp16" else 1.0)[0]
    return Inputs((*(t.requires_grad_() for t in logits), target), (grad_output,))


def _unfused(cross_entropy: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def function(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(nn.functional.linear(x, weight), target)

    return function


def contestants(case: Case, device: str) -> dict[str, Contestant]:
    from dlkit import functional as dlkit_functional
    from dlkit import nn as dlkit_nn

    if case.variant == "CrossEntropyLoss":
        return {"native": lambda *t: (nn.CrossEntropyLoss(), t), "dlkit": lambda *t: (dlkit_nn.CrossEntropyLoss(), t)}
    if _is_linear(case):
        native = _unfused(nn.functional.cross_entropy)
        return {"native": lambda *t: (native, t), "dlkit": lambda *t: (dlkit_functional.linear_cross_entropy, t)}

    def options(*tensors: Tensor) -> tuple[Any, ...]:
        return (*tensors, None, None, -100, None, "mean", _smoothing(case))

    found: dict[str, Contestant] = {
        "native": lambda *t: (nn.functional.cross_entropy, options(*t)),
        "dlkit": lambda *t: (dlkit_functional.cross_entropy, options(*t)),
    }
    if device == "cuda" and case.dtype != "fp64" and case.variant != "probabilities" and len(case.shape) == 2:
        found["liger"] = peer("liger_kernel.transformers.functional", "liger_cross_entropy", options)
    return found


def reference(case: Case) -> Callable[..., Any]:
    def formula(x: Tensor, *others: Tensor) -> Tensor:
        if _is_linear(case):
            x = x @ others[0].t()
        target, classes = others[-1], x.shape[1]
        log_softmax = x - x.logsumexp(1, keepdim=True)
        if case.variant == "probabilities":
            return -(log_softmax * target).sum(1).mean()
        picked = log_softmax.gather(1, target.unsqueeze(1)).mean()
        return -(1 - _smoothing(case)) * picked - _smoothing(case) / classes * log_softmax.sum(1).mean()

    return formula


def tolerances(case: Case) -> Sequence[float]:
    # Four steps of the dtype, and sums of exponentials and of losses; logits of a linear layer are rounded themselves.
    dtype = DTYPES[case.dtype]
    accumulate = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    rows, classes = _sizes(case)
    step = (64 if _is_linear(case) else 8) * torch.finfo(dtype).eps
    outputs = [step + accumulate * rows**0.5]
    gradients = [step + accumulate * classes**0.5] * (1 + _is_linear(case))
    return {"forward": outputs, "backward": gradients, "forward_backward": outputs + gradients}[case.direction]


def minimal_bytes(case: Case) -> int:
    rows, classes = _sizes(case)
    if _is_linear(case):
        features = case.shape[1]
        return 3 * features * (rows + classes) * case.itemsize
    targets = case.numel * case.itemsize if case.variant == "probabilities" else 8 * rows
    forward = case.numel * case.itemsize + targets
    backward = 2 * case.numel * case.itemsize + targets
    return {"forward": forward, "backward": backward, "forward_backward": forward + backward}[case.direction]


def _cross_entropy(n: int) -> Levels:
    x = leaf(*rows_of(n))
    target, op = torch.randint(0, x.shape[1], x.shape[:1]), dlkit_op("cross_entropy")
    native = nn.CrossEntropyLoss()
    twin = twin_of(native)
    return levels_of(
        (x,),
        lambda x: native(x, target),
        lambda x: twin(x, target),
        lambda x: dlkit.functional.cross_entropy(x, target),
        lambda x: op(x, target, None, 1, -100, 0.0, 0.0, 0.0, False)[0],
    )


# For `bench calls`.
CALLS = {
    "CrossEntropyLoss": _cross_entropy,
}
