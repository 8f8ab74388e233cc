"""How parameters and states are stored, by the formulas of csrc/optim/math.h.

In codes of 8 bits, as a parameter and its remainder, or in 16 bits that are rounded stochastically.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._dynamic_map import dynamic_map


@triton.jit
def has_sign(ALGORITHM: tl.constexpr, STATE: tl.constexpr):
    if ALGORITHM == "adam":
        return STATE == 0
    else:
        return ALGORITHM == "sgd" or STATE > 0


@triton.jit
def decode(codes, maps, SIGNED: tl.constexpr):
    return tl.load(maps + SIGNED * 512 + codes.to(tl.int32))


@triton.jit
def _encode(values, maps, SIGNED: tl.constexpr):
    """The codes of values: the number of midpoints below each."""
    midpoints = maps + (SIGNED * 512 + 256)
    code = tl.zeros(values.shape, tl.int32)
    for bit in tl.static_range(8):
        code += tl.where(tl.load(midpoints + code + ((128 >> bit) - 1)) < values, 128 >> bit, 0)
    return code.to(tl.uint8)


@triton.jit
def store_coded(pointers, scales, values, maps, at, mask, SIGNED: tl.constexpr, TILE: tl.constexpr):
    """Stores a tile of an 8-bit state: one scale per 256 elements, one code per element."""
    rows: tl.constexpr = TILE // 256
    magnitudes = tl.reshape(tl.where(mask, tl.abs(values), 0.0), (rows, 256))
    scale = tl.max(magnitudes, 1, keep_dims=True)
    nan = tl.max((magnitudes != magnitudes).to(tl.int32), 1, keep_dims=True) != 0
    scale = tl.where(nan, float("nan"), scale)
    divisor = tl.where(scale == 0, 1.0, scale)
    divided = tl.div_rn(tl.reshape(values, (rows, 256)), tl.broadcast_to(divisor, (rows, 256)))
    codes = _encode(tl.reshape(divided, (TILE,)), maps, SIGNED)
    wide = tl.reshape(tl.broadcast_to(scale, (rows, 256)), (TILE,))
    if not SIGNED:  # a value above zero never gets the code of 0
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
def join(high, rest):
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
    """Whether a bf16 value, given as the bits of an fp32 one, is neither zero nor infinite nor NaN."""
    return ((bits - 0x10000) & 0x7FFF0000) < 0x7F7F0000


@triton.jit
def split(value, like):
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
def random_bits(seed, index, step, first, STREAM: tl.constexpr, TILE: tl.constexpr):
    """16 bits per element, eight elements from one Philox block. STREAM: 0 for the parameter, s + 1 for state s."""
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
def round_stochastically(value, bits, like):
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


_device_maps: dict[torch.device, Tensor] = {}


def dynamic_maps(device: torch.device) -> Tensor:
    """[unsigned, signed] x [values, midpoints] x 256 of csrc/optim/dynamic_map.h."""
    if device not in _device_maps:
        both = []
        for signed in (False, True):
            values = dynamic_map(signed)
            both += [values, (values[1:] + values[:-1]) / 2, torch.full_like(values[:1], math.inf)]
        _device_maps[device] = torch.cat(both).to(device)
    return _device_maps[device]
