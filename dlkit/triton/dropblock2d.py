"""DropBlock in Triton, over the contract of csrc/dropblock2d/kernel.h and the random bits of dropout.

Seeds are drawn into a bit each, a byte a Philox block, once. An element is dropped where one of the size x size corners
left of and above it is a seed: rows of adjacent bits, of which two or three bytes a row are read. That is done twice in
forward, to count and to apply, so that only the seeds are kept. Layouts that are not contiguous are copied.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import TRITON_TYPE, accumulate_type
from .dropout import _begin, _kept_bytes, given_state, new_state

_jit = triton.jit(do_not_specialize=["seed", "offset", "high", "low", "blocks", "numel", "rows", "columns", "width"])
_TILE = 512  # elements of a program


@_jit
def _draw_seeds(
    kept, rng_state, seed: tl.int64, offset: tl.int64, high: tl.int32, low: tl.int32, blocks: tl.int64,
    GIVEN: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    seed, counter = _begin(rng_state, seed, offset, GIVEN)
    block = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    tl.store(kept + block, _kept_bytes(seed, counter, block, high, low).to(tl.uint8), mask=block < blocks)


@triton.jit
def _dropped(kept, element, inside, rows, columns, width, SIZE: tl.constexpr):
    """Whether each element lies in a square of the seeds, of which `kept` has no bit set."""
    height = rows + (SIZE - 1)
    row = element // width
    plane = row // height
    row, column = row % height, element % width
    first = tl.maximum(column - (SIZE - 1), 0)
    past = tl.minimum(column + 1, columns)
    found = tl.zeros_like(element)
    for up in range(SIZE):
        corner = row - up
        here = inside & (corner >= 0) & (corner < rows)
        start = (plane * rows + corner) * columns
        begin, end = start + first, start + past
        for k in tl.static_range((SIZE + 14) // 8):
            byte = begin // 8 + k
            seeds = ~tl.load(kept + byte, mask=here & (byte * 8 < end), other=0xFF).to(tl.int32)
            after = tl.maximum(begin - byte * 8, 0).to(tl.int32)
            before = tl.minimum(tl.maximum(end - byte * 8, 0), 8).to(tl.int32)
            found |= (seeds & ((1 << before) - 1) & (0xFF << after)).to(tl.int64)
    return found != 0


@_jit
def _count(kept, rng_state, numel: tl.int64, rows: tl.int64, columns: tl.int64, width: tl.int64,
           SIZE: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    element = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = element < numel
    dropped = _dropped(kept, element, inside, rows, columns, width, SIZE) & inside
    tl.atomic_add(rng_state + 2, tl.sum(dropped.to(tl.int64), 0))


@_jit
def _apply(
    x, y, kept, rng_state, numel: tl.int64, rows: tl.int64, columns: tl.int64, width: tl.int64,
    SIZE: tl.constexpr, ACC: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    left = tl.maximum(numel - tl.load(rng_state + 2), 1)
    scale = (numel.to(tl.float64) / left.to(tl.float64)).to(ACC)
    element = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = element < numel
    dropped = _dropped(kept, element, inside, rows, columns, width, SIZE)
    value = tl.load(x + element, mask=inside).to(ACC) * scale
    tl.store(y + element, tl.where(dropped, 0.0, value).to(y.dtype.element_ty), mask=inside)


def _launch(
    input: Tensor, output: Tensor, p: float, block_size: int, drawn: Tensor | None, known: Tensor | None,
    generator: torch.Generator | None,
) -> Tensor:  # fmt: skip
    """``drawn``: seed and offset where they are given; ``known``: forward's state. Returns the state."""
    rng_state = torch.zeros(3, dtype=torch.int64, device=input.device) if known is None else known.to(input.device)
    if input.numel() == 0:
        return rng_state
    samples, channels, height, width = input.shape
    size = min(block_size, height, width)
    rows, columns = height - size + 1, width - size + 1
    probability = p / (size * size) * (height * width) / (rows * columns)
    source: Tensor | None
    if known is not None:
        source, numbers = given_state(input, rng_state)
    else:
        source, numbers = new_state(input, probability, generator) if drawn is None else given_state(input, drawn)
        if source is not None and numbers is None:
            rng_state[:2] = source
        source = rng_state  # the kernel writes the numbers there
    seed, offset = numbers or (0, 0)
    x = input.contiguous()
    y = output if output.is_contiguous() else torch.empty_like(x)
    threshold = int(probability * 2.0**32 + 0.5)
    blocks = triton.cdiv(samples * channels * rows * columns, 8)
    kept = torch.empty(blocks, dtype=torch.uint8, device=input.device)
    shape = (rows, columns, width)
    grid = (triton.cdiv(x.numel(), _TILE),)
    with torch.cuda.device_of(input):
        _draw_seeds[(triton.cdiv(blocks, _TILE),)](
            kept, source, seed, offset, threshold >> 16, threshold & 0xFFFF, blocks, GIVEN=numbers is None, TILE=_TILE
        )
        if known is None:
            _count[grid](kept, rng_state, x.numel(), *shape, SIZE=size, TILE=_TILE)
        _apply[grid](
            x, y, kept, rng_state, x.numel(), *shape, SIZE=size, ACC=TRITON_TYPE[accumulate_type(x.dtype)], TILE=_TILE
        )
    if y is not output:
        output.copy_(y)
    return rng_state


def dropblock2d_forward(
    input: Tensor, rng_state: Tensor | None, p: float, block_size: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """DropBlock with the seeds of ``rng_state`` or new ones. Returns y, in the input's dtype and memory format, and the
    state, int64 [3]: seed, offset and how many elements were dropped."""
    y = torch.empty_like(input)
    return y, _launch(input, y, p, block_size, rng_state, None, generator)


def dropblock2d_forward_(
    input: Tensor, rng_state: Tensor | None, p: float, block_size: int, generator: torch.Generator | None = None
) -> Tensor:
    """:func:`dropblock2d_forward` in place. Returns the state."""
    return _launch(input, input, p, block_size, rng_state, None, generator)


def dropblock2d_apply(input: Tensor, rng_state: Tensor, p: float, block_size: int) -> Tensor:
    """The pure function of a state that :func:`dropblock2d_forward` returned; its own backward."""
    y = torch.empty_like(input)
    _launch(input, y, p, block_size, None, rng_state, None)
    return y


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "dropblock2d_forward": dropblock2d_forward,
    "dropblock2d_forward_": dropblock2d_forward_,
    "dropblock2d_apply": dropblock2d_apply,
}
