"""Cross entropy in Triton, over the contract of csrc/cross_entropy/kernel.h.

A program has a tile of rows and classes: few rows and up to 4096 classes where classes lie side by side, 128 pixels and
8 classes where they do not. Forward walks the classes with a running maximum, so each logit is read once; backward
reads and writes once. A row's factors are computed in fp64 and rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import TRITON_TYPE, accumulate_type

# Strides are specialised: Triton makes wide accesses only if it knows them to be multiples of 16.
_jit = triton.jit(do_not_specialize=["rows", "ignored"])


@triton.jit
def _capped(x, cap):
    """cap * tanh(x / cap) and its derivative, which 1 - tanh^2 would lose for a large x."""
    u = x / cap
    e = tl.exp(-2.0 * tl.abs(u))
    large = tl.where(u < 0, -1.0, 1.0) * (1.0 - e) / (1.0 + e)
    s = u * u
    p = -3.927832388331683e-05 + s * (1.5918905069328964e-05 - 6.451689215655431e-06 * s)
    p = 0.000590027440945586 + s * (-0.00023912911424355248 + s * (9.691537956929451e-05 + s * p))
    p = -0.008863235529902197 + s * (0.003592128036572481 + s * (-0.0014558343870513183 + s * p))
    p = -0.05396825396825397 + s * (0.021869488536155203 + s * p)
    small = u + u * s * (-0.3333333333333333 + s * (0.13333333333333333 + s * p))
    near = tl.abs(u) < 0.3
    derivative = tl.where(near, 1.0 - small * small, 4.0 * e / ((1.0 + e) * (1.0 + e)))
    return tl.where(near, small, large) * cap, derivative


@triton.jit
def _place(row, classes, inner, stride, PIXELS: tl.constexpr):
    """Where a row begins, and the distance of its classes."""
    if PIXELS:
        return row // inner * inner * classes + row % inner, inner
    else:
        return row * stride, 1


@triton.jit
def _shares(
    probabilities, weight, row, classes, inner, column, inside, keep, smooth, PIXELS: tl.constexpr, ACC: tl.constexpr
):
    """u_c of kernel.h without the part of the target; for classes without its factor either."""
    if probabilities is None:
        u = tl.where(inside, 1.0, 0.0).to(ACC)
    else:
        base, step = _place(row, classes, inner, classes, PIXELS)
        u = (
            tl.load(probabilities + base[:, None] + column[None, :] * step, mask=inside, other=0).to(ACC) * keep
            + smooth
        )
    if weight is not None:
        u *= tl.load(weight + column, mask=tl.max(inside.to(tl.int32), 0) > 0, other=0)[None, :].to(ACC)
    return tl.where(inside, u, 0.0)


@triton.jit
def _targets(target, row, live, classes, ignored):
    """(class, whether the row counts). A wrong class stops the kernel as torch's does, and is not followed."""
    t = tl.load(target + row, mask=live, other=0)
    right = (t >= 0) & (t < classes)
    tl.device_assert(right | (t == ignored) | (live == 0), "cross_entropy: a target is out of range")
    return tl.where(right, t, 0), live & right & (t != ignored)


@_jit
def _losses(
    x, target, probabilities, weight, losses, squares, maxima, sums, masses,
    rows: tl.int64, classes: tl.int64, inner: tl.int64, stride: tl.int64, ignored: tl.int64,
    keep, smooth, z_scale, cap,
    DOTS: tl.constexpr, CAP: tl.constexpr, PIXELS: tl.constexpr, ACC: tl.constexpr, P: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * P + tl.arange(0, P)
    live = row < rows
    base, step = _place(row, classes, inner, stride, PIXELS)
    largest = tl.full((P,), -float("inf"), ACC)
    total = tl.zeros((P,), ACC)
    dot = tl.zeros((P,), ACC)
    mass = tl.zeros((P,), ACC)
    for begin in range(0, classes, K):
        column = begin + tl.arange(0, K).to(tl.int64)
        inside = live[:, None] & (column < classes)[None, :]
        v = tl.load(x + base[:, None] + column[None, :] * step, mask=inside, other=-float("inf")).to(ACC)
        if CAP:
            v = tl.where(inside, _capped(v, cap)[0], -float("inf"))
        before = tl.where(largest == -float("inf"), 0.0, largest)
        largest = tl.maximum(largest, tl.max(v, 1))
        shift = tl.where(largest == -float("inf"), 0.0, largest)
        grown = before - shift
        d = v - shift[:, None]
        total = tl.where(total > 0, total * tl.exp(grown), total) + tl.sum(tl.exp(d), 1)
        if DOTS:
            u = _shares(probabilities, weight, row, classes, inner, column, inside, keep, smooth, PIXELS, ACC)
            dot = tl.where(mass != 0, dot + mass * grown, dot) + tl.sum(tl.where(inside, u * d, 0.0), 1)
            mass += tl.sum(u, 1)
    log = tl.log(total)
    if target is None:
        loss = mass * log - dot
        counts = live
        tl.store(masses + row, mass, mask=live)
    else:
        t, counts = _targets(target, row, live, classes, ignored)
        at_target = tl.load(x + base + t * step, mask=counts, other=0).to(ACC)
        if CAP:
            at_target = _capped(at_target, cap)[0]
        hit = tl.zeros((P,), ACC) + keep
        if weight is not None:
            hit *= tl.load(weight + t, mask=counts, other=0).to(ACC)
        loss = (log - (at_target - largest)) * hit
        if DOTS:
            loss += (mass * log - dot) * smooth
    if squares is not None:
        lse = largest.to(tl.float64) + log.to(tl.float64)
        square = (lse * lse * z_scale).to(ACC)
        tl.store(squares + row, tl.where(counts, square, 0.0), mask=live)
        loss += square
    tl.store(losses + row, tl.where(counts, loss, 0.0), mask=live)
    tl.store(maxima + row, largest, mask=live)
    tl.store(sums + row, total, mask=live)


@_jit
def _backward(
    x, target, probabilities, weight, grad_loss, maxima, sums, masses, totals, weights, grad_input,
    rows: tl.int64, classes: tl.int64, inner: tl.int64, stride: tl.int64, grad_stride: tl.int64, ignored: tl.int64,
    keep, smooth, z_scale, cap,
    EACH: tl.constexpr, SHARES: tl.constexpr, CAP: tl.constexpr, Z: tl.constexpr, PIXELS: tl.constexpr,
    ACC: tl.constexpr, P: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * P + tl.arange(0, P)
    live = row < rows
    largest = tl.load(maxima + row, mask=live, other=0)
    inverse = 1.0 / tl.load(sums + row, mask=live, other=1).to(tl.float64)
    grad = tl.load(grad_loss + (row if EACH else row * 0), mask=live, other=0).to(tl.float64)
    g = grad
    if totals is not None:
        g = grad / tl.load(totals).to(tl.float64)
    g = g.to(ACC).to(tl.float64)
    if target is None:
        t = tl.full((P,), -1, tl.int64)
        counts = live
        share, hit = g, g
        scale = g * tl.load(masses + row, mask=live, other=0).to(tl.float64) * inverse
    else:
        t, counts = _targets(target, row, live, classes, ignored)
        own = tl.full((P,), 1, tl.float64)
        if weight is not None:
            own = tl.load(weight + t, mask=counts, other=0).to(tl.float64)
        share = g * smooth
        hit = g * (own * keep + own * smooth)
        scale = g * (own * keep + tl.load(weights) * smooth) * inverse
        t = tl.where(counts, t, -1)
    z = tl.zeros((P,), tl.float64)
    if Z:
        if totals is not None:
            grad = grad / tl.load(totals + 1).to(tl.float64)
        z = grad * 2.0 * z_scale * (largest.to(tl.float64) - tl.log(inverse)) * inverse
    nothing = 0.0 * inverse  # NaN if the row's sum is NaN
    scale = tl.where(counts, scale, nothing).to(ACC)[:, None]
    z = tl.where(counts, z, 0.0).to(ACC)[:, None]
    share = tl.where(counts, share, 0.0).to(ACC)[:, None]
    hit = tl.where(counts, hit, 0.0).to(ACC)[:, None]
    base, step = _place(row, classes, inner, stride, PIXELS)
    grad_base, _ = _place(row, classes, inner, grad_stride, PIXELS)
    column = tl.program_id(1).to(tl.int64) * K + tl.arange(0, K)
    inside = live[:, None] & (column < classes)[None, :]
    v = tl.load(x + base[:, None] + column[None, :] * step, mask=inside, other=0).to(ACC)
    if CAP:
        v, derivative = _capped(v, cap)
    rest = share
    if SHARES:
        rest = share * _shares(probabilities, weight, row, classes, inner, column, inside, keep, smooth, PIXELS, ACC)
    rest = tl.where(column[None, :] == t[:, None], hit, rest)
    e = tl.exp(v - largest[:, None])
    result = e * scale - rest
    if Z:
        result += e * z
    if CAP:
        result *= derivative
    result = result.to(grad_input.dtype.element_ty)
    tl.store(grad_input + grad_base[:, None] + column[None, :] * step, result, mask=inside)


def _has_probabilities(input: Tensor, target: Tensor) -> bool:
    return input.shape == target.shape


def _classes_last(input: Tensor) -> bool:
    return input.dim() > 2 and not input.is_contiguous() and input.stride(1) == 1


def _rows(tensor: Tensor) -> Tensor:
    """[N, C, ...] as [rows, C], without a copy where the distances allow that and classes lie side by side."""
    rows = tensor.movedim(0 if tensor.dim() == 1 else 1, -1).reshape(-1, tensor.shape[0 if tensor.dim() == 1 else 1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def _view(input: Tensor) -> tuple[Tensor, int, int]:
    """(logits, inner, stride) as kernel.h has them."""
    if input.dim() <= 2 or _classes_last(input):
        rows = _rows(input)
        return rows, 1, rows.stride(0)
    inner = math.prod(input.shape[2:])
    return input.contiguous(), inner, input.shape[1] if inner == 1 else 0


def _target(input: Tensor, target: Tensor, pixels: bool) -> tuple[Tensor | None, Tensor | None]:
    """(classes, probabilities): one of them, laid out as the kernels want it."""
    if not _has_probabilities(input, target):
        return target.contiguous(), None
    return None, target.contiguous() if pixels else _rows(target).contiguous()


def _tile(classes: int, pixels: bool) -> tuple[int, int]:
    """(P, K): rows and classes of a program."""
    if pixels:
        return 128, 8
    width = min(4096, triton.next_power_of_2(classes))
    return max(1, 1024 // width), width


def _numbers(dtype: torch.dtype, *values: float) -> list[Any]:
    """A float argument has 32 bits, a constant has 64."""
    kind: Callable[[float], Any] = tl.constexpr if dtype == torch.float64 else float
    return [kind(value) for value in values]


def cross_entropy_forward(
    input: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore_index: int, label_smoothing: float,
    lse_square_scale: float, softcap: float, wide: bool,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:  # fmt: skip
    """(loss, z_loss, stats, total): stats the maximum and the sum of exponentials of each row, and for probabilities
    their mass; total what a mean divides loss and z_loss by."""
    dim = 0 if input.dim() == 1 else 1
    classes, accumulate = input.shape[dim], accumulate_type(input.dtype)
    x, inner, stride = _view(input)
    rows, pixels = input.numel() // classes, inner > 1
    hard, soft = _target(input, target, pixels)
    stats = torch.empty((2 if soft is None else 3, rows), dtype=accumulate, device=input.device)
    losses = torch.empty(rows, dtype=accumulate, device=input.device)
    squares = torch.empty_like(losses) if lse_square_scale else None
    weight = None if weight is None else weight.contiguous().to(accumulate)
    smooth = label_smoothing / classes
    numbers = _numbers(input.dtype, 1 - label_smoothing, smooth, lse_square_scale, softcap)
    tile = _tile(classes, pixels)
    with torch.cuda.device_of(input):
        _losses[(max(1, triton.cdiv(rows, tile[0])),)](
            x, hard, soft, weight, losses, squares, stats[0], stats[1], None if soft is None else stats[2],
            rows, classes, inner, stride, ignore_index, *numbers,
            DOTS=soft is not None or label_smoothing != 0, CAP=softcap != 0, PIXELS=pixels,
            ACC=TRITON_TYPE[accumulate], P=tile[0], K=tile[1], num_warps=8 if tile[1] > 1024 else 4,
        )  # fmt: skip
    dtype = accumulate if wide else input.dtype
    if reduction == 0:
        sizes = list(input.shape)
        del sizes[dim]
        return losses.view(sizes).to(dtype), None if squares is None else squares.view(sizes).to(dtype), stats, None
    loss = losses.sum(dtype=torch.float64)
    z_loss = None if squares is None else squares.sum(dtype=torch.float64)
    total = None
    if reduction == 1:
        if hard is None:
            weights = count = torch.full((), rows, dtype=torch.float64, device=input.device)
        else:
            kept = (hard != ignore_index).view(-1)
            weights = count = kept.sum(dtype=torch.float64)
            if weight is not None:
                weights = torch.where(kept, weight[torch.where(kept, hard.view(-1), 0)], 0.0).sum(dtype=torch.float64)
        total = torch.stack([weights, count]).to(accumulate)
        loss = loss / weights if z_loss is None else (loss - z_loss) / weights + z_loss / count
        z_loss = None if z_loss is None else z_loss / count
    return loss.to(dtype), None if z_loss is None else z_loss.to(dtype), stats, total


def _gradient(
    grad_loss: Tensor, input: Tensor, target: Tensor, weight: Tensor | None, stats: Tensor, total: Tensor | None,
    reduction: int, ignore_index: int, label_smoothing: float, lse_square_scale: float, softcap: float,
    *, in_place: bool = False,
) -> Tensor:  # fmt: skip
    classes = input.shape[0 if input.dim() == 1 else 1]
    x, inner, stride = _view(input)
    rows, pixels = input.numel() // classes, inner > 1
    hard, soft = _target(input, target, pixels)
    accumulate = stats.dtype
    if in_place:
        out, grad_stride, result = x, stride, input
    elif _classes_last(input):
        out = torch.empty(input.movedim(1, -1).shape, dtype=input.dtype, device=input.device)
        grad_stride, result = classes, out.movedim(-1, 1)
    else:
        out = result = torch.empty(input.shape, dtype=input.dtype, device=input.device)
        grad_stride = classes
    weight = None if weight is None else weight.contiguous().to(accumulate)
    weights = (
        torch.full((), classes, dtype=torch.float64, device=input.device) if weight is None else weight.double().sum()
    )
    numbers = _numbers(input.dtype, 1 - label_smoothing, label_smoothing / classes, lse_square_scale, softcap)
    tile = _tile(classes, pixels)
    with torch.cuda.device_of(input):
        _backward[(max(1, triton.cdiv(rows, tile[0])), triton.cdiv(classes, tile[1]))](
            x, hard, soft, weight, grad_loss.to(accumulate).contiguous(), stats[0], stats[1],
            None if soft is None else stats[2], total, weights, out,
            rows, classes, inner, stride, grad_stride, ignore_index, *numbers, EACH=reduction == 0,
            SHARES=soft is not None or (weight is not None and label_smoothing != 0), CAP=softcap != 0,
            Z=lse_square_scale != 0, PIXELS=pixels, ACC=TRITON_TYPE[accumulate], P=tile[0], K=tile[1],
            num_warps=8 if tile[1] > 1024 else 4,
        )  # fmt: skip
    return result


def cross_entropy_backward(*arguments: Any) -> Tensor:
    """grad_input."""
    return _gradient(*arguments)


def cross_entropy_backward_(*arguments: Any) -> None:
    """The same over the input."""
    _gradient(*arguments, in_place=True)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "cross_entropy_forward": cross_entropy_forward,
    "cross_entropy_backward": cross_entropy_backward,
    "cross_entropy_backward_": cross_entropy_backward_,
}
