"""Dropout and its variants."""

import torch
from torch import Tensor

from dlkit import functional as F


class Dropout(torch.nn.Dropout):
    """:class:`torch.nn.Dropout` on fused kernels, which store no mask; see :func:`dlkit.functional.dropout`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.dropout(input, self.p, self.training, self.inplace)
