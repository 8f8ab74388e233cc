"""Helpers that the kernels of several ops share."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

TRITON_TYPE = {torch.float32: tl.float32, torch.float64: tl.float64}


def accumulate_type(dtype: torch.dtype) -> torch.dtype:
    """The type in which statistics and sums of ``dtype`` are kept."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def dense(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """``tensor`` without gaps, as the kernels read arrays. A parameter may be any view."""
    return None if tensor is None else tensor.contiguous()


@triton.jit
def scalar(value, TYPE: tl.constexpr):
    """A float argument as a value of TYPE. A tl.float64 argument would turn a tile into fp64."""
    return tl.full([], value, TYPE)


@triton.jit
def multiply(a, b):
    """a * b, never fused with an addition after it: for kernels that must give the same bits."""
    return tl.fma(a, tl.broadcast_to(b, a.shape), tl.zeros(a.shape, a.dtype))


@triton.jit
def divide(numerator, denominator):
    """Correctly rounded, as an IEEE division is."""
    if numerator.dtype == tl.float64:
        return numerator / denominator
    else:
        return tl.div_rn(numerator, denominator)


@triton.jit
def inverse_root(variance):
    if variance.dtype == tl.float64:
        return 1.0 / tl.sqrt(variance)
    else:
        return tl.div_rn(1.0, tl.sqrt_rn(variance))
