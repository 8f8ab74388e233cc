"""The 256 values of an 8-bit state, as csrc/optim/dynamic_map.h defines them: for torch's ops and for Triton.

It imports nothing of dlkit: Triton's kernels are compiled ahead without the extension.
"""

import functools

import torch
from torch import Tensor

BLOCK = 256  # elements that share a scale


@functools.cache
def _numbers(signed: bool) -> list[float]:
    positive = [
        10.0 ** (decade - 6) * (0.1 + 0.9 * (i + 0.5) / count)
        for decade in range(7)
        for count in [(1 if signed else 2) << decade]
        for i in range(count)
    ]
    values = [0.0, *positive, 1.0]
    if signed:
        values = [-value for value in reversed(positive)] + values
    return values


def dynamic_map(signed: bool) -> Tensor:
    """The values in ascending order, fp32, on the CPU."""
    # Not cached: a tensor made under a default device or a mode would belong to it for good.
    return torch.tensor(_numbers(signed), dtype=torch.float64, device="cpu").float()
