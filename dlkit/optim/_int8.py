"""8-bit states in torch's ops, for converting checkpoints and for tests."""

from __future__ import annotations

import torch
from torch import Tensor

from dlkit._dynamic_map import BLOCK, dynamic_map


def zero(signed: bool) -> int:
    """The code of 0."""
    return 127 if signed else 0


def scales(param: Tensor) -> Tensor:
    """Scales of a state that is 0 throughout."""
    return torch.zeros(-(-param.numel() // BLOCK), dtype=torch.float32, device=param.device)


def _decode_flat(codes: Tensor, scale: Tensor, signed: bool) -> Tensor:
    return dynamic_map(signed).to(codes.device)[codes.long()] * scale.repeat_interleave(BLOCK)[: codes.numel()]


def decode(codes: Tensor, scale: Tensor, signed: bool) -> Tensor:
    """The fp32 values of the codes, in their layout. Blocks follow the logical order in every layout."""
    result = torch.empty_like(codes, dtype=torch.float32)
    return result.copy_(_decode_flat(codes.reshape(-1), scale, signed).view(codes.shape))


def decode_memory_order(codes: Tensor, scale: Tensor, signed: bool) -> Tensor:
    """decode() for checkpoints of version 0.1, whose blocks follow the order of the (dense) codes in memory."""

    def flat(tensor: Tensor) -> Tensor:
        return tensor.as_strided((tensor.numel(),), (1,))

    result = torch.empty_like(codes, dtype=torch.float32)
    flat(result).copy_(_decode_flat(flat(codes), scale, signed))
    return result


def _blocks(values: Tensor) -> Tensor:
    return torch.nn.functional.pad(values.reshape(-1).float(), (0, -values.numel() % BLOCK)).view(-1, BLOCK)


def _nearest(blocks: Tensor, scale: Tensor, table: Tensor, signed: bool) -> Tensor:
    """The codes of the nearest values."""
    midpoints = (table[1:] + table[:-1]) / 2
    codes = torch.bucketize(blocks / torch.where(scale == 0, 1.0, scale)[:, None], midpoints)
    if not signed:  # a value above zero never gets the code of 0
        codes.clamp_(min=((blocks > 0) & scale.isfinite()[:, None]).long())
    return codes


def encode(values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """(contiguous codes, scales)."""
    blocks, table = _blocks(values), dynamic_map(signed).to(values.device)
    scale = blocks.abs().amax(1)
    codes = _nearest(blocks, scale, table, signed)
    return codes.view(-1)[: values.numel()].to(torch.uint8).view(values.shape), scale


def encode_decoded(values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """encode() that finds the original codes and scales of values that decode() gave.

    The map ends at 1 and at -0.993, so a block whose largest magnitude is negative has a scale above it.
    """
    blocks, table = _blocks(values), dynamic_map(signed).to(values.device)
    largest = blocks.abs().amax(1)
    above = largest / -table[0] if signed else largest
    infinity = torch.full_like(above, float("inf"))
    scale, codes = largest, _nearest(blocks, largest, table, signed)
    found = torch.zeros_like(scale, dtype=torch.bool)
    for tried in (largest, above, above.nextafter(infinity), above.nextafter(-infinity)):
        nearest = _nearest(blocks, tried, table, signed)
        exact = (table[nearest] * tried[:, None] == blocks).all(1) & ~found
        codes, scale = torch.where(exact[:, None], nearest, codes), torch.where(exact, tried, scale)
        found |= exact
    return codes.view(-1)[: values.numel()].to(torch.uint8).view(values.shape), scale
