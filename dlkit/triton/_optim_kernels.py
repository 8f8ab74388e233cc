"""The kernels of the optimizers: a step, the counting of steps, the norm of gradients and their scaling.

Each array is read once and, but for gradients, written once, as in csrc/optim/cuda.cu; the formulas are those of
csrc/optim/math.h. A program finds its tensor by its chunk in a table of addresses, whose columns _optim_launch.py
names.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

from ._common import divide, multiply
from ._optim_states import decode, has_sign, join, random_bits, round_stochastically, split, store_coded

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
    # The hint stands on the pointers: one on the address is lost at the cast.
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


@_jit
def step(
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
            p = join(stored, tl.load(rest_pointers, mask=mask, other=0))
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
            high, rest = split(p, stored)
            tl.store(params, high, mask=mask)
            tl.store(rest_pointers, rest, mask=mask)
        else:
            if STOCHASTIC:
                bits = random_bits(seed.to(tl.int64), tl.load(row + 2), t, start, 0, TILE)
                high = round_stochastically(p, bits, stored)
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
        return multiply(decode(values, maps, has_sign(ALGORITHM, STATE_INDEX)), tl.load(scales, mask=mask, other=0))
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
        store_coded(pointers, scales, values, maps, at, mask, has_sign(ALGORITHM, STATE_INDEX), TILE)
    elif STOCHASTIC_STATES >> STATE_INDEX & 1:
        bits = random_bits(seed.to(tl.int64), tl.load(row + 2), t, start, STATE_INDEX + 1, TILE)
        tl.store(pointers, round_stochastically(values, bits, tl.zeros((TILE,), STATE)), mask=mask)
    else:
        tl.store(pointers, values.to(STATE), mask=mask)


@triton.jit(do_not_specialize=["count"])
def advance(table, count, found_inf, STEP: tl.constexpr, ROW: tl.constexpr):
    counter = tl.load(table + tl.program_id(0) * ROW + 13).to(tl.pointer_type(STEP))
    if found_inf is not None:
        tl.store(counter, tl.load(counter) + 1, mask=tl.load(found_inf) == 0)
    else:
        tl.store(counter, tl.load(counter) + 1)


@_jit
def sum_squares(
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
def finish_norm(partials, chunks, norm, TILE: tl.constexpr):
    sums = tl.zeros((TILE,), tl.float64)
    for start in range(0, chunks, TILE):
        at = start + tl.arange(0, TILE)
        sums += tl.load(partials + at, mask=at < chunks, other=0.0)
    tl.store(norm, tl.sqrt(tl.sum(sums, 0)).to(norm.dtype.element_ty))


@_jit
def scale_grads(
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
