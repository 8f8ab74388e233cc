"""CrossEntropyLoss, and a linear layer with cross entropy."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy

from dlkit import functional as F
from dlkit.nn._layer import Layer


class CrossEntropyLoss(Layer, torch.nn.CrossEntropyLoss):
    """:class:`torch.nn.CrossEntropyLoss` on fused kernels: the same arguments, and four more keyword arguments.

    Shapes: input ``[C]``, ``[N, C]`` or ``[N, C, *]``; target ``[]``, ``[N]`` or ``[N, *]`` for classes, the input's
    for probabilities. The further arguments, dtypes and errors are those of :func:`dlkit.functional.cross_entropy`.
    """

    # Class attributes: layers that replace() makes of torch's have not run __init__.
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
        """Whether torch's layer would give other results. inplace_backward changes no result."""
        return bool(self.lse_square_scale or self.softcap or self.return_z_loss)

    def forward(self, input: Tensor, target: Tensor) -> Any:
        if isinstance(input, Proxy) and self._is_leaf(input):
            return self._call_node(input, target)
        return F.cross_entropy(
            input, target, self.weight, None, self.ignore_index, None, self.reduction, self.label_smoothing,
            self.lse_square_scale, self.softcap, self.return_z_loss, self.inplace_backward,
        )  # fmt: skip


class LinearCrossEntropyLoss(Layer, getattr(torch.nn, "LinearCrossEntropyLoss", torch.nn.Module)):  # type: ignore[misc]
    """A linear layer and cross entropy; memory never holds all logits.

    :class:`torch.nn.LinearCrossEntropyLoss` (torch 2.13 on) with its arguments, its parameters in ``linear`` and its
    state_dict, and three more keyword arguments.

    Shapes: input ``[H]`` or ``[N, H]``; target ``[]``, ``[N]`` or ``[N, *out_features]`` for classes, ``[C]`` or
    ``[N, C, *out_features]`` for probabilities. Dtypes and errors are those of
    :func:`dlkit.functional.linear_cross_entropy`.
    """

    lse_square_scale: float = 0.0
    softcap: float | None = None
    return_z_loss: bool = False

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: Any = None,
        dtype: Any = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: Any = None,
        lse_square_scale: float = 0.0,
        softcap: float | None = None,
        return_z_loss: bool = False,
    ) -> None:
        torch.nn.Module.__init__(self)
        if weight is not None and weight.shape != (num_classes,):
            raise RuntimeError(f"expected weight of shape {[num_classes]}, got {list(weight.shape)}")
        if not 0 <= label_smoothing <= 1:
            raise RuntimeError(f"expected label_smoothing between 0 and 1, got {label_smoothing}")
        self.register_buffer("weight", weight)
        self.num_classes = num_classes
        self.out_features = out_features
        self.reduction = reduction
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.options = options
        self.linear = torch.nn.Linear(in_features, math.prod(out_features, start=num_classes), bias, device, dtype)
        self.lse_square_scale = lse_square_scale
        self.softcap = softcap
        self.return_z_loss = return_z_loss

    has_own_options = CrossEntropyLoss.has_own_options

    def forward(self, input: Tensor, target: Tensor) -> Any:
        if isinstance(input, Proxy) and self._is_leaf(input):
            return self._call_node(input, target)
        weight, bias = self.linear.weight, self.linear.bias
        if self.out_features:
            weight = weight.view(self.num_classes, *self.out_features, -1)
        return F.linear_cross_entropy(
            input, weight, target, linear_bias=bias, weight=self.weight, reduction=self.reduction,
            ignore_index=self.ignore_index, label_smoothing=self.label_smoothing, options=self.options,
            lse_square_scale=self.lse_square_scale, softcap=self.softcap, return_z_loss=self.return_z_loss,
        )  # fmt: skip
