"""8-bit states in torch's ops: what csrc/optim/dynamic_map.h defines, for converting checkpoints and for tests."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

BLOCK = 256


@functools.cache
def _values(signed: bool) -> Tensor:
    positive = [
        10.0 ** (decade - 6) * (0.1 + 0.9 * (i + 0.5) / count)
        for decade in range(7)
        for count in [(1 if signed else 2) << decade]
        for i in range(count)
    ]
    values = [0.0, *positive, 1.0]
    if signed:
        values = [-value for value in reversed(positive)] + values
    return torch.tensor(values, dtype=torch.float64).float()


def zero(signed: bool) -> int:
    """The code of 0."""
    return 127 if signed else 0


def scales(param: Tensor) -> Tensor:
    """Scales of a state that is 0 throughout."""
    return torch.zeros(-(-param.numel() // BLOCK), device=param.device)


def _in_memory_order(tensor: Tensor) -> Tensor:
    """1-D, in the order of a dense tensor's memory."""
    return tensor.as_strided((tensor.numel(),), (1,))


def decode(codes: Tensor, scale: Tensor, signed: bool) -> Tensor:
    """fp32 values of the codes, in their layout."""
    flat = _values(signed).to(codes.device)[_in_memory_order(codes).long()]
    result = torch.empty_like(codes, dtype=torch.float32)
    _in_memory_order(result).copy_(flat * scale.repeat_interleave(BLOCK)[: codes.numel()])
    return result


def encode(values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """(codes in the layout of `values`, scales)."""
    flat = torch.nn.functional.pad(_in_memory_order(values).float(), (0, -values.numel() % BLOCK)).view(-1, BLOCK)
    scale = flat.abs().amax(1)
    table = _values(signed).to(values.device)
    midpoints = (table[1:] + table[:-1]) / 2
    divided = flat / torch.where(scale == 0, 1.0, scale)[:, None]
    codes = torch.empty_like(values, dtype=torch.uint8)
    _in_memory_order(codes).copy_(torch.bucketize(divided, midpoints).view(-1)[: values.numel()])
    return codes, scale
