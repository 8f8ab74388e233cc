"""Inputs of the parity tests of every norm."""

import torch
from torch import Tensor

TYPES = [  # (input, parameters)
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16),
    (torch.float16, torch.float32),
]


def make(shape, dtype: torch.dtype, device="cpu", *, scale=1.0, shift=0.0) -> Tensor:
    """Normal values, drawn in fp64 on the CPU and rounded once."""
    return (torch.randn(shape, dtype=torch.float64) * scale + shift).to(dtype).to(device)


def lay_out(tensor: Tensor, channels_last: bool) -> Tensor:
    """The same values in the wanted layout."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    wanted = formats.get(tensor.dim(), torch.contiguous_format) if channels_last else torch.contiguous_format
    laid_out = torch.empty_like(tensor, memory_format=wanted)
    return laid_out.copy_(tensor)
