"""BatchNorm, also with the residual add and the activation that follow it."""

import re
import sys
from typing import Any

import torch
import torch.fx
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.fx import Proxy

from dlkit._activation import number_of
from dlkit._ops import op
from dlkit.functional._batch_norm import refuse_batch_norm
from dlkit.nn._layer import Layer

_batch_norm = op("batch_norm")
_TorchBatchNorm = torch.nn.modules.batchnorm._BatchNorm


def normalize(
    layer: _TorchBatchNorm,
    input: Tensor,
    residual: Tensor | None = None,
    activation: str | None = None,
    negative_slope: float = 0.01,
) -> Tensor:
    """The forward() of every BatchNorm layer, in training and in evaluation."""
    layer._check_input_dim(input)
    training = bool(layer.training)
    running_mean = running_var = num_batches_tracked = None
    if layer.track_running_stats or not training:
        running_mean, running_var = layer.running_mean, layer.running_var
        if training:
            num_batches_tracked = layer.num_batches_tracked
    momentum = layer.momentum
    if momentum is None and num_batches_tracked is None:
        momentum = 0.0  # as torch: without a count of batches there is no cumulative average
    use_batch = training or (running_mean is None and running_var is None)
    eps = layer.__dict__["eps"]  # past the guard of _guarded()
    try:
        return _batch_norm(
            input,
            running_mean,
            running_var,
            layer.weight,
            layer.bias,
            residual,
            num_batches_tracked,
            use_batch,
            momentum,
            eps,
            number_of(type(layer).__name__, activation),
            negative_slope,
        )
    except (RuntimeError, ValueError) as error:
        refuse_batch_norm(
            type(layer).__name__,
            error,
            input,
            running_mean,
            running_var,
            layer.weight,
            layer.bias,
            residual,
            0.0 if momentum is None else momentum,
            eps,
            negative_slope,
        )


torch.fx.wrap("normalize")  # one node in a graph, as torch's own layers are


class _BatchNorm(Layer, _TorchBatchNorm):
    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy) and self._is_leaf(input):
            return self._call_node(input)
        return normalize(self, input)


class BatchNorm1d(_BatchNorm, torch.nn.BatchNorm1d):
    """:class:`torch.nn.BatchNorm1d` on fused kernels: the same arguments, parameters, buffers and state_dict.

    Shapes: input and output ``[N, C]`` or ``[N, C, L]``. Dtypes and errors are those of
    :func:`dlkit.functional.batch_norm`.
    """


class BatchNorm2d(_BatchNorm, torch.nn.BatchNorm2d):
    """:class:`torch.nn.BatchNorm2d` on fused kernels: the same arguments, parameters, buffers and state_dict.

    Shapes: input and output ``[N, C, H, W]``, contiguous or channels_last. Dtypes and errors are those of
    :func:`dlkit.functional.batch_norm`.
    """


class BatchNorm3d(_BatchNorm, torch.nn.BatchNorm3d):
    """:class:`torch.nn.BatchNorm3d` on fused kernels: the same arguments, parameters, buffers and state_dict.

    Shapes: input and output ``[N, C, D, H, W]``, contiguous or channels_last_3d. Dtypes and errors are those of
    :func:`dlkit.functional.batch_norm`.
    """


_CONVERSIONS = re.compile("convert|fuse|fold|fr[eo]ez|frozen|merge|replace|sync")


def _guarded(name: str) -> Any:
    """An attribute that conversion tools may not read.

    A BatchNorm with an activation is a BatchNorm to ``isinstance``, because weight decay, hooks and freezing go by
    that. A tool that converts it to another layer, as ``torch.nn.SyncBatchNorm.convert_sync_batchnorm`` and
    ``fuse_conv_bn_eval`` do, would silently lose the activation. All such tools read ``eps`` or ``num_features``:
    functions whose names match _CONVERSIONS get an error there.
    """

    def read(layer: Any) -> Any:
        if not is_dynamo_compiling():
            caller = sys._getframe(1)
            if _CONVERSIONS.search(caller.f_code.co_name) and not caller.f_globals["__name__"].startswith("dlkit."):
                raise TypeError(
                    f"{type(layer).__name__} does the work of the activation after it too, which "
                    f"{caller.f_code.co_name}() "
                    "would lose; call dlkit.restore(model) first, which undoes dlkit.fuse() (to synchronise: "
                    "dlkit.nn.SyncBatchNorm.convert_sync_batchnorm(model) knows these layers)"
                )
        return layer.__dict__[name]

    def write(layer: Any, value: Any) -> None:
        layer.__dict__[name] = value

    return property(read, write)


class WithActivation:
    """Mixed into BatchNorm layers that also compute an activation: see :func:`_guarded`."""

    eps = _guarded("eps")
    num_features = _guarded("num_features")


class ChosenActivation:
    """Mixed into norms that compute an activation after the norm. The activation is an attribute."""

    activation: str | None
    negative_slope: float

    def __init__(
        self,
        *args: Any,
        activation: str | None = "silu",
        negative_slope: float = 0.01,
        device: Any = None,  # in the signature, where torch.nn.utils.skip_init looks for it
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        given = {"device": device, "dtype": dtype}
        super().__init__(*args, **options, **{name: value for name, value in given.items() if value is not None})
        number_of(type(self).__name__, activation)
        self.activation, self.negative_slope = activation, negative_slope

    def extra_repr(self) -> str:
        slope = f", negative_slope={self.negative_slope}" if self.activation == "leaky_relu" else ""
        return f"{super().extra_repr()}, activation={self.activation!r}{slope}"  # type: ignore[misc]


class _BatchNormAct(ChosenActivation, WithActivation, _BatchNorm):
    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        if isinstance(input, Proxy) and self._is_leaf(input):
            return self._call_node(input, residual)
        return normalize(self, input, residual, self.activation, self.negative_slope)


class _BatchNormReLU(WithActivation, _BatchNorm):
    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        if isinstance(input, Proxy) and self._is_leaf(input):
            return self._call_node(input, residual)
        return normalize(self, input, residual, "relu")


class BatchNormReLU1d(_BatchNormReLU, BatchNorm1d):
    """``relu(batch_norm(input) + residual)`` in one pass: ``forward(input, residual=None)``.

    Arguments, parameters and state_dict are :class:`torch.nn.BatchNorm1d`'s. Shapes: input, residual and output
    ``[N, C]`` or ``[N, C, L]``. Dtypes and errors are those of
    :func:`dlkit.functional.batch_norm_relu`.
    """


class BatchNormReLU2d(_BatchNormReLU, BatchNorm2d):
    """``relu(batch_norm(input) + residual)`` in one pass: ``forward(input, residual=None)``.

    Arguments, parameters and state_dict are :class:`torch.nn.BatchNorm2d`'s. Shapes: input, residual and output
    ``[N, C, H, W]``, contiguous or channels_last. Dtypes and errors are those of
    :func:`dlkit.functional.batch_norm_relu`.
    """


class BatchNormReLU3d(_BatchNormReLU, BatchNorm3d):
    """``relu(batch_norm(input) + residual)`` in one pass: ``forward(input, residual=None)``.

    Arguments, parameters and state_dict are :class:`torch.nn.BatchNorm3d`'s. Shapes: input, residual and output
    ``[N, C, D, H, W]``, contiguous or channels_last_3d. Dtypes and errors are those of
    :func:`dlkit.functional.batch_norm_relu`.
    """


class BatchNormAct1d(_BatchNormAct, BatchNorm1d):
    """``act(batch_norm(input) + residual)`` in one pass: ``forward(input, residual=None)``.

    Arguments, parameters and state_dict are :class:`torch.nn.BatchNorm1d`'s, and two keyword arguments.
    Shapes: input, residual and output ``[N, C]`` or ``[N, C, L]``. Dtypes and
    errors are those of :func:`dlkit.functional.batch_norm_act`.

    Args:
        activation: "silu", or another that :func:`dlkit.functional.batch_norm_act` has.
        negative_slope: the slope of "leaky_relu" below 0.
    """


class BatchNormAct2d(_BatchNormAct, BatchNorm2d):
    """``act(batch_norm(input) + residual)`` in one pass: ``forward(input, residual=None)``.

    Arguments, parameters and state_dict are :class:`torch.nn.BatchNorm2d`'s, and two keyword arguments.
    Shapes: input, residual and output ``[N, C, H, W]``, contiguous or channels_last. Dtypes and
    errors are those of :func:`dlkit.functional.batch_norm_act`.

    Args:
        activation: "silu", or another that :func:`dlkit.functional.batch_norm_act` has.
        negative_slope: the slope of "leaky_relu" below 0.
    """


class BatchNormAct3d(_BatchNormAct, BatchNorm3d):
    """``act(batch_norm(input) + residual)`` in one pass: ``forward(input, residual=None)``.

    Arguments, parameters and state_dict are :class:`torch.nn.BatchNorm3d`'s, and two keyword arguments.
    Shapes: input, residual and output ``[N, C, D, H, W]``, contiguous or channels_last_3d. Dtypes and
    errors are those of :func:`dlkit.functional.batch_norm_act`.

    Args:
        activation: "silu", or another that :func:`dlkit.functional.batch_norm_act` has.
        negative_slope: the slope of "leaky_relu" below 0.
    """
