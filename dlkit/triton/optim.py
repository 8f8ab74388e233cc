"""The optimizers in Triton: a step over many tensors, the norm of many gradients, and their scaling.

Each array is read once and, but for gradients, written once, as in csrc/optim/cuda.cu; the formulas are those of
csrc/optim/math.h. A launch serves all tensors of the same dtypes, group, step count and alignment. Their
addresses lie in a table on the device: one copy of 112 bytes a tensor whenever an address changed, kept while none has.
That copy comes from pinned memory and waits for nothing, but Python walks over the tensors at each step (some 5 us
each), so many small tensors are where the compiled kernels are better. CUDA graphs capture a step whose table is there
already, from a step with the same addresses before.
Step counters on the device go up in a launch of their own. Nothing of this has run on a GPU yet.
"""

from __future__ import annotations

import math
import struct
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import TRITON_TYPE, accumulate_type, divide, multiply

_OPTIONS = 14  # a group; csrc/optim/op.cpp says which
_STATES = 3
_BLOCK = 256  # elements that share a scale in an 8-bit state
_CHUNK_TILES = 8  # tiles a program walks over
_TILE = 1024  # elements: 8 a thread with 4 warps
_WARPS = 4

# The columns of a table. Addresses are 0 where the step has no such array.
_FIRST_CHUNK, _NUMEL, _INDEX, _PARAM, _GRAD, _STATE, _SCALE, _REMAINDER, _EMA, _STEP = 0, 1, 2, 3, 4, 5, 8, 11, 12, 13
_ROW = 14

# In annotations: the bits of an fp64 argument, since Triton's float arguments are fp32.
if TYPE_CHECKING:
    i64 = Any
else:
    i64 = tl.int64
_jit = triton.jit(
    do_not_specialize=[
        "count", "lr", "weight_decay", "eps", "beta1", "beta2", "momentum", "dampening", "alpha", "ema_decay",
        "correction1", "correction2", "max_norm", "seed", "chunks",
    ]
)  # fmt: skip


@triton.jit
def _double(bits):
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def _find(table, count, chunk, ROW: tl.constexpr):
    """The row of the tensor that has this chunk."""
    low = 0
    high = count
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(table + middle * ROW) <= chunk:
            low = middle
        else:
            high = middle
    return table + low * ROW


@triton.jit
def _pointers(row, column: tl.constexpr, first, at, TYPE: tl.constexpr, ALIGN: tl.constexpr):
    """Pointers to the elements `first` + `at` of an array in the table; `first` is where a chunk begins."""
    address = tl.load(row + column) + first * (TYPE.primitive_bitwidth // 8)
    # The compiler asks the pointers themselves: a hint on the address is lost at the cast.
    return tl.multiple_of(address.to(tl.pointer_type(TYPE)) + at, ALIGN)


@triton.jit
def _clip_coefficient(norm, max_norm):
    coefficient = max_norm / (norm + 1e-6)
    return tl.where(coefficient > 1, 1.0, coefficient)  # NaN stays


@triton.jit
def _power(base, exponent):
    """base^exponent for whole exponents, by squaring, in fp64."""
    result = base * 0 + 1
    n = exponent.to(tl.int64)
    while n > 0:
        if n % 2 == 1:
            result = result * base
        base = base * base
        n = n // 2
    return result


@triton.jit
def _root(value):
    if value.dtype == tl.float64:
        return tl.sqrt(value)
    else:
        return tl.sqrt_rn(value)


@triton.jit
def _splat(value, like):
    return tl.broadcast_to(value, like.shape)


@triton.jit
def _lerp(a, b, weight):
    return tl.where(weight < 0.5, tl.fma(_splat(weight, b), b - a, a), tl.fma(_splat(weight - 1, b), b - a, b))


@triton.jit
def _has_sign(ALGORITHM: tl.constexpr, STATE: tl.constexpr):
    if ALGORITHM == "adam":
        return STATE == 0
    else:
        return ALGORITHM == "sgd" or STATE > 0


@triton.jit
def _decode(codes, maps, SIGNED: tl.constexpr):
    return tl.load(maps + SIGNED * 512 + codes.to(tl.int32))


@triton.jit
def _encode(values, maps, SIGNED: tl.constexpr):
    """How many midpoints lie below each value."""
    midpoints = maps + (SIGNED * 512 + 256)
    code = tl.zeros(values.shape, tl.int32)
    for bit in tl.static_range(8):
        code += tl.where(tl.load(midpoints + code + ((128 >> bit) - 1)) < values, 128 >> bit, 0)
    return code.to(tl.uint8)


@triton.jit
def _store_coded(pointers, scales, values, maps, at, mask, SIGNED: tl.constexpr, TILE: tl.constexpr):
    """A tile of an 8-bit state: a scale each 256 elements, a code each element."""
    rows: tl.constexpr = TILE // 256
    magnitudes = tl.reshape(tl.where(mask, tl.abs(values), 0.0), (rows, 256))
    scale = tl.max(magnitudes, 1, keep_dims=True)
    nan = tl.max((magnitudes != magnitudes).to(tl.int32), 1, keep_dims=True) != 0
    scale = tl.where(nan, float("nan"), scale)
    divisor = tl.where(scale == 0, 1.0, scale)
    divided = tl.div_rn(tl.reshape(values, (rows, 256)), tl.broadcast_to(divisor, (rows, 256)))
    codes = _encode(tl.reshape(divided, (TILE,)), maps, SIGNED)
    wide = tl.reshape(tl.broadcast_to(scale, (rows, 256)), (TILE,))
    if not SIGNED:  # what is above zero never gets the code of 0
        codes = tl.where((codes == 0) & (values > 0) & (wide - wide == 0), 1, codes).to(tl.uint8)
    tl.store(pointers, codes, mask=mask)
    tl.store(scales + at // 256, wide, mask=mask & (at % 256 == 0))


@triton.jit
def _exponent(value):
    """Its power of two, 2^-14 below that, as bits."""
    exponent = value.to(tl.int32, bitcast=True) & 0x7F800000
    return tl.maximum(exponent, (127 - 14) << 23)


@triton.jit
def _from_bits(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _join(high, rest):
    """The fp32 value of a 16-bit parameter and its remainder."""
    if high.dtype == tl.bfloat16:
        bits = high.to(tl.int16, bitcast=True).to(tl.int32) << 16
        return _from_bits(bits + tl.where(_has_remainder(bits), rest.to(tl.int32), 0))
    else:
        wide = high.to(tl.float32)
        total = wide + rest.to(tl.float32) * _from_bits(_exponent(wide) - (26 << 23))
        belongs = (rest != 0) & (high.to(tl.int16, bitcast=True) != 0) & (total.to(tl.float16).to(tl.float32) == wide)
        return tl.where(belongs, total, wide)


@triton.jit
def _has_remainder(bits):
    """Of a bf16 value in an fp32 one's bits: whether it is neither zero nor infinite nor NaN."""
    return ((bits - 0x10000) & 0x7FFF0000) < 0x7F7F0000


@triton.jit
def _split(value, like):
    if like.dtype == tl.bfloat16:
        bits = value.to(tl.int32, bitcast=True)
        rounded = (bits + 0x8000) & -0x10000
        rest = tl.where(_has_remainder(rounded), bits - rounded, 0)
        high = tl.where(value != value, 0x7FC0, rounded >> 16 & 0xFFFF)
        return high.to(tl.uint16).to(tl.bfloat16, bitcast=True), rest.to(tl.int16)
    else:
        high = value.to(tl.float16)
        wide = high.to(tl.float32)
        inverse = _from_bits((254 << 23) - (_exponent(wide) - (26 << 23)))
        rest = (value - wide) * inverse
        rounded = tl.maximum(tl.minimum(rest + 12582912.0 - 12582912.0, 32767.0), -32767.0)
        rounded = tl.where(rest - rest == 0, rounded, 0.0)
        sign = tl.where((wide == 0) & (rounded != 0), -0x8000, 0).to(tl.int16)
        high = (high.to(tl.int16, bitcast=True) | sign).to(tl.float16, bitcast=True)
        return high, rounded.to(tl.int32).to(tl.int16)


@triton.jit
def _random_bits(seed, index, step, first, STREAM: tl.constexpr, TILE: tl.constexpr):
    """16 bits an element, eight of a Philox block. STREAM: 0 for the parameter, s + 1 for state s."""
    block = first // 8 + tl.arange(0, TILE // 8)
    zero = block.to(tl.uint32) * 0
    low = (block & 0xFFFFFFFF).to(tl.uint32)
    high = (block >> 32 | STREAM << 28).to(tl.uint32)
    k0 = (seed & 0xFFFFFFFF).to(tl.uint32)
    k1 = (seed >> 32 & 0xFFFFFFFF).to(tl.uint32)
    a, b, c, d = tl.philox_impl(zero + index.to(tl.uint32), zero + step.to(tl.uint32), low, high, zero + k0, zero + k1)
    words = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (TILE // 2,))
    return tl.reshape(tl.join(words & 0xFFFF, words >> 16), (TILE,))


@triton.jit
def _round_stochastically(value, bits, like):
    if like.dtype == tl.bfloat16:
        rounded = (value.to(tl.uint32, bitcast=True) + bits) >> 16
        return tl.where(value != value, 0x7FC0, rounded).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        exponent = _exponent(value) - (10 << 23)
        unit = _from_bits(exponent)
        steps = tl.abs(value) * _from_bits((254 << 23) - exponent) + (bits >> 3).to(tl.float32) * (1.0 / 8192)
        whole = tl.where(steps < 4096, steps, 0.0).to(tl.int32).to(tl.float32)
        rounded = tl.where(steps < 4096, whole, steps) * unit
        rounded = tl.where(value < 0, -rounded, rounded)
        return tl.where(value - value == 0, rounded, value).to(like.dtype)


@_jit
def _step(
    table, count, maps, lr_pointer, grad_norm, grad_scale, found_inf,
    lr: i64, weight_decay: i64, eps: i64, beta1: i64, beta2: i64, momentum: i64, dampening: i64, alpha: i64,
    ema_decay: i64, correction1: i64, correction2: i64, max_norm: i64, seed: i64,
    ALGORITHM: tl.constexpr, TYPE: tl.constexpr, GRAD: tl.constexpr, STATE: tl.constexpr, ACC: tl.constexpr,
    STEP: tl.constexpr, HAS1: tl.constexpr, HAS2: tl.constexpr, HAS3: tl.constexpr, REMAINDER: tl.constexpr,
    EMA: tl.constexpr, DECOUPLED: tl.constexpr, NESTEROV: tl.constexpr, MAXIMIZE: tl.constexpr, DECAY: tl.constexpr,
    WRITE_GRADS: tl.constexpr, STOCHASTIC: tl.constexpr, STOCHASTIC_STATES: tl.constexpr, VEC: tl.constexpr,
    ALIGN: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr, ROW: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0).to(tl.int64)
    row = _find(table, count, chunk, ROW)
    first_group = (chunk - tl.load(row)) * (TILE * TILES // VEC)
    left = tl.minimum(tl.load(row + 1) - first_group, TILE * TILES // VEC).to(tl.int32)
    first = first_group * VEC
    if found_inf is not None:
        left = tl.where(tl.load(found_inf) != 0, 0, left)
    tiles = (left * VEC + TILE - 1) // TILE

    # As Scalars in math.h: in fp64, rounded once.
    factor = _double(lr) * 0 + 1
    if grad_scale is not None:
        factor = factor / tl.load(grad_scale).to(tl.float64)
    if grad_norm is not None:
        factor = factor * _clip_coefficient(tl.load(grad_norm).to(tl.float64), _double(max_norm))
    rate = _double(lr)
    if lr_pointer is not None:
        rate = tl.load(lr_pointer).to(tl.float64)
    bias1 = _double(correction1)
    bias2 = _double(correction2)
    t = tl.load(row + 2) * 0
    if STEP is not None:
        counted = (tl.load(tl.load(row + 13).to(tl.pointer_type(STEP))) + 1).to(tl.float64)
        t = counted.to(tl.int64)
        if ALGORITHM == "adam":
            bias1 = 1 - _power(_double(beta1), counted)
            bias2 = 1 - _power(_double(beta2), counted)
    root_factor = (1 / tl.sqrt(bias2)).to(ACC)
    size = -rate
    if ALGORITHM == "adam":
        size = -rate / bias1
    size = size.to(ACC)
    factor = factor.to(ACC)
    shrink = (1 - rate * _double(weight_decay)).to(ACC)
    l2 = _double(weight_decay).to(ACC)
    small = _double(eps).to(ACC)
    average = _double(alpha)
    square = _double(alpha)
    if ALGORITHM == "adam":
        average = _double(beta1)
        square = _double(beta2)
    average_rest = (1 - average).to(ACC)
    square_rest = (1 - square).to(ACC)
    square = square.to(ACC)
    keep = _double(momentum).to(ACC)
    dampening_rest = (1 - _double(dampening)).to(ACC)
    ema_rest = (1 - _double(ema_decay)).to(ACC)

    for tile in range(tiles):
        at = tile * TILE + tl.arange(0, TILE)
        start = first + tile * TILE
        mask = at < left * VEC
        params = _pointers(row, 3, first, at, TYPE, ALIGN)
        grads = _pointers(row, 4, first, at, GRAD, ALIGN)
        g = tl.load(grads, mask=mask, other=0).to(ACC)
        stored = tl.load(params, mask=mask, other=0)
        if HAS1:
            s1 = _load_state(row, 0, first, at, mask, maps, ALGORITHM, STATE, ACC, ALIGN)
        if HAS2:
            s2 = _load_state(row, 1, first, at, mask, maps, ALGORITHM, STATE, ACC, ALIGN)
        if HAS3:
            s3 = _load_state(row, 2, first, at, mask, maps, ALGORITHM, STATE, ACC, ALIGN)
        if EMA:
            ema = tl.load(_pointers(row, 12, first, at, ACC, ALIGN), mask=mask, other=0)
        if REMAINDER:
            rest_pointers = _pointers(row, 11, first, at, tl.int16, ALIGN)
            p = _join(stored, tl.load(rest_pointers, mask=mask, other=0))
        else:
            p = stored.to(ACC)
        g = multiply(g, factor)
        if WRITE_GRADS:
            tl.store(grads, g.to(GRAD), mask=mask)
        if MAXIMIZE:
            g = -g
        if DECAY and not DECOUPLED:
            g = tl.fma(p, _splat(l2, p), g)

        if ALGORITHM == "adam":
            s1 = _lerp(s1, g, average_rest)
            s2 = tl.fma(g * square_rest, g, s2 * square)
            v = s2
            if HAS3:
                s3 = tl.where((s3 > s2) | (s3 != s3), s3, s2)  # NaN where either is
                v = s3
            denominator = tl.fma(_root(v), _splat(root_factor, v), _splat(small, v))
            if DECOUPLED:
                p = p * shrink
            p = tl.fma(divide(s1, denominator), _splat(size, p), p)
        elif ALGORITHM == "sgd":
            if HAS1:
                s1 = tl.fma(s1, _splat(keep, g), g * dampening_rest)
                g = tl.fma(s1, _splat(keep, g), g) if NESTEROV else s1
            p = tl.fma(g, _splat(size, p), p)
        else:
            s1 = tl.fma(g * square_rest, g, s1 * square)
            v = s1
            if HAS2:
                s2 = _lerp(s2, g, average_rest)
                v = tl.fma(-s2, s2, v)
                v = tl.where(v < 0, 0.0, v)
            update = divide(g, _root(v) + small)
            if HAS3:
                s3 = tl.fma(s3, _splat(keep, g), update)
                update = s3
            p = tl.fma(update, _splat(size, p), p)

        if HAS1:
            _store_state(
                row, 0, first, at, mask, s1, maps, seed, t, start, ALGORITHM, STATE, STOCHASTIC_STATES, ALIGN, TILE
            )
        if HAS2:
            _store_state(
                row, 1, first, at, mask, s2, maps, seed, t, start, ALGORITHM, STATE, STOCHASTIC_STATES, ALIGN, TILE
            )
        if HAS3:
            _store_state(
                row, 2, first, at, mask, s3, maps, seed, t, start, ALGORITHM, STATE, STOCHASTIC_STATES, ALIGN, TILE
            )
        if REMAINDER:
            high, rest = _split(p, stored)
            tl.store(params, high, mask=mask)
            tl.store(rest_pointers, rest, mask=mask)
        else:
            if STOCHASTIC:
                bits = _random_bits(seed.to(tl.int64), tl.load(row + 2), t, start, 0, TILE)
                high = _round_stochastically(p, bits, stored)
            else:
                high = p.to(TYPE)
            tl.store(params, high, mask=mask)
            p = high.to(ACC)
        if EMA:
            tl.store(_pointers(row, 12, first, at, ACC, ALIGN), _lerp(ema, p, ema_rest), mask=mask)


@triton.jit
def _load_state(
    row, STATE_INDEX: tl.constexpr, first, at, mask, maps, ALGORITHM: tl.constexpr, STATE: tl.constexpr,
    ACC: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    values = tl.load(_pointers(row, 5 + STATE_INDEX, first, at, STATE, ALIGN), mask=mask, other=0)
    if values.dtype == tl.uint8:
        scales = _pointers(row, 8 + STATE_INDEX, first // 256, at // 256, tl.float32, 4)
        return multiply(_decode(values, maps, _has_sign(ALGORITHM, STATE_INDEX)), tl.load(scales, mask=mask, other=0))
    else:
        return values.to(ACC)


@triton.jit
def _store_state(
    row, STATE_INDEX: tl.constexpr, first, at, mask, values, maps, seed, t, start, ALGORITHM: tl.constexpr,
    STATE: tl.constexpr, STOCHASTIC_STATES: tl.constexpr, ALIGN: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    pointers = _pointers(row, 5 + STATE_INDEX, first, at, STATE, ALIGN)
    if pointers.dtype.element_ty == tl.uint8:
        scales = (tl.load(row + 8 + STATE_INDEX) + first // 64).to(tl.pointer_type(tl.float32))
        _store_coded(pointers, scales, values, maps, at, mask, _has_sign(ALGORITHM, STATE_INDEX), TILE)
    elif STOCHASTIC_STATES >> STATE_INDEX & 1:
        bits = _random_bits(seed.to(tl.int64), tl.load(row + 2), t, start, STATE_INDEX + 1, TILE)
        tl.store(pointers, _round_stochastically(values, bits, tl.zeros((TILE,), STATE)), mask=mask)
    else:
        tl.store(pointers, values.to(STATE), mask=mask)


@triton.jit(do_not_specialize=["count"])
def _advance(table, count, found_inf, STEP: tl.constexpr, ROW: tl.constexpr):
    counter = tl.load(table + tl.program_id(0) * ROW + 13).to(tl.pointer_type(STEP))
    if found_inf is not None:
        tl.store(counter, tl.load(counter) + 1, mask=tl.load(found_inf) == 0)
    else:
        tl.store(counter, tl.load(counter) + 1)


@_jit
def _sum_squares(
    table, count, partials, TYPE: tl.constexpr, ACC: tl.constexpr, VEC: tl.constexpr, ALIGN: tl.constexpr,
    TILE: tl.constexpr, TILES: tl.constexpr, ROW: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0).to(tl.int64)
    row = _find(table, count, chunk, ROW)
    chunk -= tl.load(row)
    first_group = chunk * (TILE * TILES // VEC)
    left = tl.minimum(tl.load(row + 1) - first_group, TILE * TILES // VEC).to(tl.int32)
    sums = tl.zeros((TILE,), ACC)
    for tile in range((left * VEC + TILE - 1) // TILE):
        at = tile * TILE + tl.arange(0, TILE)
        grads = _pointers(row, 3, first_group * VEC, at, TYPE, ALIGN)
        g = tl.load(grads, mask=at < left * VEC, other=0).to(ACC)
        sums = tl.fma(g, g, sums)
    tl.store(partials + tl.load(row + 2) + chunk, tl.sum(sums.to(tl.float64), 0))


@_jit
def _finish_norm(partials, chunks, norm, TILE: tl.constexpr):
    sums = tl.zeros((TILE,), tl.float64)
    for start in range(0, chunks, TILE):
        at = start + tl.arange(0, TILE)
        sums += tl.load(partials + at, mask=at < chunks, other=0.0)
    tl.store(norm, tl.sqrt(tl.sum(sums, 0)).to(norm.dtype.element_ty))


@_jit
def _scale_grads(
    table, count, grad_norm, max_norm: i64, TYPE: tl.constexpr, ACC: tl.constexpr, VEC: tl.constexpr,
    ALIGN: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr, ROW: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0).to(tl.int64)
    row = _find(table, count, chunk, ROW)
    first_group = (chunk - tl.load(row)) * (TILE * TILES // VEC)
    left = tl.minimum(tl.load(row + 1) - first_group, TILE * TILES // VEC).to(tl.int32)
    coefficient = _clip_coefficient(tl.load(grad_norm).to(tl.float64), _double(max_norm))
    left = tl.where(coefficient == 1, 0, left)
    factor = coefficient.to(ACC)
    for tile in range((left * VEC + TILE - 1) // TILE):
        at = tile * TILE + tl.arange(0, TILE)
        mask = at < left * VEC
        grads = _pointers(row, 3, first_group * VEC, at, TYPE, ALIGN)
        tl.store(grads, (tl.load(grads, mask=mask, other=0).to(ACC) * factor).to(TYPE), mask=mask)


# The host's side.

_TYPE = {
    **TRITON_TYPE,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.uint8: tl.uint8,
}
_REAL = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_STATE_TYPES = (torch.float32, torch.bfloat16, torch.uint8)
_CONSTANTS = {"TILE": _TILE, "TILES": _CHUNK_TILES, "num_warps": _WARPS}

_tables: OrderedDict[tuple[Any, ...], Tensor] = OrderedDict()
_MOST_TABLES = 64


def _bits(value: float) -> int:
    return int(struct.unpack("<q", struct.pack("<d", value))[0])


def _on_device(rows: list[int], device: torch.device) -> Tensor:
    """A table of addresses, from the cache where no address changed."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    key = (device, stream, *rows)
    table = _tables.get(key)
    if table is None:
        table = torch.tensor(rows, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")
        table = table.to(device, non_blocking=True)
        _tables[key] = table
        if len(_tables) > _MOST_TABLES:
            _tables.popitem(last=False)
    _tables.move_to_end(key)
    return table


def _maps(device: torch.device) -> Tensor:
    """[unsigned, signed] x [values, midpoints] x 256 of csrc/optim/dynamic_map.h."""
    key = ("maps", device)
    if key not in _device_maps:
        both = []
        for signed in (False, True):
            positive = [
                10.0 ** (decade - 6) * (0.1 + 0.9 * (i + 0.5) / count)
                for decade in range(7)
                for count in [(1 if signed else 2) << decade]
                for i in range(count)
            ]
            negative = [-value for value in reversed(positive)] if signed else []
            values = torch.tensor([*negative, 0.0, *positive, 1.0], dtype=torch.float64, device="cpu").float()
            both += [values, (values[1:] + values[:-1]) / 2, torch.full_like(values[:1], math.inf)]
        _device_maps[key] = torch.cat(both).to(device)
    return _device_maps[key]


_device_maps: dict[tuple[str, torch.device], Tensor] = {}


class _Arranger:
    """Addresses of a parameter's arrays in one common layout; what lies otherwise is copied, and copied back."""

    def __init__(self) -> None:
        self.kept: list[Tensor] = []
        self.changed: list[tuple[Tensor, Tensor]] = []

    def begin(self, param: Tensor, logical_order: bool = False) -> None:
        """8-bit states want their elements in logical order."""
        param = _as_real(param)
        self.numel = param.numel()
        self.contiguous = logical_order or param.is_contiguous()
        layout = torch.contiguous_format if self.contiguous else torch.preserve_format
        self.strides = torch.empty_like(param, device="meta", memory_format=layout).stride()

    def place(self, tensor: Tensor, changes: bool, dtype: torch.dtype | None = None) -> int:
        """With a copy where the tensor is not of this dtype."""
        real = _as_real(tensor)
        dtype = dtype or real.dtype
        fits = real.is_contiguous() if self.contiguous else real.stride() == self.strides
        if fits and real.dtype == dtype and not real.is_neg():
            return real.data_ptr()
        copy = torch.empty_strided(real.shape, self.strides, dtype=dtype, device=real.device)
        copy.copy_(real)
        self.kept.append(copy)
        if changes:
            self.changed.append((real, copy))
        return copy.data_ptr()

    def finish(self) -> None:
        for original, copy in self.changed:
            original.copy_(copy)


def _as_real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _real_type(dtype: torch.dtype) -> torch.dtype:
    return dtype.to_real() if dtype.is_complex else dtype


def _vector(dtype: torch.dtype, numel: int, addresses: Sequence[int]) -> tuple[int, int]:
    """(elements an access holds, bytes that every address is a multiple of): 16 bytes of dtype where all allow them."""
    vec = 16 // dtype.itemsize
    if numel % vec or any(address % 16 for address in addresses):
        return 1, 1
    return vec, 16


def _mark_changed(*lists: Sequence[Tensor]) -> None:
    """autograd must notice that what it may have saved has changed."""
    for tensors in lists:
        torch.autograd.graph.increment_version([t for t in tensors if not t.is_inference()])


def _expect(condition: bool, expected: str, got: object) -> None:
    if not condition:
        raise RuntimeError(f"optim_step_(): expected {expected}, got {got}")


def _check_like(name: str, i: int, tensor: Tensor, param: Tensor, dtype: torch.dtype) -> None:
    _expect(tensor.layout == torch.strided, f"a dense {name}[{i}]", tensor.layout)
    _expect(tensor.device == param.device, f"{name}[{i}] on {param.device}", tensor.device)
    _expect(tensor.dtype == dtype, f"{name}[{i}] of {dtype} (params[{i}] is {param.dtype})", tensor.dtype)
    _expect(tensor.shape == param.shape, f"{name}[{i}] of shape {list(param.shape)}", list(tensor.shape))


def _check_overlap(name: str, i: int, tensor: Tensor) -> None:
    shared = any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
    _expect(not shared, f"{name}[{i}] without elements that share memory; clone() it first", tensor.stride())


def _check(
    algorithm: str,
    params: list[Tensor],
    grads: list[Tensor],
    states: list[list[Tensor]],
    scales: list[list[Tensor]],
    remainders: list[Tensor],
    ema: list[Tensor],
    steps: list[Tensor],
    groups: list[int],
    options: list[float],
    lr: list[Tensor],
) -> None:
    if algorithm not in ("adam", "sgd", "rmsprop"):
        raise ValueError(f"optim_step_(): expected algorithm of adam, sgd or rmsprop, got {algorithm}")
    count, group_count = len(params), len(options) // _OPTIONS
    _expect(len(options) == group_count * _OPTIONS, f"{_OPTIONS} options a group", len(options))
    _expect(len(lr) in (0, group_count), f"lr of {group_count} tensors (one a group) or none", len(lr))

    def check_length(name: str, values: Sequence[Any], optional: bool) -> None:
        _expect(len(values) == count or (optional and not values), f"{count} tensors in {name}", len(values))

    check_length("grads", grads, False)
    check_length("groups", groups, False)
    check_length("remainders", remainders, True)
    check_length("ema", ema, True)
    check_length("steps", steps, algorithm != "adam")
    coded = bool(states[0]) and states[0][0].dtype == torch.uint8
    for s in range(_STATES):
        needed = s < 2 if algorithm == "adam" else algorithm == "rmsprop" and s == 0
        check_length(f"state{s + 1}", states[s], not needed)
        check_length(f"scales{s + 1}", scales[s], not coded or not states[s])
    for i, param in enumerate(params):
        dtype = param.dtype
        real = _real_type(dtype)
        _expect(real in _REAL, f"params[{i}] of a floating or complex type", dtype)
        _expect(param.device == params[0].device, f"params[{i}] on {params[0].device}", param.device)
        _check_overlap("params", i, param)
        given = grads[i].dtype
        serves = _real_type(given) in _REAL and given.is_complex == dtype.is_complex
        _check_like("grads", i, grads[i], param, given if serves else dtype)
        _expect(0 <= groups[i] < group_count, f"groups[{i}] below {group_count}", groups[i])
        for s in range(_STATES):
            if not states[s]:
                continue
            state = states[0][i].dtype
            serves = state == dtype or (not dtype.is_complex and real != torch.float64 and state in _STATE_TYPES)
            _expect(serves, f"state1[{i}] of a type that goes with {dtype}", state)
            _check_like(f"state{s + 1}", i, states[s][i], param, state)
            if state == torch.uint8:
                scale, blocks = scales[s][i], -(-param.numel() // _BLOCK)
                fits = scale.dtype == torch.float32 and scale.numel() == blocks and scale.is_contiguous()
                _expect(fits, f"scales{s + 1}[{i}] contiguous, of {blocks} elements of Float", list(scale.shape))
        if remainders:
            _expect(dtype in (torch.bfloat16, torch.float16), f"params[{i}] of 16 bits with a remainder", dtype)
            rest = dtype if remainders[i].dtype == dtype else torch.int16
            _check_like("remainders", i, remainders[i], param, rest)
        if ema:
            _check_like("ema", i, ema[i], param, torch.float32 if dtype.itemsize == 2 else dtype)
        if steps:
            fits = steps[i].numel() == 1 and steps[i].dtype in (torch.float32, torch.float64)
            _expect(fits, f"steps[{i}] of one Float or Double", steps[i].dtype)


def optim_step_(
    algorithm: str,
    params: list[Tensor],
    grads: list[Tensor],
    state1: list[Tensor],
    state2: list[Tensor],
    state3: list[Tensor],
    scales1: list[Tensor],
    scales2: list[Tensor],
    scales3: list[Tensor],
    remainders: list[Tensor],
    ema: list[Tensor],
    steps: list[Tensor],
    groups: list[int],
    options: list[float],
    lr: list[Tensor],
    grad_norm: Tensor | None,
    max_norm: float,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    write_grads: bool,
    seed: int | None,
) -> None:
    """One step of all tensors; csrc/optim/kernel.h says what each list holds. Checks all before it writes anything."""
    states, scales = [state1, state2, state3], [scales1, scales2, scales3]
    _check(algorithm, params, grads, states, scales, remainders, ema, steps, groups, options, lr)
    if write_grads:
        for i, grad in enumerate(grads):
            _check_overlap("grads", i, grad)
    if not params:
        return
    device = params[0].device
    on_device = bool(steps) and steps[0].device == device
    if found_inf is not None and steps and not on_device:
        # Host counters need the answer here; with counters on the device (fused=True, capturable=True) nothing waits.
        if float(found_inf) != 0:
            return
        found_inf = None

    arranger = _Arranger()
    launches: dict[tuple[Any, ...], list[list[int]]] = {}
    counted_steps: list[float] = []  # of counters on the host
    for i, param in enumerate(params):
        arranger.begin(param, bool(states[0]) and states[0][i].dtype == torch.uint8)
        correction1 = correction2 = 1.0
        counter = 0
        if on_device:
            counter = steps[i].data_ptr()
        elif steps:
            counted_steps.append(float(steps[i]) + 1)  # at 2^24 an fp32 counter stays, as torch's does
            if algorithm == "adam":
                betas = options[groups[i] * _OPTIONS + 3 :][:2]
                correction1, correction2 = (1 - beta ** counted_steps[-1] for beta in betas)
        row = [0] * _ROW
        row[_INDEX], row[_STEP] = i, counter
        dtype, grad_dtype = _real_type(param.dtype), _real_type(grads[i].dtype)
        if torch.float64 in (dtype, grad_dtype):
            grad_dtype = torch.float64 if dtype == torch.float64 else torch.float32  # not 16 bits
        row[_PARAM], row[_GRAD] = arranger.place(param, True), arranger.place(grads[i], write_grads, grad_dtype)
        for s in range(_STATES):
            if states[s]:
                row[_STATE + s] = arranger.place(states[s][i], True)
            if scales[s]:
                row[_SCALE + s] = scales[s][i].data_ptr()
        if remainders:
            row[_REMAINDER] = arranger.place(remainders[i], True)
        if ema:
            row[_EMA] = arranger.place(ema[i], True)
        state_dtype = _real_type(states[0][i].dtype) if states[0] else dtype
        narrow = min(dtype, grad_dtype, state_dtype, key=lambda kind: kind.itemsize)
        if arranger.numel:
            wide = [row[column] for column in (_PARAM, _GRAD, *range(_STATE, _STATE + 3), _REMAINDER, _EMA)]
            vec, align = _vector(narrow, arranger.numel, wide)
            row[_NUMEL] = arranger.numel // vec
            step_type = steps[i].dtype if on_device else None
            key = (groups[i], correction1, correction2, dtype, grad_dtype, state_dtype, step_type, vec, align)
            launches.setdefault(key, []).append(row)

    for step, t in zip(steps, counted_steps, strict=False):
        step.fill_(t)
    with torch.cuda.device_of(params[0]):
        tables = []
        for key, rows in launches.items():
            group, correction1, correction2, dtype, grad_dtype, state_dtype, step_type, vec, align = key
            table, chunks = _table(rows, vec, device)
            first = group * _OPTIONS
            lr_value, weight_decay, *others = options[first : first + 9]
            decoupled, nesterov, maximize, stochastic = (bool(flag) for flag in options[first + 9 : first + 13])
            sixteen_bits = state_dtype.itemsize == 2 and seed is not None
            stochastic_states = int(options[first + 13]) if sixteen_bits else 0
            scalars = [lr_value, weight_decay, *others, correction1, correction2, max_norm]
            maps = _maps(device) if state_dtype == torch.uint8 else None
            counted = None if step_type is None else _TYPE[step_type]
            _step[(chunks,)](
                table, len(rows), maps, lr[group] if lr else None, grad_norm, grad_scale, found_inf,
                *map(_bits, scalars), seed or 0,
                ALGORITHM=algorithm, TYPE=_TYPE[dtype], GRAD=_TYPE[grad_dtype], STATE=_TYPE[state_dtype],
                ACC=TRITON_TYPE[accumulate_type(dtype)], STEP=counted,
                HAS1=bool(states[0]), HAS2=bool(states[1]), HAS3=bool(states[2]),
                REMAINDER=bool(remainders), EMA=bool(ema), DECOUPLED=decoupled and algorithm == "adam",
                NESTEROV=nesterov, MAXIMIZE=maximize, DECAY=weight_decay != 0, WRITE_GRADS=write_grads,
                STOCHASTIC=stochastic and seed is not None and dtype.itemsize == 2 and not remainders,
                STOCHASTIC_STATES=stochastic_states,
                VEC=vec, ALIGN=align, ROW=_ROW, **_CONSTANTS,
            )  # fmt: skip
            tables.append((table, len(rows), counted))
        for table, count, counted in tables:
            if counted is not None:
                _advance[(count,)](table, count, found_inf, STEP=counted, ROW=_ROW, num_warps=1)
    arranger.finish()
    _mark_changed(params, ema, grads if write_grads else [], *states)
    if on_device:
        empty = [step for step, param in zip(steps, params, strict=True) if param.numel() == 0]
        for step in empty:
            step += 1 if found_inf is None else (found_inf == 0).to(step.dtype).view_as(step)


def _table(rows: list[list[int]], vec: int, device: torch.device) -> tuple[Tensor, int]:
    """(the rows on the device, how many chunks their tensors have)."""
    chunks = 0
    flat: list[int] = []
    for row in rows:
        row[_FIRST_CHUNK] = chunks
        chunks += -(-row[_NUMEL] * vec // (_TILE * _CHUNK_TILES))
        flat += row
    return _on_device(flat, device), chunks


def _gradient_launches(
    op: str, grads: list[Tensor], arranger: _Arranger, changes: bool
) -> tuple[list[tuple[Tensor, int, int, dict[str, Any]]], int]:
    """([(table, tensors, chunks, constants)], chunks of all): a launch each dtype and alignment."""
    launches: dict[tuple[torch.dtype, int, int], list[list[int]]] = {}
    before = 0
    for i, grad in enumerate(grads):
        dtype = _real_type(grad.dtype)
        if grad.layout != torch.strided or dtype not in _REAL:
            raise RuntimeError(f"{op}(): expected grads[{i}] dense, of a floating or complex type, got {grad.dtype}")
        if grad.device != grads[0].device:
            raise RuntimeError(f"{op}(): expected grads[{i}] on {grads[0].device}, got {grad.device}")
        arranger.begin(grad)
        address = arranger.place(grad, changes)
        if arranger.numel == 0:
            continue
        vec, align = _vector(dtype, arranger.numel, [address])
        launches.setdefault((dtype, vec, align), []).append([0, arranger.numel // vec, before, address])
        before += -(-arranger.numel // (_TILE * _CHUNK_TILES))
    result = []
    for (dtype, vec, align), rows in launches.items():
        table, chunks = _table(rows, vec, grads[0].device)
        acc = TRITON_TYPE[accumulate_type(dtype)]
        constants = {"TYPE": _TYPE[dtype], "ACC": acc, "VEC": vec, "ALIGN": align, "ROW": 4, **_CONSTANTS}
        result.append((table, len(rows), chunks, constants))
    return result, before


def optim_grad_norm(grads: list[Tensor]) -> Tensor:
    """The 2-norm of all gradients together: sums in fp32 within a chunk, in fp64 and a fixed order between them."""
    if not grads:
        raise ValueError("optim_grad_norm(): expected at least one gradient, got none")
    device = grads[0].device
    wide = any(_real_type(grad.dtype) == torch.float64 for grad in grads)
    arranger = _Arranger()
    launches, chunks = _gradient_launches("optim_grad_norm", grads, arranger, False)
    norm = torch.empty((), dtype=torch.float64 if wide else torch.float32, device=device)
    partials = torch.empty(chunks, dtype=torch.float64, device=device)
    with torch.cuda.device_of(grads[0]):
        for table, count, own_chunks, constants in launches:
            _sum_squares[(own_chunks,)](table, count, partials, **constants)
        _finish_norm[(1,)](partials, chunks, norm, TILE=1024, num_warps=_WARPS)
    return norm


def optim_clip_grads_(grads: list[Tensor], grad_norm: Tensor, max_norm: float) -> None:
    """grad = grad * min(1, max_norm / (grad_norm + 1e-6))."""
    if not grads:
        return
    fits = grad_norm.numel() == 1 and grad_norm.dtype in TRITON_TYPE and grad_norm.device == grads[0].device
    if not fits:
        raise RuntimeError(
            f"optim_clip_grads_(): expected grad_norm of one Float or Double on {grads[0].device}, got "
            f"{grad_norm.dtype} {list(grad_norm.shape)} on {grad_norm.device}"
        )
    arranger = _Arranger()
    launches, _ = _gradient_launches("optim_clip_grads_", grads, arranger, True)
    with torch.cuda.device_of(grads[0]):
        for table, count, chunks, constants in launches:
            _scale_grads[(chunks,)](table, count, grad_norm, _bits(max_norm), **constants)
    arranger.finish()
    _mark_changed(grads)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "optim_step_": optim_step_,
    "optim_grad_norm": optim_grad_norm,
    "optim_clip_grads_": optim_clip_grads_,
}
