"""Dropout in Triton: the stream of csrc/common/philox.h, bit for bit, over the form of csrc/dropout/kernel.h.

y = keep(i // inner) ? x * scale + shift : dropped. Each byte is read and written once; dropped runs are not read.
Elements with bits of their own (inner 1): a thread draws one Philox block, whose eight 16-bit lanes shrink to a byte
of keep bits, so that little moves where another thread holds some of the 8 elements (in types wider than 16 bits).
Whole channels or samples: a tile of runs, a block for each run. The second block, which breaks ties, is drawn only in
tiles where 16 bits met the threshold: 1 in 32 tiles of 2048 elements. Layouts other than contiguous are copied, there
and back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import TRITON_TYPE, accumulate_type
from .layer_norm import layer_norm_backward, layer_norm_forward

# Sizes as in layer_norm.py: in units of VEC elements, and one binary for all of them.
_jit = triton.jit(do_not_specialize=["seed", "offset", "high", "low", "numel", "runs", "groups", "parts"])


@triton.jit
def _philox(seed, counter, block):
    """Philox4x32-10 of the key `seed` and the counter (`counter`, `block`), 64 bits each: four words."""
    c0, c1 = counter.to(tl.uint32), (counter >> 32).to(tl.uint32)
    c2, c3 = block.to(tl.uint32), (block >> 32).to(tl.uint32)
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        product0 = c0.to(tl.uint64) * 0xD2511F53
        product1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (product1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (product0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = product1.to(tl.uint32)
        c3 = product0.to(tl.uint32)
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def _lane_masks(w0, w1, w2, w3, limit):
    """For each block a byte: bit j is set if the 16 bits of lane j are at least `limit`."""
    mask = tl.zeros_like(w0)
    for j in tl.static_range(4):
        word = w0 if j == 0 else w1 if j == 1 else w2 if j == 2 else w3
        mask |= ((word & 0xFFFF) >= limit).to(tl.uint32) << (2 * j)
        mask |= ((word >> 16) >= limit).to(tl.uint32) << (2 * j + 1)
    return mask


@triton.jit
def _kept_bytes(seed, counter, block, high, low):
    """For each block a byte: bit j is set if its element j stays."""
    w0, w1, w2, w3 = _philox(seed, counter, block)
    kept = _lane_masks(w0, w1, w2, w3, high)
    if low != 0:  # 16 bits may not be enough
        ties = kept ^ _lane_masks(w0, w1, w2, w3, high + 1)
        if tl.max(ties, 0) > 0:
            w0, w1, w2, w3 = _philox(seed, counter + 1, block)
            kept &= _lane_masks(w0, w1, w2, w3, low) | (ties ^ 0xFF)
    return kept


@triton.jit
def _own_lane(seed, counter, element):
    """The 16 bits of each element, from a block of its own."""
    w0, w1, w2, w3 = _philox(seed, counter, element // 8)
    lane = (element % 8).to(tl.uint32)
    word = tl.where(lane < 4, tl.where(lane < 2, w0, w1), tl.where(lane < 6, w2, w3))
    return (word >> (lane % 2 * 16)) & 0xFFFF


@triton.jit
def _begin(rng_state, seed, offset, GIVEN: tl.constexpr):
    """Seed and counter: from `rng_state` where it is GIVEN, else from the arguments, and then into `rng_state`."""
    if GIVEN:
        seed = tl.load(rng_state)
        offset = tl.load(rng_state + 1)
    elif rng_state is not None:
        if tl.program_id(0) == 0:
            tl.store(rng_state, seed)
            tl.store(rng_state + 1, offset)
    return seed.to(tl.uint64), offset.to(tl.uint64) >> 2


@triton.jit
def _value(x, keep, scale, shift, dropped, ACC: tl.constexpr, AFFINE: tl.constexpr):
    if AFFINE:
        value = tl.fma(x.to(ACC), tl.full(x.shape, scale, ACC), tl.full(x.shape, shift, ACC))
        return tl.where(keep, value, dropped).to(x.dtype)
    else:
        return tl.where(keep, x.to(ACC) * scale, 0.0).to(x.dtype)


@triton.jit
def _sum(x, residual, keep, scale, ACC: tl.constexpr):
    return tl.where(keep, tl.fma(x.to(ACC), tl.full(x.shape, scale, ACC), residual), residual).to(x.dtype)


@_jit
def _drop_elements(
    x, residual, y, rng_state, seed: tl.int64, offset: tl.int64, high: tl.int32, low: tl.int32, numel: tl.int64,
    scale, shift, dropped,
    GIVEN: tl.constexpr, AFFINE: tl.constexpr, ACC: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    seed, counter = _begin(rng_state, seed, offset, GIVEN)
    program = tl.program_id(0).to(tl.int64)
    block = program * BLOCKS + tl.arange(0, BLOCKS)
    kept = _kept_bytes(seed, counter, block, high, low)
    lane = tl.arange(0, 8)[None, :]
    keep = ((kept[:, None] >> lane.to(tl.uint32)) & 1) != 0

    start = program * (BLOCKS * 8)
    if residual is not None:
        residual += start
    lane = tl.arange(0, BLOCKS)[:, None] * 8 + lane
    x += start
    y += start
    if start + BLOCKS * 8 <= numel:
        if residual is not None:
            other = tl.load(residual + lane).to(ACC)
            tl.store(y + lane, _sum(tl.load(x + lane), other, keep, scale, ACC))
        else:
            tl.store(y + lane, _value(tl.load(x + lane), keep, scale, shift, dropped, ACC, AFFINE))
    else:
        inside = lane < numel - start
        value = tl.load(x + lane, mask=inside, other=0.0)
        if residual is not None:
            other = tl.load(residual + lane, mask=inside, other=0.0).to(ACC)
            tl.store(y + lane, _sum(value, other, keep, scale, ACC), mask=inside)
        else:
            tl.store(y + lane, _value(value, keep, scale, shift, dropped, ACC, AFFINE), mask=inside)


@_jit
def _drop_runs(
    x, y, rng_state, seed: tl.int64, offset: tl.int64, high: tl.int32, low: tl.int32, runs: tl.int64, groups: tl.int64,
    parts: tl.int32, scale, shift, dropped,
    GIVEN: tl.constexpr, AFFINE: tl.constexpr, ACC: tl.constexpr, VEC: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    seed, counter = _begin(rng_state, seed, offset, GIVEN)
    first = (tl.program_id(0) // parts).to(tl.int64) * ROWS
    start = (tl.program_id(0) % parts).to(tl.int64) * BLOCK
    run = first + tl.arange(0, ROWS)
    bits = _own_lane(seed, counter, run)
    keep = bits >= high
    if low != 0:
        ties = bits == high
        if tl.max(ties.to(tl.int32), 0) > 0:
            keep &= ~(ties & (_own_lane(seed, counter + 1, run) < low))

    keep = keep[:, None]
    inner = groups * VEC
    col = tl.arange(0, BLOCK)[None, :]
    inside = (run < runs)[:, None] & (col < inner - start)
    base = first * inner + start
    at = tl.arange(0, ROWS)[:, None] * (groups.to(tl.int32) * VEC) + col  # several runs span no more than a tile
    value = tl.load(x + base + at, mask=inside & keep, other=0.0)
    tl.store(y + base + at, _value(value, keep, scale, shift, dropped, ACC, AFFINE), mask=inside)


_TILE = 2048  # elements of a program: 16 a thread


def _launch(
    input: Tensor, output: Tensor, rng_state: Tensor | None, drawn: tuple[int, int] | None, p: float, inner: int,
    scale: float, shift: float, dropped: float, residual: Tensor | None = None,
) -> None:  # fmt: skip
    """``drawn``: seed and offset, which go into ``rng_state`` if that is not None; without it they come from there."""
    x = input.contiguous()
    y = output if output.is_contiguous() else torch.empty(input.shape, dtype=input.dtype, device=input.device)
    accumulate = accumulate_type(input.dtype)
    # A float argument has 32 bits, a constant has 64.
    kind: Callable[[float], Any] = tl.constexpr if accumulate == torch.float64 else float
    seed, offset = drawn or (0, 0)
    threshold = int(p * 2.0**32 + 0.5)
    source = (y, rng_state, seed, offset, threshold >> 16, threshold & 0xFFFF)
    constants = (kind(scale), kind(shift), kind(dropped))
    options: dict[str, Any] = {
        "GIVEN": drawn is None, "AFFINE": shift != 0 or dropped != 0, "ACC": TRITON_TYPE[accumulate], "num_warps": 4,
    }  # fmt: skip
    with torch.cuda.device_of(input):
        if inner == 1:
            _drop_elements[(triton.cdiv(x.numel(), _TILE),)](
                x, None if residual is None else residual.contiguous(), *source, x.numel(), *constants, **options,
                BLOCKS=_TILE // 8,
            )  # fmt: skip
        else:
            vec = 16 // x.element_size()
            vec = vec if inner % vec == 0 else 1
            block = min(triton.next_power_of_2(inner), _TILE)
            runs, parts = x.numel() // inner, triton.cdiv(inner, block)
            _drop_runs[(triton.cdiv(runs, _TILE // block) * parts,)](
                x, *source, runs, inner // vec, parts, *constants, **options, VEC=vec, ROWS=_TILE // block, BLOCK=block
            )
    if y is not output:
        output.copy_(y)


def _capturing(input: Tensor) -> bool:
    return input.is_cuda and torch.cuda.is_current_stream_capturing()


def _draw(input: Tensor, generator: torch.Generator | None) -> tuple[int, int]:
    """Seed and offset as the C++ ops take them."""
    from dlkit import random  # here: the kernels are compiled without the package too

    index = torch.cuda.current_device() if input.is_cuda and input.device.index is None else input.device.index
    default = torch.cuda.default_generators[index] if input.is_cuda else torch.default_generator
    generator = default if generator is None else generator
    kind = random.DEFAULT if generator is default else random.GENERATOR
    before = random.replay_draw(kind)
    if before is not None:
        return _signed(before[0]), _signed(before[1])
    if input.is_cuda:
        seed, offset = _signed(generator.initial_seed()), generator.get_offset()
        generator.set_offset(offset + 8)
    else:
        seed, offset = int(torch.empty((), dtype=torch.int64).random_(-(2**63), None, generator=generator)), 0
    random.record_draw(kind, seed, offset)
    return seed, _signed(offset)


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def new_state(input: Tensor, p: float, generator: torch.Generator | None) -> tuple[Tensor, tuple[int, int] | None]:
    """The state of a call, as ``rng_state`` and ``drawn`` of a launch. Nothing is drawn for p = 0 or 1."""
    rng_state = torch.empty(2, dtype=torch.int64, device=input.device)
    if not 0 < p < 1:
        return rng_state, (0, 0)
    if not _capturing(input):
        return rng_state, _draw(input, generator)
    # The generator's numbers are on the device during a capture: drawn there, they differ at each replay.
    return rng_state.random_(-(2**63), None, generator=generator), None


def given_state(input: Tensor, rng_state: Tensor) -> tuple[Tensor | None, tuple[int, int] | None]:
    """A state that exists, as ``rng_state`` and ``drawn`` of a launch."""
    if rng_state.device == input.device:
        return rng_state, None
    if rng_state.device.type != "cpu":
        raise RuntimeError(
            f"dropout: expected rng_state on {input.device} (the device of input) or cpu, got {rng_state.device}"
        )
    if _capturing(input):
        raise RuntimeError(
            "dropout: a dlkit.random.Philox cannot be captured in a CUDA graph, whose replays would all draw the same"
            " mask; use a torch.Generator of the device"
        )
    seed, offset = rng_state.tolist()
    return None, (seed, offset)


def _forward_into(
    input: Tensor, output: Tensor, p: float, inner: int, scale: float, shift: float, dropped: float,
    generator: torch.Generator | None, residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    if input.numel() == 0:
        return torch.zeros(2, dtype=torch.int64, device=input.device)
    rng_state, drawn = new_state(input, p, generator)
    _launch(input, output, rng_state, drawn, p, inner, scale, shift, dropped, residual)
    return rng_state


def _apply_into(
    input: Tensor, output: Tensor, rng_state: Tensor, p: float, inner: int, scale: float, shift: float, dropped: float,
    residual: Tensor | None = None,
) -> None:  # fmt: skip
    if input.numel() > 0:
        _launch(input, output, *given_state(input, rng_state), p, inner, scale, shift, dropped, residual)


def dropout_forward(
    input: Tensor, p: float, inner: int, scale: float, shift: float, dropped: float,
    generator: torch.Generator | None = None, keep_bits: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Draws and applies a mask that has a bit for every ``inner`` elements: ``y = keep ? x * scale + shift : dropped``.

    Returns y, in the input's dtype and memory format, and the state that was drawn, int64 [2]: seed and offset.
    ``keep_bits`` is for the CPU's own kernels: here and in the functions below no mask is ever kept.
    """
    y = torch.empty_like(input)
    return y, _forward_into(input, y, p, inner, scale, shift, dropped, generator)


def dropout_forward_(
    input: Tensor, rng_state: Tensor | None, p: float, inner: int, scale: float, shift: float, dropped: float,
    generator: torch.Generator | None = None, keep_bits: bool = False,
) -> Tensor:  # fmt: skip
    """:func:`dropout_forward` in place, with the mask of ``rng_state`` where that is given. Returns the state."""
    if rng_state is None:
        return _forward_into(input, input, p, inner, scale, shift, dropped, generator)
    _apply_into(input, input, rng_state, p, inner, scale, shift, dropped)
    return rng_state.clone()


def dropout_apply(
    input: Tensor, rng_state: Tensor, p: float, inner: int, scale: float, shift: float, dropped: float
) -> Tensor:
    """Applies the mask of a state that :func:`dropout_forward` drew; its own backward with shift and dropped 0."""
    y = torch.empty_like(input)
    _apply_into(input, y, rng_state, p, inner, scale, shift, dropped)
    return y


def _scale(p: float) -> float:
    return 1 / (1 - p) if p < 1 else 0.0


def dropout_add_forward(
    input: Tensor, residual: Tensor, rng_state: Tensor | None, p: float, generator: torch.Generator | None = None,
    keep_bits: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``dropout(input) + residual``, rounded once, by the mask of ``rng_state`` or a new one. Returns (sum, state)."""
    y = torch.empty(input.shape, dtype=input.dtype, device=input.device)
    if rng_state is None:
        return y, _forward_into(input, y, p, 1, _scale(p), 0.0, 0.0, generator, residual)
    _apply_into(input, y, rng_state, p, 1, _scale(p), 0.0, 0.0, residual)
    return y, rng_state.clone()


def dropout_layer_norm_forward(
    input: Tensor, residual: Tensor, rng_state: Tensor | None, p: float, normalized_ndim: int, weight: Tensor | None,
    bias: Tensor | None, eps: float, rms: bool, stats: bool, generator: torch.Generator | None = None,
    keep_bits: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor]:  # fmt: skip
    """:func:`dropout_add_forward`, then the norm of the sum: two kernels. Returns (y, sum, mean, rstd, state)."""
    sum, drawn = dropout_add_forward(input, residual, rng_state, p, generator)
    y, _, mean, rstd = layer_norm_forward(sum, None, normalized_ndim, weight, bias, eps, rms, stats)
    return y, sum, mean, rstd, drawn


def dropout_layer_norm_backward(
    grad_output: Tensor, grad_sum: Tensor | None, input: Tensor, mean: Tensor | None, rstd: Tensor,
    weight: Tensor | None, bias: Tensor | None, rng_state: Tensor, p: float, normalized_ndim: int,
    output_mask: list[bool],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """The gradients of input, residual, weight and bias; ``input`` is the sum. Two kernels."""
    mask = [output_mask[0] or output_mask[1], *output_mask[2:]]
    grad, grad_weight, grad_bias = layer_norm_backward(
        grad_output, grad_sum, input, mean, rstd, weight, bias, normalized_ndim, mask
    )
    grad_input = None
    if output_mask[0] and grad is not None:
        grad_input = dropout_apply(grad, rng_state, p, 1, _scale(p), 0.0, 0.0)
    return grad_input, grad if output_mask[1] else None, grad_weight, grad_bias


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "dropout_add_forward": dropout_add_forward,
    "dropout_layer_norm_forward": dropout_layer_norm_forward,
    "dropout_layer_norm_backward": dropout_layer_norm_backward,
    "dropout_forward": dropout_forward,
    "dropout_forward_": dropout_forward_,
    "dropout_apply": dropout_apply,
}
