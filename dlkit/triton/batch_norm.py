"""Batch, group and instance normalisation in Triton, in any layout. The first two also add a residual and compute an
activation.

Every layout is one view in memory order, [outer, rows, channels, columns], whose statistics are over rows, columns
and group_channels adjacent channels: batch_norm has outer 1, group_norm has a sample there; channels_last counts
space among the rows, the contiguous layout in the columns. One set of kernels therefore serves all.

Training reads x twice and writes y: a first kernel leaves a mean and the squared deviations from it for each channel
of each piece of the view (Welford per lane), a second merges the pieces in double, a third applies them, last tile
first, because the caches still hold that one. Backward likewise: two sums for each channel and piece; the pieces;
then grad_input, from grad_residual where there is one, which the first kernel wrote, so that neither grad_output nor
y is read again. With given statistics, forward and backward take one pass each. Pieces depend only on the shape and
are added in a fixed order, without atomics: every run gives the same bits.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._prims_common import suggest_memory_format

from ._activation import activation, activation_gradient
from ._common import TRITON_TYPE, accumulate_type, dense, inverse_root, scalar

# The innermost extent (columns, or channels where there is one column) reaches the kernels in units of VEC elements:
# that tells the compiler which vector loads are safe.
_SIZES = ["rows", "channels", "columns", "channel_blocks", "column_blocks", "row_pieces", "piece_rows"]
_COUNTS = ["groups", "group_channels", "group_blocks", "statistics", "lines", "outer_lines", "entries", "divisor"]
_jit = triton.jit(do_not_specialize=[*_SIZES, *_COUNTS])


@triton.jit
def _extents(channels, columns, VEC: tl.constexpr, BLOCK: tl.constexpr):
    """(channels, columns) in elements."""
    if BLOCK == 1:
        return channels.to(tl.int64) * VEC, tl.full((), 1, tl.int64)
    else:
        return channels.to(tl.int64), columns.to(tl.int64) * VEC


@triton.jit
def _place(
    rows, channels, columns, channel_blocks, column_blocks, row_pieces, piece_rows,
    LAST_FIRST: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """Where this program works; neighbouring programs work on neighbouring memory.

    (outer, its line of partial results, its rows; its channels; offset of its first element, offsets of a tile's
    elements from that, in 32 bits wherever a tile spans no more, and which of them lie inside a row; columns).
    """
    program = tl.program_id(0)
    if LAST_FIRST:
        program = tl.num_programs(0) - 1 - program
    column_block = program % column_blocks
    program //= column_blocks
    first_channel = (program % channel_blocks).to(tl.int64) * CHANNELS
    program //= channel_blocks
    line = program.to(tl.int64) * column_blocks + column_block
    outer = (program // row_pieces).to(tl.int64)
    row = (program % row_pieces).to(tl.int64) * piece_rows
    column = column_block.to(tl.int64) * BLOCK if BLOCK > 1 else tl.full((), 0, tl.int64)
    start = ((outer * rows + row) * channels + first_channel) * columns + column

    lane = tl.arange(0, CHANNELS)[None, :, None]
    inside = lane < channels - first_channel
    at = tl.arange(0, ROWS)[:, None, None].to(OFFSET) * (channels * columns).to(OFFSET)
    if BLOCK == 1:
        at += lane
    else:
        lane_column = tl.arange(0, BLOCK)[None, None, :]
        at += lane.to(OFFSET) * columns.to(OFFSET) + lane_column
        inside = inside & (lane_column < columns - column)
    width = tl.minimum(columns - column, BLOCK)
    return outer, line, tl.minimum(rows - row, piece_rows), first_channel + lane, start, at, inside, width


@triton.jit
def _channel_sum(tile):
    return tl.sum(tl.sum(tile, 2, keep_dims=True), 0, keep_dims=True)


@triton.jit
def _slope_and_shift(scale, weight, bias, channel, valid):
    """rstd * weight, and bias: z = (x - mean) * slope + shift."""
    slope = scale
    shift = tl.zeros_like(scale)
    if weight is not None:
        slope = scale * tl.load(weight + channel, mask=valid, other=0.0).to(scale.dtype)
    if bias is not None:
        shift = tl.load(bias + channel, mask=valid, other=0.0).to(scale.dtype)
    return slope, shift


@triton.jit
def _store(pointer, value, mask):
    """Rounds a double: to 16 bits by way of fp32, as the conversion that GPUs have."""
    if pointer.dtype.element_ty != tl.float64:
        value = value.to(tl.float32)
    tl.store(pointer, value.to(pointer.dtype.element_ty), mask=mask)


@_jit
def _statistics_pieces(
    x, means, squares, rows, channels, columns, channel_blocks, column_blocks, row_pieces, piece_rows,
    ACC: tl.constexpr, VEC: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
    OFFSET: tl.constexpr,
):  # fmt: skip
    channels, columns = _extents(channels, columns, VEC, BLOCK)
    _, line, height, channel, start, at, within, width = _place(
        rows, channels, columns, channel_blocks, column_blocks, row_pieces, piece_rows,
        False, ROWS, CHANNELS, BLOCK, OFFSET,
    )  # fmt: skip
    row = tl.arange(0, ROWS)[:, None, None]
    x += start
    average = tl.zeros([ROWS, CHANNELS, BLOCK], ACC)
    square = tl.zeros([ROWS, CHANNELS, BLOCK], ACC)
    for tile in tl.range(0, tl.cdiv(height, ROWS), num_stages=2):
        inside = within & (row < height - tile * ROWS)
        value = tl.load(x + tile * ROWS * channels * columns + at, mask=inside, other=0.0).to(ACC)
        delta = tl.where(inside, value - average, 0.0)
        average += delta * (1.0 / tl.cast(tile + 1, ACC))
        square += delta * (value - average)

    lane_count = tl.where(within, (height - row + (ROWS - 1)) // ROWS, 0).to(ACC)
    inverse = 1.0 / (height * width).to(ACC)
    center = _channel_sum(average * lane_count) * inverse
    # The rounding error of the mean shows as the mean of the deviations from it; both together are the mean in fp64.
    shift = average - center
    rest = _channel_sum(shift * lane_count) * inverse
    square = _channel_sum(square + (shift - rest) * (shift - rest) * lane_count)
    place = line * channels + channel
    tl.store(squares + place, square, mask=channel < channels)
    mean = center.to(tl.float64) + rest.to(tl.float64)
    if tl.sum((mean != mean).to(tl.int32)) > 0:
        # Past an infinity a running mean is NaN, where the plain sum may stay infinite.
        total = tl.zeros([1, CHANNELS, 1], ACC)
        for tile in range(0, tl.cdiv(height, ROWS)):
            inside = within & (row < height - tile * ROWS)
            value = tl.load(x + tile * ROWS * channels * columns + at, mask=inside, other=0.0).to(ACC)
            total += _channel_sum(value)
        mean = tl.where(mean == mean, mean, total.to(tl.float64))
    tl.store(means + place, mean, mask=channel < channels)


@triton.jit
def _group_block(groups, group_blocks, GROUPS: tl.constexpr):
    """The groups that a merging program takes: (outer, [1, GROUPS] of them, their places among the statistics)."""
    outer = (tl.program_id(0) // group_blocks).to(tl.int64)
    group = (tl.program_id(0) % group_blocks).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)[None, :]
    return outer, group, outer * groups + group


@triton.jit
def _entries(start, outer, group, entries, groups, group_channels, ENTRIES: tl.constexpr):
    """A group's partial results are [outer_lines, group_channels]: (line, channel, offset, which exist) for some."""
    entry = start + tl.arange(0, ENTRIES)[:, None]
    line = (entry // group_channels).to(tl.int64)
    channel = group * group_channels + entry % group_channels
    at = (outer * (entries // group_channels) + line) * groups * group_channels + channel
    return line, channel, at, (entry < entries) & (group < groups)


@_jit
def _merge_statistics(
    means, squares, mean, rstd, var, running_mean, running_var, num_batches_tracked, momentum: tl.float64,
    rows, columns, column_blocks, piece_rows, entries, groups, group_channels, group_blocks,
    eps: tl.float64, CUMULATIVE: tl.constexpr, BLOCK: tl.constexpr, ENTRIES: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    outer, group, statistic = _group_block(groups, group_blocks, GROUPS)
    rows = rows.to(tl.int64)
    columns = columns.to(tl.int64)
    count = (rows * columns * group_channels).to(tl.float64)
    center = tl.zeros([1, GROUPS], tl.float64)
    variance = tl.zeros([1, GROUPS], tl.float64)
    for squared in tl.static_range(2):
        total = tl.zeros([ENTRIES, GROUPS], tl.float64)
        for start in range(0, entries, ENTRIES):
            line, _, at, inside = _entries(start, outer, group, entries, groups, group_channels, ENTRIES)
            height = tl.minimum(rows - (line // column_blocks) * piece_rows, piece_rows)
            width = tl.minimum(columns - (line % column_blocks) * BLOCK, BLOCK)
            piece_count = tl.where(inside, height * width, 0).to(tl.float64)
            average = tl.load(means + at, mask=inside, other=0.0)
            if squared:
                total += tl.load(squares + at, mask=inside, other=0.0).to(tl.float64)
                total += piece_count * (average - center) * (average - center)
            else:
                total += piece_count * average
        if squared:
            variance = tl.sum(total, 0, keep_dims=True) / count
        else:
            center = tl.sum(total, 0, keep_dims=True) / count

    valid = group < groups
    _store(mean + statistic, center, valid)
    if rstd is not None:
        _store(rstd + statistic, inverse_root(variance + scalar(eps, tl.float64)), valid)
    if var is not None:
        _store(var + statistic, variance, valid)
    if CUMULATIVE:
        # _apply counts this batch: here every program reads the count.
        momentum = 1.0 / (tl.load(num_batches_tracked) + 1).to(tl.float64)
    if running_mean is not None:
        running = tl.load(running_mean + statistic, mask=valid, other=0.0).to(tl.float64)
        _store(running_mean + statistic, (1 - momentum) * running + momentum * center, valid)
    if running_var is not None:
        running = tl.load(running_var + statistic, mask=valid, other=0.0).to(tl.float64)
        unbiased = variance * (count / (count - 1.0))
        _store(running_var + statistic, (1 - momentum) * running + momentum * unbiased, valid)


@_jit
def _apply(
    x, residual, weight, bias, y, mean, rstd, running_mean, running_var, num_batches_tracked,
    rows, channels, columns, channel_blocks, column_blocks, row_pieces, piece_rows, groups, group_channels,
    eps: tl.float64, negative_slope: tl.float64, KIND: tl.constexpr,
    ACC: tl.constexpr, VEC: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
    OFFSET: tl.constexpr,
):  # fmt: skip
    channels, columns = _extents(channels, columns, VEC, BLOCK)
    outer, line, height, channel, start, at, within, _ = _place(
        rows, channels, columns, channel_blocks, column_blocks, row_pieces, piece_rows,
        True, ROWS, CHANNELS, BLOCK, OFFSET,
    )  # fmt: skip
    inside = within & (tl.arange(0, ROWS)[:, None, None] < height)
    valid = channel < channels
    statistic = outer * groups + channel // group_channels
    if running_mean is not None:
        center = tl.load(running_mean + statistic, mask=valid, other=0.0).to(ACC)
        scale = inverse_root(tl.load(running_var + statistic, mask=valid, other=0.0).to(ACC) + scalar(eps, ACC))
        tl.store(mean + statistic, center, mask=valid & (line == 0))
        tl.store(rstd + statistic, scale, mask=valid & (line == 0))
    else:
        center = tl.load(mean + statistic, mask=valid, other=0.0)
        scale = tl.load(rstd + statistic, mask=valid, other=0.0)
    slope, shift = _slope_and_shift(scale, weight, bias, channel, valid)

    value = tl.load(x + start + at, mask=inside, other=0.0).to(ACC)
    value = tl.fma(value - center, slope, shift)
    if residual is not None:
        value += tl.load(residual + start + at, mask=inside, other=0.0).to(ACC)
    value = activation(value, scalar(negative_slope, ACC), KIND)
    tl.store(y + start + at, value.to(y.dtype.element_ty), mask=inside)
    if num_batches_tracked is not None:
        tl.store(num_batches_tracked, tl.load(num_batches_tracked) + 1, mask=tl.program_id(0) == 0)


@_jit
def _backward_pieces(
    grad_output, x, known, weight, bias, mean, rstd, sums, grad_sums, product_sums, grad_input, grad_residual,
    statistics, rows, channels, columns, channel_blocks, column_blocks, row_pieces, piece_rows, groups, group_channels,
    negative_slope: tl.float64,
    KIND: tl.constexpr, WEIGHTED: tl.constexpr, LAST_FIRST: tl.constexpr, STAGES: tl.constexpr,
    ACC: tl.constexpr, VEC: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
    OFFSET: tl.constexpr,
):  # fmt: skip
    """Both passes: the first sums up, the second reads the sums (WEIGHTED: of weight * g) and writes grad_input.

    ``known``: y with a ReLU, the residual with other activations; None where there was no residual.
    """
    channels, columns = _extents(channels, columns, VEC, BLOCK)
    outer, line, height, channel, start, at, within, _ = _place(
        rows, channels, columns, channel_blocks, column_blocks, row_pieces, piece_rows,
        LAST_FIRST, ROWS, CHANNELS, BLOCK, OFFSET,
    )  # fmt: skip
    row = tl.arange(0, ROWS)[:, None, None]
    valid = channel < channels
    statistic = outer * groups + channel // group_channels
    center = tl.load(mean + statistic, mask=valid, other=0.0)
    scale = tl.load(rstd + statistic, mask=valid, other=0.0)
    slope, shift = _slope_and_shift(scale, weight, bias, channel, valid)
    if sums is not None:
        grad_mean = tl.load(sums + statistic, mask=valid, other=0.0)
        product_mean = tl.load(sums + statistics + statistic, mask=valid, other=0.0) * scale * scale
        if WEIGHTED and weight is not None:
            w = tl.load(weight + channel, mask=valid, other=0.0).to(ACC)

    grad_sum = tl.zeros([ROWS, CHANNELS, BLOCK], ACC)
    product_sum = tl.zeros([ROWS, CHANNELS, BLOCK], ACC)
    for tile in tl.range(0, tl.cdiv(height, ROWS), num_stages=STAGES):
        inside = within & (row < height - tile * ROWS)
        here = start + tile * ROWS * channels * columns
        grad = tl.load(grad_output + here + at, mask=inside, other=0.0).to(ACC)
        if product_sums is not None or sums is not None or KIND > 1 or (KIND == 1 and known is None):
            deviation = tl.load(x + here + at, mask=inside, other=0.0).to(ACC) - center
        if KIND == 1:
            # y as forward wrote it, or found again from x with forward's own rounding.
            if known is not None:
                result = tl.load(known + here + at, mask=inside, other=0.0)
            else:
                result = tl.fma(deviation, slope, shift).to(x.dtype.element_ty)
            grad = tl.where(result <= 0, 0.0, grad)  # where the result is NaN the gradient passes
        elif KIND > 1:
            z = tl.fma(deviation, slope, shift)
            if known is not None:
                z += tl.load(known + here + at, mask=inside, other=0.0).to(ACC)
            grad = activation_gradient(grad, z, scalar(negative_slope, ACC), KIND)
        if grad_sums is not None:
            grad_sum += grad
        if product_sums is not None:
            product_sum += grad * deviation
        if grad_residual is not None:
            tl.store(grad_residual + here + at, grad.to(grad_residual.dtype.element_ty), mask=inside)
        if grad_input is not None:
            if sums is None:
                grad *= slope
            elif WEIGHTED:
                if weight is not None:
                    grad *= w
                grad = (grad - grad_mean - deviation * product_mean) * scale
            else:
                grad = (grad - grad_mean - deviation * product_mean) * slope
            tl.store(grad_input + here + at, grad.to(grad_input.dtype.element_ty), mask=inside)

    at = line * channels + channel
    if grad_sums is not None:
        tl.store(grad_sums + at, _channel_sum(grad_sum), mask=valid)
    if product_sums is not None:
        tl.store(product_sums + at, _channel_sum(product_sum), mask=valid)


@_jit
def _merge_channels(
    grad_sums, product_sums, rstd, sums, grad_weight, grad_bias, lines, outer_lines, channels, groups, group_channels,
    divisor, ENTRIES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """grad_weight and grad_bias, and for batch_norm the two sums, over divisor."""
    channel = tl.program_id(0).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    valid = channel < channels
    grad_total = tl.zeros([ENTRIES, CHANNELS], tl.float64)
    product_total = tl.zeros([ENTRIES, CHANNELS], tl.float64)
    weight_total = tl.zeros([ENTRIES, CHANNELS], tl.float64)
    for start in range(0, lines, ENTRIES):
        line = start + tl.arange(0, ENTRIES)[:, None]
        inside = (line < lines) & valid
        at = line * channels.to(tl.int64) + channel
        if grad_sums is not None:
            grad_total += tl.load(grad_sums + at, mask=inside, other=0.0)
        if product_sums is not None:
            product = tl.load(product_sums + at, mask=inside, other=0.0).to(tl.float64)
            statistic = (line // outer_lines) * groups.to(tl.int64) + channel // group_channels
            product_total += product
            weight_total += product * tl.load(rstd + statistic, mask=inside, other=0.0)
    if sums is not None:
        _store(sums + channel, tl.sum(grad_total, 0, keep_dims=True) / divisor, valid)
        _store(sums + channels + channel, tl.sum(product_total, 0, keep_dims=True) / divisor, valid)
    if grad_weight is not None:
        _store(grad_weight + channel, tl.sum(weight_total, 0, keep_dims=True), valid)
    if grad_bias is not None:
        _store(grad_bias + channel, tl.sum(grad_total, 0, keep_dims=True), valid)


@_jit
def _merge_groups(
    grad_sums, product_sums, weight, sums, statistics, divisor, entries, groups, group_channels, group_blocks,
    ENTRIES: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """For group_norm: the two sums of weight * g over a group, over divisor."""
    outer, group, statistic = _group_block(groups, group_blocks, GROUPS)
    grad_total = tl.zeros([ENTRIES, GROUPS], tl.float64)
    product_total = tl.zeros([ENTRIES, GROUPS], tl.float64)
    for start in range(0, entries, ENTRIES):
        _, channel, at, inside = _entries(start, outer, group, entries, groups, group_channels, ENTRIES)
        grad = tl.load(grad_sums + at, mask=inside, other=0.0).to(tl.float64)
        product = tl.load(product_sums + at, mask=inside, other=0.0).to(tl.float64)
        if weight is not None:
            w = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float64)
            grad *= w
            product *= w
        grad_total += grad
        product_total += product
    valid = group < groups
    _store(sums + statistic, tl.sum(grad_total, 0, keep_dims=True) / divisor, valid)
    _store(sums + statistics + statistic, tl.sum(product_total, 0, keep_dims=True) / divisor, valid)


# How a shape becomes a launch.
_TILE_BYTES = 16 << 10  # of accumulator; half without vectors, where each element needs an address of its own
_PROGRAMS = 1024  # that read batch_norm's pieces, if the view has so many tiles
_SAMPLE_PROGRAMS = 64  # that read a sample's pieces in group_norm: its bits do not depend on the batch around it
_ROWS_WIDE, _ROWS_NARROW = 16, 64  # least rows of a tile with several columns, with one
_MERGE_TILE, _MERGE_ENTRIES = 2048, 512
_WARPS = 8  # 16 values a thread


def _like(input: Tensor, other: Tensor) -> Tensor:
    """``other`` in the layout that torch's ops choose for ``input``: contiguous or channels_last."""
    if input.is_contiguous() or input.dim() not in (4, 5):
        return other.contiguous()
    return other.contiguous(memory_format=suggest_memory_format(input))


def _block(columns: int, widest: int) -> int:
    """The widest block that leaves at most a quarter of its lanes idle, or else the least."""
    widest = min(widest, triton.next_power_of_2(columns))
    blocks = [widest >> shift for shift in range(widest.bit_length()) if widest >> shift >= min(widest, 32)]
    idle = {block: triton.cdiv(columns, block) * block - columns for block in blocks}
    return next((block for block in blocks if 3 * idle[block] <= columns), min(blocks, key=idle.__getitem__))


class _View:
    """[outer, rows, channels, columns] in memory order, and how it is cut into tiles and pieces."""

    def __init__(self, shape: torch.Size, channels_last: bool, groups: int, dtype: torch.dtype) -> None:
        batch, self.channels, space = shape[0], shape[1], math.prod(shape[2:])
        self.outer, self.rows = (batch, 1) if groups else (1, batch)
        self.columns = 1 if channels_last else space
        self.rows *= space // self.columns
        self.groups = groups or self.channels
        self.group_channels = self.channels // self.groups
        self.statistics = self.outer * self.groups
        self.group_count = self.rows * self.columns * self.group_channels  # elements that share a mean
        self.accumulate = accumulate_type(dtype)

        # Elements of an access, 16 bytes at most, that the innermost extent allows in every row.
        self.vector = math.gcd(self.channels if self.columns == 1 else self.columns, 16 // dtype.itemsize)
        # A tile: its extents are powers of two, its rows no longer than the other two leave room for.
        elements = (_TILE_BYTES if self.vector > 1 else _TILE_BYTES // 2) // self.accumulate.itemsize
        rows, channels = triton.next_power_of_2(self.rows), triton.next_power_of_2(self.channels)
        least_rows = min(rows, _ROWS_NARROW if self.columns == 1 else _ROWS_WIDE)
        self.tile_columns = _block(self.columns, elements // least_rows)
        self.tile_channels = min(channels, elements // (least_rows * self.tile_columns))
        self.tile_rows = min(rows, elements // (self.tile_channels * self.tile_columns))
        self.channel_blocks = triton.cdiv(self.channels, self.tile_channels)
        self.column_blocks = triton.cdiv(self.columns, self.tile_columns)
        # Pieces: rows that one program adds up. In one of outer they leave outer_lines of [channels] partial results.
        tiles = triton.cdiv(self.rows, self.tile_rows)
        programs = _SAMPLE_PROGRAMS if groups else _PROGRAMS
        pieces = min(tiles, triton.cdiv(programs, self.channel_blocks * self.column_blocks))
        self.piece_rows = triton.cdiv(tiles, pieces) * self.tile_rows
        self.outer_lines = triton.cdiv(self.rows, self.piece_rows) * self.column_blocks
        self.lines = self.outer * self.outer_lines
        self.partials = (self.lines, self.channels)

    def launch(self, kernel: Any, *arguments: Any, piece_rows: int, **more: Any) -> None:
        """``kernel`` over the whole view, each program one tile wide and ``piece_rows`` high."""
        row_pieces = triton.cdiv(self.rows, piece_rows)
        channel_vec, column_vec = (self.vector, 1) if self.columns == 1 else (1, self.vector)
        narrow = self.tile_rows * self.channels * self.columns < 2**30
        kernel[(self.outer * row_pieces * self.channel_blocks * self.column_blocks,)](
            *arguments, self.rows, self.channels // channel_vec, self.columns // column_vec,
            self.channel_blocks, self.column_blocks, row_pieces, piece_rows, **more,
            ACC=TRITON_TYPE[self.accumulate], VEC=self.vector, ROWS=self.tile_rows, CHANNELS=self.tile_channels,
            BLOCK=self.tile_columns, OFFSET=tl.int32 if narrow else tl.int64, num_warps=_WARPS,
        )  # fmt: skip

    def launch_merge(self, kernel: Any, *arguments: Any, **more: Any) -> None:
        """``kernel`` over the groups of each of outer."""
        entries = self.outer_lines * self.group_channels
        tile_entries, tile_groups = _merge_tile(entries, self.groups)
        group_blocks = triton.cdiv(self.groups, tile_groups)
        kernel[(self.outer * group_blocks,)](
            *arguments, entries, self.groups, self.group_channels, group_blocks, **more,
            ENTRIES=tile_entries, GROUPS=tile_groups, num_warps=_WARPS,
        )  # fmt: skip


_cached_view = functools.lru_cache(maxsize=1024)(_View)


def _view(input: Tensor, groups: int) -> _View:
    return _cached_view(input.shape, not input.is_contiguous(), groups, input.dtype)


def _merge_tile(entries: int, width: int) -> tuple[int, int]:
    entries = min(triton.next_power_of_2(entries), _MERGE_ENTRIES)
    return entries, min(triton.next_power_of_2(width), _MERGE_TILE // entries)


def _statistics(
    view: _View, input: Tensor, mean: Tensor, rstd: Tensor | None, var: Tensor | None,
    running: Sequence[Tensor | None] = (None,) * 3, momentum: float = 0.0, eps: float = 0.0,
) -> None:  # fmt: skip
    means, squares = mean.new_empty(view.partials, dtype=torch.float64), mean.new_empty(view.partials)
    view.launch(_statistics_pieces, input, means, squares, piece_rows=view.piece_rows)
    view.launch_merge(
        _merge_statistics, means, squares, mean, rstd, var, *running, momentum,
        view.rows, view.columns, view.column_blocks, view.piece_rows,
        eps=eps, CUMULATIVE=momentum < 0, BLOCK=view.tile_columns,
    )  # fmt: skip


def _normalise(
    view: _View, input: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    mean: Tensor, rstd: Tensor, kind: int, slope: float, running: Sequence[Tensor | None] = (None,) * 3,
    eps: float = 0.0,
) -> Tensor:  # fmt: skip
    y = torch.empty_like(input)
    weight, bias = dense(weight), dense(bias)
    if residual is not None:
        residual = _like(input, residual)
    view.launch(
        _apply, input, residual, weight, bias, y, mean, rstd, *running, piece_rows=view.tile_rows,
        groups=view.groups, group_channels=view.group_channels, eps=eps, negative_slope=slope, KIND=kind,
    )  # fmt: skip
    return y


def _empty_statistics(input: Tensor, groups: int) -> Tensor:
    """Zeros for the statistics of an input without elements, whose size a compiler did not know."""
    shape = (input.shape[0], groups) if groups else (input.shape[1],)
    return torch.zeros(shape, dtype=accumulate_type(input.dtype), device=input.device)


def batch_norm_forward(
    input: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    running_mean: Tensor | None, running_var: Tensor | None, num_batches_tracked: Tensor | None,
    groups: int, training: bool, momentum: float, eps: float, activation: int, negative_slope: float = 0.01,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Normalises ``input`` [N, C, *] over a channel (``groups`` 0) or over each sample's groups of channels.

    Returns ``(y, mean, rstd)``: y = act(normalised + residual) in the input's dtype and layout; mean and rstd [C] or
    [N, groups] in fp32 (fp64 for fp64). In training the statistics are the batch's and the running ones are updated,
    with a negative momentum to the average over ``num_batches_tracked``; else they are the running ones.
    Formulas: https://pytorch.org/docs/stable/generated/torch.nn.BatchNorm2d.html and torch.nn.GroupNorm.html.
    """
    input = _like(input, input)
    if input.numel() == 0:
        if training and num_batches_tracked is not None:
            num_batches_tracked.add_(1)
        return torch.empty_like(input), _empty_statistics(input, groups), _empty_statistics(input, groups)
    view = _view(input, groups)
    shape = (view.outer, groups) if groups else (view.channels,)
    mean, rstd = (torch.empty(shape, dtype=view.accumulate, device=input.device) for _ in range(2))
    given = (running_mean, running_var)
    running_mean, running_var = dense(running_mean), dense(running_var)
    with torch.cuda.device_of(input):
        if training:
            running = (running_mean, running_var, num_batches_tracked)
            _statistics(view, input, mean, rstd, None, running, momentum, eps)
            running = (None, None, num_batches_tracked)
        else:
            running = (running_mean, running_var, None)
        y = _normalise(view, input, residual, weight, bias, mean, rstd, activation, negative_slope, running, eps)
    for theirs, updated in zip(given, (running_mean, running_var), strict=True):
        if training and theirs is not None and updated is not None and updated is not theirs:
            theirs.copy_(updated)
    return y, mean, rstd


def batch_norm_statistics(input: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of :func:`batch_norm_forward`'s groups."""
    input = _like(input, input)
    if input.numel() == 0:
        return _empty_statistics(input, groups), _empty_statistics(input, groups)
    view = _view(input, groups)
    shape = (view.outer, groups) if groups else (view.channels,)
    mean, var = (torch.empty(shape, dtype=view.accumulate, device=input.device) for _ in range(2))
    with torch.cuda.device_of(input):
        _statistics(view, input, mean, None, var)
    return mean, var


def batch_norm_apply(
    input: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    mean: Tensor, rstd: Tensor, activation: int, negative_slope: float = 0.01,
) -> Tensor:  # fmt: skip
    """y of :func:`batch_norm_forward` with ``groups`` 0, from given statistics."""
    input = _like(input, input)
    if input.numel() == 0:
        return torch.empty_like(input)
    with torch.cuda.device_of(input):
        view = _view(input, 0)
        return _normalise(view, input, residual, weight, bias, mean, rstd, activation, negative_slope)


def _backward(
    grad_output: Tensor, input: Tensor, y_or_residual: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    mean: Tensor, rstd: Tensor, groups: int, training: bool, kind: int, output_mask: Sequence[bool], slope: float,
    sums: Tensor | None = None, sums_given: bool = False,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """All of backward; with ``sums`` only its first half, which writes them, or its second, which reads them."""
    input, grad_output = _like(input, input), _like(input, grad_output)
    known = _like(input, y_or_residual) if kind and y_or_residual is not None else None
    grad_input = torch.empty_like(input) if output_mask[0] else None
    grad_residual = torch.empty_like(input) if output_mask[1] else None
    # A bias that is not read may be left out: the weight tells the parameters' dtype as well.
    parameter = next((tensor for tensor in (weight, bias) if tensor is not None), input)
    grad_weight, grad_bias = (
        torch.empty(input.shape[1], dtype=parameter.dtype, device=input.device) if wanted else None
        for wanted in output_mask[2:]
    )
    if input.numel() == 0:
        for sum_ in (sums, grad_weight, grad_bias):
            if sum_ is not None and not sums_given:
                sum_.zero_()
        return grad_input, grad_residual, grad_weight, grad_bias
    view = _view(input, groups)
    weight, bias = dense(weight), dense(bias)
    tensors = (input, known, weight, bias, mean, rstd)
    constants: dict[str, Any] = {"groups": view.groups, "group_channels": view.group_channels, "WEIGHTED": groups > 0}
    constants["negative_slope"] = slope
    second_pass = training and grad_input is not None
    with torch.cuda.device_of(input):
        if not sums_given:
            divisor = view.group_count if sums is None else 1
            if second_pass:
                sums = mean.new_empty((2, view.statistics))
            partials = [
                mean.new_empty(view.partials) if sums is not None or gradient is not None else None
                for gradient in (grad_bias, grad_weight)
            ]
            view.launch(
                _backward_pieces, grad_output, *tensors, None, *partials, None if second_pass else grad_input,
                grad_residual, view.statistics, piece_rows=view.piece_rows, KIND=kind, LAST_FIRST=False, STAGES=2,
                **constants,
            )  # fmt: skip
            if groups and sums is not None:
                view.launch_merge(_merge_groups, *partials, weight, sums, view.statistics, divisor)
            channel_sums = None if groups else sums
            if any(output is not None for output in (channel_sums, grad_weight, grad_bias)):
                tile_entries, tile_channels = _merge_tile(view.lines, view.channels)
                _merge_channels[(triton.cdiv(view.channels, tile_channels),)](
                    *partials, rstd, channel_sums, grad_weight, grad_bias, view.lines, view.outer_lines, view.channels,
                    view.groups, view.group_channels, divisor,
                    ENTRIES=tile_entries, CHANNELS=tile_channels, num_warps=_WARPS,
                )  # fmt: skip
            if second_pass and grad_residual is not None:
                grad_output, kind = grad_residual, 0
        if sums_given or second_pass:
            view.launch(
                _backward_pieces, grad_output, *tensors, sums, None, None, grad_input,
                grad_residual if sums_given else None, view.statistics, piece_rows=view.tile_rows, KIND=kind,
                LAST_FIRST=True, STAGES=1, **constants,
            )  # fmt: skip
    return grad_input, grad_residual, grad_weight, grad_bias


def batch_norm_backward(
    grad_output: Tensor, input: Tensor, y_or_residual: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    mean: Tensor, rstd: Tensor, groups: int, training: bool, activation: int, output_mask: list[bool],
    negative_slope: float = 0.01,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """(grad_input, grad_residual, grad_weight, grad_bias) of :func:`batch_norm_forward`, None for those that
    ``output_mask`` does not ask for.

    ``y_or_residual``: y with a ReLU, whose mask is y > 0; the residual with other activations. None where there was
    no residual.
    """
    given = (grad_output, input, y_or_residual, weight, bias, mean, rstd)
    return _backward(*given, groups, training, activation, output_mask, negative_slope)


def batch_norm_backward_sums(
    grad_output: Tensor, input: Tensor, y_or_residual: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    mean: Tensor, rstd: Tensor, activation: int, output_mask: list[bool], negative_slope: float = 0.01,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """(sums, grad_weight, grad_bias); sums [2, C]: of g, what passes the activation, and of g * (input - mean)."""
    sums = mean.new_empty((2, mean.numel()))
    mask = (False, False, *output_mask)
    given = (grad_output, input, y_or_residual, weight, bias, mean, rstd)
    gradients = _backward(*given, 0, True, activation, mask, negative_slope, sums)
    return sums, *gradients[2:]


def batch_norm_backward_apply(
    grad_output: Tensor, input: Tensor, y_or_residual: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    mean: Tensor, rstd: Tensor, sums: Tensor, activation: int, output_mask: list[bool], negative_slope: float = 0.01,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """(grad_input, grad_residual) from the sums over all processes, divided by the count of their elements."""
    mask = (*output_mask, False, False)
    given = (grad_output, input, y_or_residual, weight, bias, mean, rstd)
    return _backward(*given, 0, True, activation, mask, negative_slope, sums, sums_given=True)[:2]


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "batch_norm_forward": batch_norm_forward,
    "batch_norm_backward": batch_norm_backward,
    "batch_norm_statistics": batch_norm_statistics,
    "batch_norm_apply": batch_norm_apply,
    "batch_norm_backward_sums": batch_norm_backward_sums,
    "batch_norm_backward_apply": batch_norm_backward_apply,
}
