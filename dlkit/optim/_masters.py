"""fp32 masters of 16-bit parameters in torch's ops: join and split of csrc/optim/math.h, for checkpoints and averages.

A master is two halves. The parameter itself is one. The other, 16 bits, is `state["remainder"]`: the bits of an int16,
viewed in the parameter's dtype, since tools that move checkpoints about do not all know int16.
"""

from __future__ import annotations

import torch
from torch import Tensor


def bits(tensor: Tensor) -> Tensor:
    """The same memory as int16."""
    return tensor if tensor.dtype == torch.int16 else tensor.view(torch.int16)


def join(param: Tensor, remainder: Tensor) -> Tensor:
    """The fp32 master of a 16-bit parameter."""
    high, rest = param.detach(), bits(remainder).to(torch.int32)
    wide = high.float()
    if high.dtype == torch.bfloat16:
        joined = ((bits(high).to(torch.int32) << 16) + rest).view(torch.float32)
        return torch.where((high == 0) | ~wide.isfinite(), wide, joined)
    joined = (wide.double() + rest.double() * _unit(wide)).float()
    return torch.where((rest == 0) | (bits(high) == 0) | ~wide.isfinite(), wide, joined)


def split(master: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(the 16-bit parameter, its remainder) of an fp32 master."""
    if dtype == torch.bfloat16:
        whole = master.view(torch.int32).to(torch.int64) & 0xFFFFFFFF
        high = (whole + 0x8000) >> 16
        rest = whole - (high << 16)
        param = torch.where(master.isnan(), 0x7FC0, high).to(torch.int32).to(torch.int16).view(dtype)
        rest = torch.where((param == 0) | ~param.isfinite(), 0, rest).to(torch.int16)
    else:
        param = master.to(dtype)
        wide = param.float()
        rest = ((master.double() - wide.double()) / _unit(wide)).round().clamp(max=32767)
        rest = torch.where(wide.isfinite(), rest, 0.0).to(torch.int16)
        # +0 stands for what the user wrote; a value too small for fp16 is kept with -0.
        param = torch.where((param == 0) & (rest != 0), -0.0, param)
    return param, rest.view(dtype)


def _unit(wide: Tensor) -> Tensor:
    """What 1 of an fp16 remainder stands for: 2^-16 of the last place of the parameter."""
    _, exponent = torch.frexp(torch.where(wide.isfinite(), wide, 1.0).double().abs().clamp(min=2.0**-14))
    return torch.ldexp(torch.ones_like(wide, dtype=torch.float64), exponent - 27)
