"""Dropout and its variants. Modules absent from torch.nn take (p, inplace) as torch's dropouts do."""

from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy
from torch.nn.modules.dropout import _DropoutNd

from dlkit import functional as F
from dlkit.functional._arguments import check_probability
from dlkit.nn._layer import Layer


class Dropout(Layer, torch.nn.Dropout):
    """:class:`torch.nn.Dropout` on fused kernels. Backward needs one bit per element on a CPU, 16 bytes on a GPU.

    Shapes: input and output ``[*]``. Dtypes and errors are those of :func:`dlkit.functional.dropout`.
    """

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy) and self._is_leaf(input):
            return self._call_node(input)
        return F.dropout(input, self.p, self.training, self.inplace)


class DropoutAdd(Layer, torch.nn.Module):
    """Dropout and a residual add in one pass: ``forward(input, residual) -> dropout(input) + residual``.

    Shapes: input, residual and output ``[*]``. Dtypes and errors are those of :func:`dlkit.functional.dropout_add`.

    Args:
        p: the probability of an element of ``input`` to become 0.
    """

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        check_probability("DropoutAdd", p)
        self.p = p

    def extra_repr(self) -> str:
        return f"p={self.p}"

    def forward(self, input: Tensor, residual: Tensor) -> Tensor:
        if isinstance(input, Proxy) and self._is_leaf(input):
            return self._call_node(input, residual)
        return F.dropout_add(input, residual, self.p, self.training)


class DropoutAddLayerNorm(Layer, torch.nn.LayerNorm):
    """Dropout, residual add and LayerNorm in one pass: ``forward(input, residual) -> norm(dropout(input) + residual)``.

    Parameters and state_dict are :class:`torch.nn.LayerNorm`'s. Shapes: input, residual and outputs
    ``[*, *normalized_shape]``. Dtypes and errors are those of :func:`dlkit.functional.dropout_add_layer_norm`.

    Args:
        normalized_shape: the sizes of the dimensions to normalize over.
        p: the probability of an element of ``input`` to become 0.
        eps: added to the variance.
        elementwise_affine: have a weight, and a bias unless ``bias=False``.
        bias: have a bias.
        device: of the parameters.
        dtype: of the parameters.
        prenorm: return ``(y, sum)`` instead of ``y``.
    """

    def __init__(
        self,
        normalized_shape: Any,
        p: float = 0.5,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        prenorm: bool = False,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)
        check_probability("DropoutAddLayerNorm", p)
        self.p, self.prenorm = p, prenorm

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, p={self.p}, prenorm={self.prenorm}"

    def forward(self, input: Tensor, residual: Tensor) -> Any:  # type: ignore[override]
        if isinstance(input, Proxy) and self._is_leaf(input):
            return self._call_node(input, residual)
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


class DropoutAddRMSNorm(Layer, torch.nn.RMSNorm):
    """Dropout, residual add and RMSNorm in one pass: ``forward(x, residual) -> norm(dropout(x) + residual)``.

    Parameters and state_dict are :class:`torch.nn.RMSNorm`'s. Shapes: x, residual and outputs
    ``[*, *normalized_shape]``. Dtypes and errors are those of :func:`dlkit.functional.dropout_add_rms_norm`.

    Args:
        normalized_shape: the sizes of the dimensions to normalize over.
        p: the probability of an element of ``x`` to become 0.
        eps: added to the mean square; None: the machine epsilon of fp32 (of fp64 for fp64 input).
        elementwise_affine: have a weight.
        device: of the weight.
        dtype: of the weight.
        prenorm: return ``(y, sum)`` instead of ``y``.
    """

    def __init__(
        self,
        normalized_shape: Any,
        p: float = 0.5,
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        prenorm: bool = False,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype)
        check_probability("DropoutAddRMSNorm", p)
        self.p, self.prenorm = p, prenorm

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, p={self.p}, prenorm={self.prenorm}"

    def forward(self, x: Tensor, residual: Tensor) -> Any:  # type: ignore[override]
        if isinstance(x, Proxy) and self._is_leaf(x):
            return self._call_node(x, residual)
        return F.dropout_add_rms_norm(
            x, residual, self.normalized_shape, self.weight, self.p, self.eps, self.training, self.prenorm
        )


class Dropout1d(Layer, torch.nn.Dropout1d):
    """:class:`torch.nn.Dropout1d` on fused kernels, which store no mask.

    Shapes: input and output ``[N, C, L]`` or ``[C, L]``. Dtypes and errors are those of
    :func:`dlkit.functional.dropout1d`.
    """

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy) and self._is_leaf(input):
            return self._call_node(input)
        return F.dropout1d(input, self.p, self.training, self.inplace)


class Dropout2d(Layer, torch.nn.Dropout2d):
    """:class:`torch.nn.Dropout2d` on fused kernels, which store no mask.

    Shapes: input and output ``[N, C, H, W]``. Dtypes and errors are those of :func:`dlkit.functional.dropout2d`.
    """

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy) and self._is_leaf(input):
            return self._call_node(input)
        return F.dropout2d(input, self.p, self.training, self.inplace)


class Dropout3d(Layer, torch.nn.Dropout3d):
    """:class:`torch.nn.Dropout3d` on fused kernels, which store no mask.

    Shapes: input and output ``[N, C, D, H, W]``. Dtypes and errors are those of :func:`dlkit.functional.dropout3d`.
    """

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy) and self._is_leaf(input):
            return self._call_node(input)
        return F.dropout3d(input, self.p, self.training, self.inplace)


class AlphaDropout(Layer, torch.nn.AlphaDropout):
    """:class:`torch.nn.AlphaDropout` on fused kernels; keeps as much as :class:`Dropout`. Never in place, as torch's.

    Shapes: input and output ``[*]``. Dtypes and errors are those of :func:`dlkit.functional.alpha_dropout`.
    """

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy) and self._is_leaf(input):
            return self._call_node(input)
        return F.alpha_dropout(input, self.p, self.training)


class FeatureAlphaDropout(Layer, torch.nn.FeatureAlphaDropout):
    """:class:`torch.nn.FeatureAlphaDropout` on fused kernels, which store no mask. Never in place, as torch's.

    Shapes: input and output ``[N, C, *]``. Dtypes and errors are those of
    :func:`dlkit.functional.feature_alpha_dropout`.
    """

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy) and self._is_leaf(input):
            return self._call_node(input)
        return F.feature_alpha_dropout(input, self.p, self.training)


class DropPath(Layer, _DropoutNd):
    """Stochastic depth: drops whole samples.

    ``DropPath(p, inplace)``: ``p`` is the probability of a sample to become 0, ``inplace`` writes the result into the
    input. Shapes: input and output ``[N, *]``. Dtypes and errors are those of :func:`dlkit.functional.drop_path`.

    Raises:
        ValueError: p is not between 0 and 1.

    Source: `Deep Networks with Stochastic Depth <https://arxiv.org/abs/1603.09382>`_.
    """

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy) and self._is_leaf(input):
            return self._call_node(input)
        return F.drop_path(input, self.p, self.training, self.inplace)


class DropBlock2d(Layer, _DropoutNd):
    """Drops squares of ``block_size`` in each channel.

    Shapes: input and output ``[N, C, H, W]``, contiguous or channels_last. Dtypes and errors are those of
    :func:`dlkit.functional.dropblock2d`.

    Args:
        p: the share of elements to drop.
        block_size: the side of a square, in elements.
        inplace: write the result into the input. There is no ``eps`` as in torchvision: no division needs one.

    Raises:
        ValueError: p is not between 0 and 1.

    Source: `DropBlock: A regularization method for convolutional networks <https://arxiv.org/abs/1810.12890>`_.
    """

    def __init__(self, p: float, block_size: int, inplace: bool = False) -> None:
        super().__init__(p, inplace)
        self.block_size = block_size

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy) and self._is_leaf(input):
            return self._call_node(input)
        return F.dropblock2d(input, self.p, self.block_size, self.training, self.inplace)

    def extra_repr(self) -> str:
        return f"p={self.p}, block_size={self.block_size}, inplace={self.inplace}"


class DropConnectLinear(Layer, torch.nn.Linear):
    """A linear layer with dropout on its weights: ``y = x @ dropout(weight, p).T + bias``.

    Each call draws one mask for the whole batch: a mask for each sample would take the memory of N weights. The bias is
    not dropped. In evaluation the result is the linear layer's, because kept weights grow by ``1 / (1 - p)``.
    Shapes: input ``[*, in_features]``, output ``[*, out_features]``.

    Args:
        in_features: as in :class:`torch.nn.Linear`.
        out_features: as in :class:`torch.nn.Linear`.
        bias: have a bias.
        p: the probability of a weight to be dropped.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: p is not between 0 and 1.

    Source: `Regularization of Neural Networks using DropConnect <https://proceedings.mlr.press/v28/wan13.html>`_.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        p: float = 0.5,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_probability("DropConnectLinear", p)
        super().__init__(in_features, out_features, bias, device, dtype)
        self.p = p

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy) and self._is_leaf(input):
            return self._call_node(input)
        return torch.nn.functional.linear(input, F.dropout(self.weight, self.p, self.training), self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, p={self.p}"
