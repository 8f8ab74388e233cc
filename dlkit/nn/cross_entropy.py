"""CrossEntropyLoss."""

from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy

from dlkit import functional as F
from dlkit.nn._layer import Layer


class CrossEntropyLoss(Layer, torch.nn.CrossEntropyLoss):
    """:class:`torch.nn.CrossEntropyLoss` on fused kernels: the same arguments, and four more by keyword.

    Shapes: input ``[C]``, ``[N, C]`` or ``[N, C, *]``; target ``[]``, ``[N]`` or ``[N, *]`` for classes, the input's
    for probabilities. The further arguments, dtypes and errors are those of :func:`dlkit.functional.cross_entropy`.
    """

    # Here too, for the layers that replace() makes of torch's.
    lse_square_scale: float = 0.0
    softcap: float | None = None
    return_z_loss: bool = False
    inplace_backward: bool = False

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        lse_square_scale: float = 0.0,
        softcap: float | None = None,
        return_z_loss: bool = False,
        inplace_backward: bool = False,
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.lse_square_scale = lse_square_scale
        self.softcap = softcap
        self.return_z_loss = return_z_loss
        self.inplace_backward = inplace_backward

    def has_own_options(self) -> bool:
        """Whether it computes what torch's layer cannot. inplace_backward alone changes no result."""
        return bool(self.lse_square_scale or self.softcap or self.return_z_loss)

    def forward(self, input: Tensor, target: Tensor) -> Any:
        if isinstance(input, Proxy) and self._is_leaf(input):
            return self._call_node(input, target)
        return F.cross_entropy(
            input, target, self.weight, None, self.ignore_index, None, self.reduction, self.label_smoothing,
            self.lse_square_scale, self.softcap, self.return_z_loss, self.inplace_backward,
        )  # fmt: skip
