"""Dropout and its variants."""

from typing import Any

import torch
from torch import Tensor

from dlkit import functional as F


class Dropout(torch.nn.Dropout):
    """:class:`torch.nn.Dropout` on fused kernels, which store no mask; see :func:`dlkit.functional.dropout`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.dropout(input, self.p, self.training, self.inplace)


class DropoutAdd(torch.nn.Module):
    """Dropout and a residual add in one pass: ``forward(input, residual) -> dropout(input) + residual``.

    See :func:`dlkit.functional.dropout_add`.
    """

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        F.check_probability("DropoutAdd", p)
        self.p = p

    def extra_repr(self) -> str:
        return f"p={self.p}"

    def forward(self, input: Tensor, residual: Tensor) -> Tensor:
        return F.dropout_add(input, residual, self.p, self.training)


class DropoutAddLayerNorm(torch.nn.LayerNorm):
    """Dropout, residual add and LayerNorm in one pass: ``forward(input, residual) -> norm(dropout(input) + residual)``.

    With ``prenorm`` the sum is returned too, as ``(y, sum)``. The other arguments, parameters and state_dict are
    :class:`torch.nn.LayerNorm`'s; see :func:`dlkit.functional.dropout_add_layer_norm`.
    """

    def __init__(self, normalized_shape: Any, p: float = 0.5, *arguments: Any, prenorm: bool = False, **options: Any):
        super().__init__(normalized_shape, *arguments, **options)
        F.check_probability("DropoutAddLayerNorm", p)
        self.p, self.prenorm = p, prenorm

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, p={self.p}, prenorm={self.prenorm}"

    def forward(self, input: Tensor, residual: Tensor) -> Any:  # type: ignore[override]
        return F.dropout_add_layer_norm(
            input,
            residual,
            self.normalized_shape,
            self.weight,
            self.bias,
            self.p,
            self.eps,
            self.training,
            self.prenorm,
        )


class DropoutAddRMSNorm(torch.nn.RMSNorm):
    """Dropout, residual add and RMSNorm in one pass; see :class:`DropoutAddLayerNorm`."""

    def __init__(self, normalized_shape: Any, p: float = 0.5, *arguments: Any, prenorm: bool = False, **options: Any):
        super().__init__(normalized_shape, *arguments, **options)
        F.check_probability("DropoutAddRMSNorm", p)
        self.p, self.prenorm = p, prenorm

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, p={self.p}, prenorm={self.prenorm}"

    def forward(self, x: Tensor, residual: Tensor) -> Any:  # type: ignore[override]
        return F.dropout_add_rms_norm(
            x, residual, self.normalized_shape, self.weight, self.p, self.eps, self.training, self.prenorm
        )
