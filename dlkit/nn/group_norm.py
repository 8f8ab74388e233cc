"""GroupNorm and InstanceNorm."""

import torch
import torch.fx
from torch import Tensor
from torch.fx import Proxy

from dlkit import functional as F
from dlkit.nn._layer import Layer
from dlkit.nn.batch_norm import ChosenActivation
from dlkit.nn.layer_norm import affine


class GroupNorm(Layer, torch.nn.GroupNorm):
    """:class:`torch.nn.GroupNorm` on fused kernels: the same arguments, parameters and state_dict.

    Shapes: input and output ``[N, C, *]``, contiguous or channels_last; weight and bias ``[C]``. Dtypes and errors are
    those of :func:`dlkit.functional.group_norm`.
    """

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy) and self._is_leaf(input):
            return self._call_node(input)
        weight, bias = affine(self)
        return F.group_norm(input, self.num_groups, weight, bias, self.eps)


class GroupNormAct(ChosenActivation, GroupNorm):
    """``act(group_norm(input) + residual)`` in one pass: ``forward(input, residual=None)``.

    Arguments, parameters and state_dict are :class:`torch.nn.GroupNorm`'s, and two keyword arguments. Shapes:
    input, residual and output ``[N, C, *]``, contiguous or channels_last. Dtypes and errors are those of
    :func:`dlkit.functional.group_norm_act`.

    Args:
        activation: "silu", or another that :func:`dlkit.functional.group_norm_act` has.
        negative_slope: the slope of "leaky_relu" below 0.
    """

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        if isinstance(input, Proxy) and self._is_leaf(input):
            return self._call_node(input, residual)
        weight, bias = affine(self)
        rest = (residual, self.activation, self.negative_slope)
        return F.group_norm_act(input, self.num_groups, weight, bias, self.eps, *rest)


_TorchInstanceNorm = torch.nn.modules.instancenorm._InstanceNorm


def normalize_instances(layer: _TorchInstanceNorm, input: Tensor) -> Tensor:
    """torch's checks, then ``layer._apply_instance_norm``. An unbatched input becomes a batch of one."""
    return _TorchInstanceNorm.forward(layer, input)


torch.fx.wrap("normalize_instances")  # one node in a graph, as torch's own layers are


class _InstanceNorm(Layer, _TorchInstanceNorm):
    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy) and self._is_leaf(input):
            return self._call_node(input)
        return normalize_instances(self, input)

    def _apply_instance_norm(self, input: Tensor) -> Tensor:
        use_input_stats = self.training or not self.track_running_stats
        momentum = 0.0 if self.momentum is None else self.momentum
        return F.instance_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, use_input_stats, momentum, self.eps
        )


class InstanceNorm1d(_InstanceNorm, torch.nn.InstanceNorm1d):
    """:class:`torch.nn.InstanceNorm1d` on fused kernels: the same arguments, parameters, buffers and state_dict.

    Shapes: input and output ``[N, C, L]`` or ``[C, L]``. Dtypes and errors are those of
    :func:`dlkit.functional.instance_norm`.
    """


class InstanceNorm2d(_InstanceNorm, torch.nn.InstanceNorm2d):
    """:class:`torch.nn.InstanceNorm2d` on fused kernels: the same arguments, parameters, buffers and state_dict.

    Shapes: input and output ``[N, C, H, W]`` or ``[C, H, W]``. Dtypes and errors are those of
    :func:`dlkit.functional.instance_norm`.
    """


class InstanceNorm3d(_InstanceNorm, torch.nn.InstanceNorm3d):
    """:class:`torch.nn.InstanceNorm3d` on fused kernels: the same arguments, parameters, buffers and state_dict.

    Shapes: input and output ``[N, C, D, H, W]`` or ``[C, D, H, W]``. Dtypes and errors are those of
    :func:`dlkit.functional.instance_norm`.
    """
