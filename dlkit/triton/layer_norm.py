"""LayerNorm and RMSNorm in Triton: forward and backward, also with a residual add before the norm.

Forward reads x once and writes y: a program holds its rows in registers, takes the mean, then the squared deviations
from it. Rows beyond 64 KB of fp32 go through a column loop (Welford per lane, then a second read, last block first,
because the caches still hold that one). Backward reads x and grad_output once: a fixed number of programs walk the
rows, each keeps its share of grad_weight and grad_bias in registers and writes one partial row of them, and a second
kernel adds the partials in a fixed order. Beyond 32 KB it takes a pass for grad_input and another for the parameters.
Without atomics every run gives the same bits. Tiles depend only on width and alignment: a row's result does not depend
on the rows around it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import TRITON_TYPE, accumulate_type, dense, divide, inverse_root, scalar

# Widths and strides reach the kernels in units of VEC elements. That tells the compiler which vector loads are safe
# (Triton itself looks for multiples of 16 only; 1000 columns allow 16-byte loads too), and one binary serves all sizes.
_SIZES = ["rows", "groups", "x_stride", "residual_stride", "grad_output_stride", "grad_sum_stride", "chunks", "cols"]
_jit = triton.jit(do_not_specialize=[*_SIZES, "partial_rows"])


@triton.jit
def _at(pointer, row, stride, VEC: tl.constexpr):
    return pointer + row * (stride.to(tl.int64) * VEC)


@triton.jit
def _tile(pointer, first, stride, col, VEC: tl.constexpr, ROWS: tl.constexpr, OFFSET: tl.constexpr):
    """Pointers to a tile of ROWS rows: one 64-bit base, and offsets in 32 bits wherever a tile spans no more."""
    row = tl.arange(0, ROWS)[:, None].to(OFFSET)
    return _at(pointer, first, stride, VEC) + (row * (stride.to(OFFSET) * VEC) + col)


@triton.jit
def _row_sums(a, b):
    """Both sums over the columns in one exchange between warps: 3 barriers, where two calls of tl.sum take 6."""
    return tl.split(tl.sum(tl.join(a, b), 1, keep_dims=True))


@_jit
def _forward_rows(
    x, residual, weight, bias, y, sum, mean, rstd, rows, groups, x_stride, residual_stride,
    eps: tl.float64, RMS: tl.constexpr, ACC: tl.constexpr, VEC: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    OFFSET: tl.constexpr,
):  # fmt: skip
    cols = groups * VEC
    first = tl.program_id(0).to(tl.int64) * ROWS
    row = first + tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (col < cols)

    value = tl.load(_tile(x, first, x_stride, col, VEC, ROWS, OFFSET), mask=inside, other=0.0)
    if residual is not None:
        other = tl.load(_tile(residual, first, residual_stride, col, VEC, ROWS, OFFSET), mask=inside, other=0.0)
        value = (value.to(ACC) + other.to(ACC)).to(sum.dtype.element_ty)
        tl.store(_tile(sum, first, groups, col, VEC, ROWS, tl.int32), value, mask=inside)
    value = value.to(ACC)

    count = cols.to(ACC)
    if not RMS:
        average = divide(tl.sum(value, 1, keep_dims=True), count)
        value = tl.where(inside, value - average, 0.0)
        if mean is not None:
            tl.store(mean + row, average, mask=row < rows)
    if not RMS and x.dtype.element_ty == ACC:
        # The rounding error of the mean matters if the deviations are small beside it, and only unrounded input tells.
        squares, rest = _row_sums(value * value, value)
        rest = divide(rest, count)
        variance = divide(squares, count) - rest * rest
        value = tl.where(inside, value - rest, 0.0)
    else:
        variance = divide(tl.sum(value * value, 1, keep_dims=True), count)
    scale = inverse_root(variance + scalar(eps, ACC))
    if rstd is not None:
        tl.store(rstd + row, scale, mask=row < rows)

    value *= scale
    if weight is not None:
        value *= tl.load(weight + col, mask=col < cols, other=0.0).to(ACC)
    if bias is not None:
        value += tl.load(bias + col, mask=col < cols, other=0.0).to(ACC)
    tl.store(_tile(y, first, groups, col, VEC, ROWS, tl.int32), value.to(y.dtype.element_ty), mask=inside)


@_jit
def _forward_long_rows(
    x, residual, weight, bias, y, sum, mean, rstd, groups, x_stride, residual_stride,
    eps: tl.float64, RMS: tl.constexpr, ACC: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = groups.to(tl.int64) * VEC
    blocks = tl.cdiv(cols, BLOCK)
    lane = tl.arange(0, BLOCK)
    x = _at(x, row, x_stride, VEC)
    y = _at(y, row, groups, VEC)
    if residual is not None:
        residual = _at(residual, row, residual_stride, VEC)
        sum = _at(sum, row, groups, VEC)

    average = tl.zeros([BLOCK], ACC)
    deviation = tl.zeros([BLOCK], ACC)
    for block in range(blocks):
        start = block * BLOCK
        inside = lane < cols - start
        value = tl.load(x + start + lane, mask=inside, other=0.0)
        if residual is not None:
            other = tl.load(residual + start + lane, mask=inside, other=0.0)
            value = (value.to(ACC) + other.to(ACC)).to(sum.dtype.element_ty)
            tl.store(sum + start + lane, value, mask=inside)
        value = value.to(ACC)
        if RMS:
            deviation += value * value
        else:
            delta = tl.where(inside, value - average, 0.0)
            average += delta * (1.0 / tl.cast(block + 1, ACC))
            deviation += delta * (value - average)

    count = cols.to(ACC)
    if RMS:
        variance = divide(tl.sum(deviation, 0), count)
    else:
        lane_count = ((cols - lane + (BLOCK - 1)) // BLOCK).to(ACC)
        row_average = divide(tl.sum(average * lane_count, 0), count)
        shift = average - row_average
        variance = divide(tl.sum(deviation + shift * shift * lane_count, 0), count)
        if mean is not None:
            tl.store(mean + row, row_average)
    scale = inverse_root(variance + scalar(eps, ACC))
    if rstd is not None:
        tl.store(rstd + row, scale)

    if residual is not None:
        tl.debug_barrier()  # the sum is read back below, perhaps by another thread than wrote it
        x = sum
    for block in range(blocks):
        start = (blocks - 1 - block) * BLOCK
        inside = lane < cols - start
        value = tl.load(x + start + lane, mask=inside, other=0.0).to(ACC)
        if not RMS:
            value -= row_average
        value *= scale
        if weight is not None:
            value *= tl.load(weight + start + lane, mask=inside, other=0.0).to(ACC)
        if bias is not None:
            value += tl.load(bias + start + lane, mask=inside, other=0.0).to(ACC)
        tl.store(y + start + lane, value.to(y.dtype.element_ty), mask=inside)


@_jit
def _backward_rows(
    grad_output, grad_sum, x, mean, rstd, weight, grad_input, weight_partials, bias_partials,
    rows, groups, grad_output_stride, grad_sum_stride, x_stride,
    ACC: tl.constexpr, VEC: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    OFFSET: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    cols = groups * VEC
    count = cols.to(ACC)
    col = tl.arange(0, BLOCK)[None, :]
    if weight is not None:
        w = tl.load(weight + col, mask=col < cols, other=0.0)
    grad_weight = tl.zeros([ROWS, BLOCK], ACC)
    grad_bias = tl.zeros([ROWS, BLOCK], ACC)

    for tile in tl.range(program, tl.cdiv(rows.to(tl.int64), ROWS), tl.num_programs(0), num_stages=STAGES):
        first = tile * ROWS
        row = first + tl.arange(0, ROWS)[:, None]
        inside = (row < rows) & (col < cols)
        xhat = tl.load(_tile(x, first, x_stride, col, VEC, ROWS, OFFSET), mask=inside, other=0.0).to(ACC)
        grad = tl.load(
            _tile(grad_output, first, grad_output_stride, col, VEC, ROWS, OFFSET), mask=inside, other=0.0
        ).to(ACC)
        scale = tl.load(rstd + row, mask=row < rows, other=0.0)
        if mean is not None:
            xhat -= tl.load(mean + row, mask=row < rows, other=0.0)
        xhat *= scale

        if weight_partials is not None:
            grad_weight += grad * xhat
        if bias_partials is not None:
            grad_bias += grad
        if weight is not None:
            grad *= w.to(ACC)
        # Outside the row grad is 0, so neither sum needs a mask.
        if mean is not None:
            grad_total, product_total = _row_sums(grad, grad * xhat)
            grad -= divide(grad_total, count)
        else:
            product_total = tl.sum(grad * xhat, 1, keep_dims=True)
        grad = (grad - xhat * divide(product_total, count)) * scale
        if grad_sum is not None:
            other = tl.load(_tile(grad_sum, first, grad_sum_stride, col, VEC, ROWS, OFFSET), mask=inside, other=0.0)
            grad += other.to(ACC)
        grad = grad.to(grad_input.dtype.element_ty)
        tl.store(_tile(grad_input, first, groups, col, VEC, ROWS, tl.int32), grad, mask=inside)

    lane = tl.arange(0, BLOCK)
    if weight_partials is not None:
        tl.store(_at(weight_partials, program, groups, VEC) + lane, tl.sum(grad_weight, 0), mask=lane < cols)
    if bias_partials is not None:
        tl.store(_at(bias_partials, program, groups, VEC) + lane, tl.sum(grad_bias, 0), mask=lane < cols)


@_jit
def _backward_long_rows(
    grad_output, grad_sum, x, mean, rstd, weight, grad_input,
    groups, grad_output_stride, grad_sum_stride, x_stride,
    ACC: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = groups.to(tl.int64) * VEC
    blocks = tl.cdiv(cols, BLOCK)
    lane = tl.arange(0, BLOCK)
    grad_output = _at(grad_output, row, grad_output_stride, VEC)
    x = _at(x, row, x_stride, VEC)
    grad_input = _at(grad_input, row, groups, VEC)
    if grad_sum is not None:
        grad_sum = _at(grad_sum, row, grad_sum_stride, VEC)
    scale = tl.load(rstd + row)
    if mean is not None:
        average = tl.load(mean + row)

    grad_total = tl.zeros([BLOCK], ACC)
    product_total = tl.zeros([BLOCK], ACC)
    for block in range(blocks):
        start = block * BLOCK
        inside = lane < cols - start
        xhat = tl.load(x + start + lane, mask=inside, other=0.0).to(ACC)
        grad = tl.load(grad_output + start + lane, mask=inside, other=0.0).to(ACC)
        if mean is not None:
            xhat -= average
        if weight is not None:
            grad *= tl.load(weight + start + lane, mask=inside, other=0.0).to(ACC)
        grad_total += grad
        product_total += grad * (xhat * scale)
    count = cols.to(ACC)
    grad_average = divide(tl.sum(grad_total, 0), count)
    product_average = divide(tl.sum(product_total, 0), count)

    for block in range(blocks):
        start = (blocks - 1 - block) * BLOCK
        inside = lane < cols - start
        xhat = tl.load(x + start + lane, mask=inside, other=0.0).to(ACC)
        grad = tl.load(grad_output + start + lane, mask=inside, other=0.0).to(ACC)
        if mean is not None:
            xhat -= average
        if weight is not None:
            grad *= tl.load(weight + start + lane, mask=inside, other=0.0).to(ACC)
        if mean is not None:
            grad -= grad_average
        grad = (grad - xhat * scale * product_average) * scale
        if grad_sum is not None:
            grad += tl.load(grad_sum + start + lane, mask=inside, other=0.0).to(ACC)
        tl.store(grad_input + start + lane, grad.to(grad_input.dtype.element_ty), mask=inside)


@_jit
def _backward_columns(
    grad_output, x, mean, rstd, weight_partials, bias_partials,
    rows, groups, grad_output_stride, x_stride, chunks,
    ACC: tl.constexpr, VEC: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    OFFSET: tl.constexpr,
):  # fmt: skip
    # Neighbouring programs take neighbouring columns of the same rows: together they read whole DRAM pages.
    cols = groups.to(tl.int64) * VEC
    column_blocks = tl.cdiv(cols, BLOCK)
    chunk = tl.program_id(0) // column_blocks
    start = (tl.program_id(0) % column_blocks) * BLOCK
    lane = tl.arange(0, BLOCK)
    within = lane < cols - start
    x += start
    grad_output += start
    grad_weight = tl.zeros([ROWS, BLOCK], ACC)
    grad_bias = tl.zeros([ROWS, BLOCK], ACC)

    for tile in range(chunk, tl.cdiv(rows.to(tl.int64), ROWS), chunks):
        first = tile * ROWS
        row = first + tl.arange(0, ROWS)[:, None]
        inside = (row < rows) & within[None, :]
        grad = tl.load(
            _tile(grad_output, first, grad_output_stride, lane[None, :], VEC, ROWS, OFFSET), mask=inside, other=0.0
        ).to(ACC)
        if weight_partials is not None:
            xhat = tl.load(_tile(x, first, x_stride, lane[None, :], VEC, ROWS, OFFSET), mask=inside, other=0.0).to(ACC)
            if mean is not None:
                xhat -= tl.load(mean + row, mask=row < rows, other=0.0)
            grad_weight += grad * (xhat * tl.load(rstd + row, mask=row < rows, other=0.0))
        if bias_partials is not None:
            grad_bias += grad

    if weight_partials is not None:
        tl.store(_at(weight_partials + start, chunk, groups, VEC) + lane, tl.sum(grad_weight, 0), mask=within)
    if bias_partials is not None:
        tl.store(_at(bias_partials + start, chunk, groups, VEC) + lane, tl.sum(grad_bias, 0), mask=within)


@_jit
def _sum_partials(
    weight_partials, bias_partials, grad_weight, grad_bias, partial_rows, cols,
    ACC: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    col = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    weight_sum = tl.zeros([ROWS, BLOCK], ACC)
    bias_sum = tl.zeros([ROWS, BLOCK], ACC)
    for start in range(0, partial_rows, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        inside = (row < partial_rows) & (col < cols)[None, :]
        at = row * cols.to(tl.int64) + col[None, :]
        if grad_weight is not None:
            weight_sum += tl.load(weight_partials + at, mask=inside, other=0.0)
        if grad_bias is not None:
            bias_sum += tl.load(bias_partials + at, mask=inside, other=0.0)
    if grad_weight is not None:
        tl.store(grad_weight + col, tl.sum(weight_sum, 0).to(grad_weight.dtype.element_ty), mask=col < cols)
    if grad_bias is not None:
        tl.store(grad_bias + col, tl.sum(bias_sum, 0).to(grad_bias.dtype.element_ty), mask=col < cols)


# How a shape becomes a launch. Sizes are bytes of accumulator, 4 an element or 8 for fp64.
_FORWARD_TILE = 8 << 10  # of several short rows
_FORWARD_ROW = 64 << 10  # the longest row that forward keeps in registers
_BACKWARD_TILE = 16 << 10
_BACKWARD_ROW = 32 << 10  # x, grad_output, weight and two sums a column: twice as long, and they spill
_LOOP_BLOCK = 16 << 10
_LOOP_WARPS = 8
_COLUMN_BLOCK = 128  # columns
_PARTIALS_TILE = 64, 32  # rows, columns


def _budget(size: int, vec: int) -> int:
    """Without vectors each column needs an address of its own, so half as many fit a thread."""
    return size if vec > 1 else size // 2


def _forward_warps(tile: int, vec: int) -> int:
    """16 fp32 values a thread hide latency when rows are few; from 8 warps on 32, so that two programs share an SM."""
    return max(4, min(tile >> 11, 8), tile // _budget(4 << 10, vec))


def _backward_warps(tile: int, vec: int) -> int:
    """16 columns a thread: with five registers each they stay below the 128 that 16 warps leave a thread."""
    return tile // _budget(2 << 10, vec)


def _backward_stages(tile_rows: int) -> int:
    """2 has the next row copied to shared memory (3 x 32 KB at most) while this one is reduced: no register more.

    With several rows a tile it would be 170 registers instead of 120, and one program an SM instead of two.
    """
    return 2 if tile_rows == 1 else 1


def _as_rows(tensor: Tensor, normalized_ndim: int) -> tuple[Tensor, int]:
    """The tensor as rows of adjacent columns, copied only if its layout is not that, and the distance of two rows."""
    lead = tensor.dim() - normalized_ndim
    shape, strides = tensor.shape, tensor.stride()
    cols = 1
    for dim in range(tensor.dim() - 1, lead - 1, -1):
        if shape[dim] != 1 and strides[dim] != cols:
            return _as_rows(tensor.contiguous(), normalized_ndim)
        cols *= shape[dim]
    # A single row keeps its stride too: the stride decides the vector width, and the width the order of a row's sum.
    row_stride = strides[lead - 1] if lead else cols
    span = None
    for dim in range(lead - 1, -1, -1):
        if shape[dim] == 1:
            continue
        if span is None:
            row_stride, span = strides[dim], strides[dim] * shape[dim]
        elif strides[dim] != span:
            return _as_rows(tensor.contiguous(), normalized_ndim)
        else:
            span *= shape[dim]
    return tensor, row_stride


def _vector(dtype: torch.dtype, *distances: int) -> int:
    """Elements in 16 bytes, if rows keep that alignment throughout, else 1."""
    elements = 16 // dtype.itemsize
    return elements if math.gcd(*distances) % elements == 0 else 1


def _offset(rows: int, *strides: int) -> tl.dtype:
    """The type that holds the offsets within a tile of that many rows."""
    return tl.int32 if rows * max(strides) < 2**30 else tl.int64


def _processors(tensor: Tensor) -> int:
    if tensor.is_cuda:
        return torch.cuda.get_device_properties(tensor.device).multi_processor_count
    return 2  # the interpreter's programs run one after another; two are enough to have partials to add


def layer_norm_forward(
    input: Tensor,
    residual: Tensor | None,
    normalized_ndim: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rms: bool,
    stats: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Normalises ``input`` (or ``input + residual``) over its last ``normalized_ndim`` dimensions.

    Returns ``(y, sum, mean, rstd)``: y and sum in the input's shape and dtype, contiguous, sum only with a residual;
    mean (never for rms) and rstd only with ``stats``, in fp32 (fp64 for fp64), with 1 for each normalised dimension.
    Formulas: https://pytorch.org/docs/stable/generated/torch.nn.LayerNorm.html and torch.nn.RMSNorm.html.
    """
    lead = input.dim() - normalized_ndim
    rows, cols = math.prod(input.shape[:lead]), math.prod(input.shape[lead:])
    accumulate = accumulate_type(input.dtype)
    stats_shape = (*input.shape[:lead], *[1] * normalized_ndim)
    y = torch.empty(input.shape, dtype=input.dtype, device=input.device)
    sum = torch.empty_like(y) if residual is not None else None
    mean = torch.empty(stats_shape, dtype=accumulate, device=input.device) if stats and not rms else None
    rstd = torch.empty(stats_shape, dtype=accumulate, device=input.device) if stats else None
    if rows == 0 or cols == 0:
        return y, sum, mean, rstd

    input, x_stride = _as_rows(input, normalized_ndim)
    residual_stride = cols
    if residual is not None:
        residual, residual_stride = _as_rows(residual, normalized_ndim)
    vec = _vector(input.dtype, cols, x_stride, residual_stride)
    tensors = (input, residual, dense(weight), dense(bias), y, sum, mean, rstd)
    sizes = (cols // vec, x_stride // vec, residual_stride // vec)
    constants: dict[str, Any] = {"eps": eps, "RMS": rms, "ACC": TRITON_TYPE[accumulate], "VEC": vec}
    block = triton.next_power_of_2(cols)
    row_bytes = block * accumulate.itemsize
    with torch.cuda.device_of(input):
        if row_bytes <= _budget(_FORWARD_ROW, vec):
            tile = max(_FORWARD_TILE, row_bytes)
            tile_rows = tile // row_bytes
            _forward_rows[(triton.cdiv(rows, tile_rows),)](
                *tensors, rows, *sizes, **constants, ROWS=tile_rows, BLOCK=block,
                OFFSET=_offset(tile_rows, x_stride, residual_stride), num_warps=_forward_warps(tile, vec),
            )  # fmt: skip
        else:
            _forward_long_rows[(rows,)](
                *tensors, *sizes, **constants, BLOCK=_LOOP_BLOCK // accumulate.itemsize, num_warps=_LOOP_WARPS
            )
    return y, sum, mean, rstd


def layer_norm_backward(
    grad_output: Tensor,
    grad_sum: Tensor | None,
    input: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    normalized_ndim: int,
    output_mask: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of :func:`layer_norm_forward`, those that ``output_mask`` asks for, else None.

    ``input`` is what was normalised (the sum, where there was a residual); RMSNorm is ``mean is None``; ``grad_sum`` is
    the gradient that reaches the sum from elsewhere and is added to grad_input. ``bias`` only tells its dtype, and only
    where there is no ``weight``.
    """
    lead = input.dim() - normalized_ndim
    rows, cols = math.prod(input.shape[:lead]), math.prod(input.shape[lead:])
    accumulate = accumulate_type(input.dtype)
    grad_input = torch.empty(input.shape, dtype=input.dtype, device=input.device) if output_mask[0] else None
    allocate = torch.empty if rows else torch.zeros
    parameter = next((tensor for tensor in (weight, bias) if tensor is not None), input)
    grad_weight, grad_bias = (
        allocate(input.shape[lead:], dtype=parameter.dtype, device=input.device) if wanted else None
        for wanted in output_mask[1:]
    )
    gradients = (grad_input, grad_weight, grad_bias)
    if rows == 0 or cols == 0:
        return gradients

    weight = dense(weight)
    input, x_stride = _as_rows(input, normalized_ndim)
    grad_output, grad_output_stride = _as_rows(grad_output, normalized_ndim)
    grad_sum_stride = cols
    if grad_sum is not None:
        grad_sum, grad_sum_stride = _as_rows(grad_sum, normalized_ndim)
    vec = _vector(input.dtype, cols, x_stride, grad_output_stride, grad_sum_stride)
    groups = cols // vec
    strides = (grad_output_stride // vec, grad_sum_stride // vec, x_stride // vec)
    constants: dict[str, Any] = {"ACC": TRITON_TYPE[accumulate], "VEC": vec}
    block = triton.next_power_of_2(cols)
    row_bytes = block * accumulate.itemsize
    parameters = grad_weight is not None or grad_bias is not None
    fused = grad_input is not None and row_bytes <= _budget(_BACKWARD_ROW, vec)

    def partials(count: int) -> list[Tensor | None]:
        return [
            None if gradient is None else torch.empty((count, cols), dtype=accumulate, device=input.device)
            for gradient in (grad_weight, grad_bias)
        ]

    with torch.cuda.device_of(input):
        if fused:
            tile = max(_budget(_BACKWARD_TILE, vec), row_bytes)
            tile_rows, warps = tile // row_bytes, _backward_warps(tile, vec)
            # 16 warps a processor: as many as fit with 128 registers a thread.
            count = min(triton.cdiv(rows, tile_rows), _processors(input) * (16 // warps))
            sums = partials(count)
            _backward_rows[(count,)](
                grad_output, grad_sum, input, mean, rstd, weight, grad_input, *sums, rows, groups, *strides,
                **constants, ROWS=tile_rows, BLOCK=block,
                OFFSET=_offset(tile_rows, grad_output_stride, grad_sum_stride, x_stride),
                STAGES=_backward_stages(tile_rows), num_warps=warps,
            )  # fmt: skip
        elif grad_input is not None:
            _backward_long_rows[(rows,)](
                grad_output, grad_sum, input, mean, rstd, weight, grad_input, groups, *strides,
                **constants, BLOCK=_LOOP_BLOCK // accumulate.itemsize, num_warps=_LOOP_WARPS,
            )  # fmt: skip
        if parameters and not fused:
            column_block = min(block, _COLUMN_BLOCK)
            tile = _budget(_BACKWARD_TILE, vec)
            tile_rows = tile // accumulate.itemsize // column_block
            column_blocks = triton.cdiv(cols, column_block)
            count = min(triton.cdiv(rows, tile_rows), triton.cdiv(4 * _processors(input), column_blocks))
            sums = partials(count)
            _backward_columns[(column_blocks * count,)](
                grad_output, input, mean, rstd, *sums, rows, groups, strides[0], strides[2], count,
                **constants, ROWS=tile_rows, BLOCK=column_block,
                OFFSET=_offset(tile_rows, grad_output_stride, x_stride), num_warps=_backward_warps(tile, vec),
            )  # fmt: skip
        if parameters:
            column_block = min(block, _PARTIALS_TILE[1])
            _sum_partials[(triton.cdiv(cols, column_block),)](
                *sums, grad_weight, grad_bias, count, cols,
                ACC=constants["ACC"], ROWS=_PARTIALS_TILE[0], BLOCK=column_block, num_warps=4,
            )  # fmt: skip
    return gradients


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "layer_norm_forward": layer_norm_forward,
    "layer_norm_backward": layer_norm_backward,
}
