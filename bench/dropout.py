"""Benchmark of dropout: plain, through the module, in one pass with a residual add and a norm after it, and after a
bias and GELU or ReLU.

Masks differ between contestants. Each one's is read from its own outputs, the right results for that mask are computed
in float64, the difference is its error, and its mask must drop about p.

Least bytes of N elements: dropout 2N either way; with the add forward 3N, backward 2N (the residual's gradient is the
output's own); with the norm 4N forward (read two, write sum and result) and 5N backward (read grad_output, grad_sum and
the sum, write two); after an activation 2N forward and 3N backward.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dlkit
from dlkit._ops import op as dlkit_op

from ._levels import Levels, leaf, levels_of, rows_of, twin_of
from ._levels import P as CALL_P
from ._runner import DIRECTIONS, DTYPES, Case, Contestant, Inputs

P, EPS = 0.3, 1e-5
NORMS = ("dropout_add_layer_norm", "dropout_add_rms_norm")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "bias_gelu_dropout": nn.functional.gelu,
    "bias_relu_dropout": nn.functional.relu,
}
FUNCTIONS = ("dropout", "dropout_add", *NORMS, *ACTIVATIONS)
LARGE = (8192, 4096)
QUICK = ((16, 64), (256, 1024), (2048, 1024))


def cases(mode: str, device: str) -> list[Case]:
    both = DIRECTIONS[:2]
    if mode == "quick":
        sizes = QUICK if device == "cpu" else (*QUICK, LARGE)
        found = [Case("dropout", way, shape, dtype) for dtype in ("fp32", "bf16") for way in both for shape in sizes]
        found += [Case(variant, way, QUICK[-1], "fp32") for variant in FUNCTIONS[1:] for way in both]
        return [
            *found,
            Case("dropout", "backward", (128, 65), "bf16"),
            Case("Dropout", "forward_backward", (16, 64), "fp64"),
            Case("dropout_add", "forward_backward", (16, 64), "fp32"),
            Case("dropout_add_layer_norm", "forward", (64, 64), "fp32"),
            Case("dropout_add_rms_norm", "backward", (64, 64), "bf16"),
        ]
    found = [Case("dropout", way, LARGE, dtype) for way in both for dtype in ("fp32", "bf16")]
    found += [Case("Dropout", way, (128, 128), "fp32") for way in ("forward", "forward_backward")]
    found += [Case("dropout_add", way, LARGE, "fp32") for way in both]
    found += [Case(NORMS[0], way, LARGE, dtype) for way in both for dtype in ("fp32", "bf16")]
    found += [Case(NORMS[1], way, LARGE, "fp32") for way in both]
    found += [Case(NORMS[0], way, (2048, 768), "fp32") for way in both]
    found += [
        Case(variant, way, (4096, 3072), dtype) for variant in ACTIVATIONS for way in both for dtype in ("fp32", "bf16")
    ]
    if mode == "sweep":
        shapes = ((4, 16), (128, 128), (1024, 128), (1000, 1003), (2048, 1024), (8192, 1024))
        found += [
            Case(variant, way, shape, dtype)
            for variant in FUNCTIONS
            for way in both
            for shape in shapes
            for dtype in ("fp32", "bf16", "fp16", "fp64")
        ]
    return found


def memory_cases(device: str) -> list[Case]:
    return [Case(variant, "forward_backward", (2048, 1024), "fp32") for variant in FUNCTIONS]


def _tensors(case: Case) -> int:
    """Inputs of the case's shape."""
    return 1 if case.variant in ("dropout", "Dropout", *ACTIVATIONS) else 2


def _has_bias(case: Case) -> bool:
    return case.variant == "dropout_add_layer_norm"


def _parameters(case: Case) -> int:
    return 1 + _has_bias(case) if case.variant in NORMS else int(case.variant in ACTIVATIONS)


def inputs(case: Case, device: str, generator: torch.Generator) -> Inputs:
    dtype = DTYPES[case.dtype]

    def normal(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=generator, device=device, dtype=dtype)
        return values + values.sign() * 0.25  # away from 0, which marks a dropped element

    tensors: list[Tensor] = [normal(*case.shape).requires_grad_() for _ in range(_tensors(case))]
    tensors += [nn.Parameter(normal(case.shape[-1])) for _ in range(_parameters(case))]
    outputs = 2 if case.variant in NORMS else 1
    return Inputs(tuple(tensors), tuple(normal(*case.shape) for _ in range(outputs)))


def _native_add(x: Tensor, residual: Tensor) -> Tensor:
    return nn.functional.dropout(x, P) + residual


def _native_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    total = nn.functional.dropout(x, P) + residual
    return nn.functional.layer_norm(total, x.shape[-1:], weight, bias, EPS), total


def _native_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = nn.functional.dropout(x, P) + residual
    return nn.functional.rms_norm(total, x.shape[-1:], weight, EPS), total


def _native_activation(activation: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda x, bias: nn.functional.dropout(activation(x + bias), P)


def contestants(case: Case, device: str) -> dict[str, Contestant]:
    from dlkit import functional as fused
    from dlkit import nn as fused_nn

    def plain(function: Callable[..., Any], *arguments: Any) -> Contestant:
        return lambda *tensors: (function, (*tensors, *arguments))

    def norm(function: Callable[..., Any]) -> Contestant:
        def call(x: Tensor, residual: Tensor, *parameters: Tensor) -> Any:
            return function(x, residual, x.shape[-1:], *parameters, p=P, eps=EPS, prenorm=True)

        return plain(call)

    pairs: dict[str, tuple[Contestant, Contestant]] = {
        "dropout": (plain(nn.functional.dropout, P), plain(fused.dropout, P)),
        "Dropout": (plain(nn.Dropout(P)), plain(fused_nn.Dropout(P))),
        "dropout_add": (plain(_native_add), plain(fused.dropout_add, P)),
        "dropout_add_layer_norm": (plain(_native_layer_norm), norm(fused.dropout_add_layer_norm)),
        "dropout_add_rms_norm": (plain(_native_rms_norm), norm(fused.dropout_add_rms_norm)),
    }
    for name, activation in ACTIVATIONS.items():
        pairs[name] = (plain(_native_activation(activation)), plain(getattr(fused, name), P))
    native, ours = pairs[case.variant]
    return {"native": native, "dlkit": ours}


def _formula(case: Case, keep: Tensor | None) -> Callable[..., Any]:
    def formula(x: Tensor, *others: Tensor) -> Any:
        if case.variant in ACTIVATIONS:
            x, others = ACTIVATIONS[case.variant](x + others[0]), ()
        total = x / (1 - P) if keep is None else torch.where(keep, x / (1 - P), 0)
        if others:
            total = total + others[0]
        if case.variant not in NORMS:
            return total
        centred = total - total.mean(-1, keepdim=True) if _has_bias(case) else total
        y = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + EPS) * others[1]
        return (y + others[2] if _has_bias(case) else y), total

    return formula


def reference(case: Case) -> Callable[..., Any]:
    """The op without dropping."""
    return _formula(case, None)


def settled(case: Case, inputs: Inputs) -> Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """Gives each output's reference for its mask; NaN everywhere if too much or too little was dropped."""

    def results(keep: Tensor | None) -> tuple[Tensor, ...]:
        leaves = [tensor.detach().double().requires_grad_() for tensor in inputs.tensors]
        with torch.enable_grad():
            found = _formula(case, keep)(*leaves)
        outputs = found if isinstance(found, tuple) else (found,)
        gradients: tuple[Tensor, ...] = ()
        if case.direction != "forward":
            gradients = torch.autograd.grad(outputs, leaves, [grad.double() for grad in inputs.grad_outputs])
        return {"forward": outputs, "backward": gradients, "forward_backward": (*outputs, *gradients)}[case.direction]

    plain = results(None)

    def with_cancelled(keep: Tensor, gradient: Tensor) -> Tensor:
        """`keep` and what was kept though its gradient cancelled to 0: one in some 10^8, known by the residual's."""
        doubtful = ~keep & (gradient == 0)
        if not doubtful.any():
            return keep
        misses = [
            (results(mask)[1 - len(inputs.tensors)].detach() - gradient).abs().amax(-1, keepdim=True)
            for mask in (keep, keep | doubtful)
        ]
        return keep | (doubtful & (misses[1] < misses[0]))

    def settle(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        # The mask is read from the sum or from the gradient of x: a dropped element leaves the residual there, or 0.
        if case.direction == "forward":
            read, nothing = -1, inputs.tensors[1].detach() if _tensors(case) > 1 else 0
        else:
            read, nothing = -len(inputs.tensors), 0
        keep = outputs[read].detach() != nothing
        if case.direction != "forward" and case.variant in NORMS:
            keep = with_cancelled(keep, outputs[1 - len(inputs.tensors)].detach())
        shows = plain[read].detach() != nothing  # not where ReLU leaves nothing to drop
        share = 1 - keep[shows].double().mean().item()
        keep |= ~shows
        if abs(share - P) > 6 * math.sqrt(P * (1 - P) / shows.sum().item()) + 0.005:  # sums that rounding left as is
            return tuple(torch.full_like(output, math.nan) for output in outputs)
        exact = results(keep)
        return tuple(
            (output.detach().double() - wanted.detach() + none.detach()).to(output.dtype)
            for output, wanted, none in zip(outputs, exact, plain, strict=True)
        )

    return settle


def tolerances(case: Case) -> Sequence[float]:
    # A few steps of the dtype, and a sum of n accumulated values whose rounding errors add up like a random walk.
    dtype = DTYPES[case.dtype]
    accumulate = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    rows, cols = case.numel // case.shape[-1], case.shape[-1]
    over_row, over_rows = (4 * torch.finfo(dtype).eps + accumulate * count**0.5 for count in (cols, rows))
    outputs = [over_row] * (2 if case.variant in NORMS else 1)
    gradients = [over_row] * _tensors(case) + [over_rows] * _parameters(case)
    return {"forward": outputs, "backward": gradients, "forward_backward": outputs + gradients}[case.direction]


def minimal_bytes(case: Case) -> int:
    forward, backward = (2, 3) if case.variant in ACTIVATIONS else (2, 2)
    if _tensors(case) > 1:
        forward, backward = (4, 5) if case.variant in NORMS else (3, 2)
    tensors = {"forward": forward, "backward": backward, "forward_backward": forward + backward}[case.direction]
    return tensors * case.numel * case.itemsize


def _dropout(n: int, cls: type[nn.Module], name: str, mask_ndim: int, alpha: bool) -> Levels:
    x = leaf(*rows_of(n)) if mask_ndim == -1 else leaf(1, *rows_of(n))
    native, function = cls(CALL_P), getattr(dlkit.functional, name)
    op = dlkit_op("dropout")
    return levels_of(
        (x,),
        native,
        twin_of(native),
        lambda x: function(x, CALL_P, True),
        lambda x: op(x, CALL_P, mask_ndim, alpha, None, None),
    )


def _dropout_add(n: int) -> Levels:
    x, residual = leaf(*rows_of(n)), leaf(*rows_of(n))
    op = dlkit_op("dropout_add")
    return levels_of(
        (x, residual),
        lambda x, residual: F.dropout(x, CALL_P) + residual,
        dlkit.nn.DropoutAdd(CALL_P),
        lambda x, residual: dlkit.functional.dropout_add(x, residual, CALL_P),
        lambda x, residual: op(x, residual, CALL_P, None, None),
    )


# For `bench calls`.
CALLS = {
    "Dropout": functools.partial(_dropout, cls=nn.Dropout, name="dropout", mask_ndim=-1, alpha=False),
    "Dropout1d": functools.partial(_dropout, cls=nn.Dropout1d, name="dropout1d", mask_ndim=2, alpha=False),
    "AlphaDropout": functools.partial(_dropout, cls=nn.AlphaDropout, name="alpha_dropout", mask_ndim=-1, alpha=True),
    "DropoutAdd": _dropout_add,
}
