"""What the parity tests of every norm are given."""

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
