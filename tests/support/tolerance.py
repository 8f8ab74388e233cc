"""The tolerance of all parity tests: our error against an exact reference is at most torch's plus one ulp of the
output.

A single small tensor says little about torch's error, which is therefore the largest over several similar draws.
"""

import dataclasses

import numpy as np
import torch
from torch import Tensor

from support.reference import exact


def max_error(actual: Tensor, expected: np.ndarray) -> float:
    return float(np.abs(exact(actual) - expected).max(initial=0))


def ulp(magnitude: float, dtype: torch.dtype) -> float:
    """The distance between neighbouring values of dtype at this magnitude."""
    info = torch.finfo(dtype)
    return info.eps * 2.0 ** np.floor(np.log2(max(magnitude, info.tiny)))


@dataclasses.dataclass
class Yardstick:
    """Collects one output's errors over draws; NaN, the value of an unwritten element, fails."""

    name: str
    ours: float = 0.0
    torchs: float = 0.0
    one_ulp: float = 0.0

    def add(self, ours: Tensor, native: Tensor, expected: np.ndarray) -> None:
        assert ours.shape == native.shape, f"{self.name}: shape {tuple(ours.shape)}, torch gives {tuple(native.shape)}"
        assert ours.dtype == native.dtype, f"{self.name}: dtype {ours.dtype}, torch gives {native.dtype}"
        error = max_error(ours, expected)
        assert error == error, f"{self.name}: NaN"
        self.ours = max(self.ours, error)
        self.one_ulp = max(self.one_ulp, ulp(float(np.abs(expected).max(initial=0)), ours.dtype))

    def add_native(self, native: Tensor, expected: np.ndarray) -> None:
        self.torchs = max(self.torchs, max_error(native, expected))

    def holds(self, ulps: int) -> bool:
        return self.ours <= self.torchs + ulps * self.one_ulp
