"""LayerNorm and RMSNorm, with and without the residual add before them."""

import torch
from torch import Tensor
from torch.fx import Proxy

from dlkit import functional as F
from dlkit.nn._layer import Layer


def affine(layer: torch.nn.LayerNorm | torch.nn.GroupNorm) -> tuple[Tensor | None, Tensor | None]:
    """``layer.weight, layer.bias``, but 1 us faster. A call on a small tensor takes 8 us."""
    parameters = layer._parameters
    if "weight" in parameters and "bias" in parameters:
        return parameters["weight"], parameters["bias"]
    return layer.weight, layer.bias  # not in _parameters: parametrized, or flattened by FSDP


class LayerNorm(Layer, torch.nn.LayerNorm):
    """:class:`torch.nn.LayerNorm` on fused kernels: the same arguments, parameters and state_dict.

    Shapes: input and output ``[*, *normalized_shape]``; weight and bias ``normalized_shape``. Dtypes and errors are
    those of :func:`dlkit.functional.layer_norm`.
    """

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy) and self._is_leaf(input):
            return self._call_node(input)
        weight, bias = affine(self)
        return F.layer_norm(input, self.normalized_shape, weight, bias, self.eps)


class RMSNorm(Layer, torch.nn.RMSNorm):
    """:class:`torch.nn.RMSNorm` on fused kernels: the same arguments, parameters and state_dict.

    Shapes: input and output ``[*, *normalized_shape]``; weight ``normalized_shape``. Dtypes and errors are those of
    :func:`dlkit.functional.rms_norm`.
    """

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, Proxy) and self._is_leaf(x):
            return self._call_node(x)
        return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)


class AddLayerNorm(Layer, torch.nn.LayerNorm):
    """Residual add and LayerNorm in one pass: ``forward(input, residual) -> (y, input + residual)``.

    Arguments, parameters and state_dict are :class:`torch.nn.LayerNorm`'s. Shapes: input, residual and both outputs
    ``[*, *normalized_shape]``. Dtypes and errors are those of :func:`dlkit.functional.add_layer_norm`.
    """

    def forward(self, input: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        if isinstance(input, Proxy) and self._is_leaf(input):
            return self._call_node(input, residual)
        return F.add_layer_norm(input, residual, self.normalized_shape, self.weight, self.bias, self.eps)


class AddRMSNorm(Layer, torch.nn.RMSNorm):
    """Residual add and RMSNorm in one pass: ``forward(x, residual) -> (y, x + residual)``.

    Arguments, parameters and state_dict are :class:`torch.nn.RMSNorm`'s. Shapes: x, residual and both outputs
    ``[*, *normalized_shape]``. Dtypes and errors are those of :func:`dlkit.functional.add_rms_norm`.
    """

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        if isinstance(x, Proxy) and self._is_leaf(x):
            return self._call_node(x, residual)
        return F.add_rms_norm(x, residual, self.normalized_shape, self.weight, self.eps)
