"""BatchNorm over the batches of all processes of a torch.distributed group.

A process computes the mean and the variance of its own part, one all_gather shares them with the number of elements,
and Chan's formula combines them in float64, so that a large mean over a small variance loses nothing. Backward shares
the two sums of each channel in one all_reduce. An empty part counts for nothing, but its process takes part in both.

Processes with different numbers of channels would send messages of different sizes: Gloo aborts the process over that,
NCCL waits until its timeout. Therefore the gathered message has a fixed size. It holds the number of channels and the
statistics of up to 2,048 of them; wider layers gather the rest in a second message, after the numbers are compared.
"""

import functools
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.fx import Proxy

from dlkit._activation import ACTIVATIONS, activated, number_of
from dlkit.nn._layer import Layer
from dlkit.nn.batch_norm import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    BatchNormAct1d,
    BatchNormAct2d,
    BatchNormAct3d,
    BatchNormReLU1d,
    BatchNormReLU2d,
    BatchNormReLU3d,
    ChosenActivation,
    WithActivation,
    normalize,
)

_statistics = torch.ops.dlkit.batch_norm_statistics.default
_apply = torch.ops.dlkit.batch_norm_apply.default
_backward_sums = torch.ops.dlkit.batch_norm_backward_sums.default
_backward_apply = torch.ops.dlkit.batch_norm_backward_apply.default

_native_forward: Any = torch.nn.SyncBatchNorm.forward

# The name depends on torch's version.
_all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)

FIRST_MESSAGE = 2 * 2048  # a mean and a variance for each of 2048 channels: 16 KB in fp32
HEADER = 3  # the number of channels, then the number of elements a channel as upper and lower half
HALF = 2**24  # whole numbers up to this are exact in fp32


class SyncBatchNorm(Layer, torch.nn.modules.batchnorm._BatchNorm):
    """:class:`torch.nn.SyncBatchNorm` on fused kernels, on CPU (Gloo) as on GPU (NCCL): same arguments and state_dict.

    ``isinstance(layer, torch.nn.SyncBatchNorm)`` is False, because DistributedDataParallel refuses that class on a CPU.
    The layer is a ``torch.nn.modules.batchnorm._BatchNorm``.

    Shapes: input and output ``[N, C, *]``, weight, bias and running
    statistics ``[C]``.

    Args:
        num_features: the number of channels, C.
        eps: added to the variance.
        momentum: the share of the batch in the new running statistics; None: their average over all batches.
        affine: have a weight and a bias.
        track_running_stats: keep running statistics.
        process_group: the processes whose batches are normalized together; None: all.
        device: of the parameters and buffers.
        dtype: of the parameters and buffers.
        options: further arguments that the installed torch's BatchNorm takes.

    Raises:
        ValueError: in forward() and on every process: the numbers of channels differ between processes, or all of them
            together have one value per channel. On a GPU both are device-side assertions, which do not wait for it.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        device: Any = None,
        dtype: Any = None,
        **options: Any,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, **options)
        self.process_group = process_group

    _check_input_dim: Any = torch.nn.SyncBatchNorm._check_input_dim
    _check_non_zero_input_channels: Any = torch.nn.SyncBatchNorm._check_non_zero_input_channels

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy) and self._is_leaf(input):
            return self._call_node(input)
        return _forward(self, input)

    @classmethod
    def convert_sync_batchnorm(cls, module: torch.nn.Module, process_group: Any = None) -> torch.nn.Module:
        """Turns every BatchNorm layer of ``module``, torch's or dlkit's, into its synchronised form, in place.

        As :meth:`torch.nn.SyncBatchNorm.convert_sync_batchnorm`, but the layers stay the same objects, with their
        hooks. BatchNormReLU layers become :class:`SyncBatchNormReLU`, BatchNormAct layers :class:`SyncBatchNormAct`.
        Layers of other classes that derive from BatchNorm may do something else: they are left as they are, with a
        warning.

        Args:
            module: any module, also a single layer.
            process_group: the group of all converted layers; None: all processes.

        Returns:
            ``module``.
        """
        for name, layer in module.named_modules():
            if type(layer) in SYNCHRONISED and "forward" not in vars(layer):
                layer.__class__ = SYNCHRONISED[type(layer)]
                layer.process_group = process_group
            elif isinstance(layer, torch.nn.modules.batchnorm._BatchNorm):
                what = f"{name or 'the module itself'} ({type(layer).__module__}.{type(layer).__qualname__})"
                warnings.warn(f"{what} is not exactly a BatchNorm layer and is not synchronised", stacklevel=2)
        return module


class SyncBatchNormReLU(WithActivation, SyncBatchNorm):
    """``relu(batch_norm(input) + residual)`` over all processes: ``forward(input, residual=None)``.

    Arguments, parameters, state_dict and errors are :class:`SyncBatchNorm`'s. Shapes: input, residual and output
    ``[N, C, *]``.
    """

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        if isinstance(input, Proxy) and self._is_leaf(input):
            return self._call_node(input, residual)
        return _forward(self, input, residual, "relu")


class SyncBatchNormAct(ChosenActivation, WithActivation, SyncBatchNorm):
    """``act(batch_norm(input) + residual)`` over all processes: ``forward(input, residual=None)``.

    Arguments, parameters, state_dict and errors are :class:`SyncBatchNorm`'s, with two more keyword arguments.
    Shapes: input, residual and output ``[N, C, *]``.

    Args:
        activation: "silu", or another that :func:`dlkit.functional.batch_norm_act` has.
        negative_slope: the slope of "leaky_relu" below 0.
    """

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        if isinstance(input, Proxy) and self._is_leaf(input):
            return self._call_node(input, residual)
        return _forward(self, input, residual, self.activation, self.negative_slope)


SYNCHRONISED: dict[type[torch.nn.Module], type[SyncBatchNorm]] = {
    **dict.fromkeys((torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, torch.nn.BatchNorm3d), SyncBatchNorm),
    **dict.fromkeys((BatchNorm1d, BatchNorm2d, BatchNorm3d), SyncBatchNorm),
    **dict.fromkeys((torch.nn.SyncBatchNorm, SyncBatchNorm), SyncBatchNorm),
    **dict.fromkeys((BatchNormReLU1d, BatchNormReLU2d, BatchNormReLU3d, SyncBatchNormReLU), SyncBatchNormReLU),
    **dict.fromkeys((BatchNormAct1d, BatchNormAct2d, BatchNormAct3d, SyncBatchNormAct), SyncBatchNormAct),
}


def _forward(
    layer: SyncBatchNorm,
    input: Tensor,
    residual: Tensor | None = None,
    activation: str | None = None,
    negative_slope: float = 0.01,
) -> Tensor:
    layer._check_input_dim(input)
    layer._check_non_zero_input_channels(input)
    group = layer.process_group or (dist.group.WORLD if dist.is_available() and dist.is_initialized() else None)
    if not layer.training or group is None or dist.get_world_size(group) <= 1:
        return normalize(layer, input, residual, activation, negative_slope)
    number = number_of(type(layer).__name__, activation)
    apart = residual is not None and (residual.shape != input.shape or residual.dtype != input.dtype)
    if apart or not _has_kernel(input.device.type):
        y = _forward(layer, input) if apart else _native_forward(layer, input)
        y = y if residual is None else y + residual
        return activated(y, number, negative_slope)
    tracked = layer.track_running_stats
    running_mean, running_var = (layer.running_mean, layer.running_var) if tracked else (None, None)
    if residual is not None and residual.device != input.device:
        raise RuntimeError(f"SyncBatchNorm: expected residual on {input.device} as input, got {residual.device}")
    _check(input, running_mean=running_mean, running_var=running_var, weight=layer.weight, bias=layer.bias)
    return _Synchronised.apply(
        input,
        residual,
        layer.weight,
        layer.bias,
        running_mean,
        running_var,
        layer.num_batches_tracked if tracked else None,
        layer.momentum,
        layer.eps,
        number,
        negative_slope,
        group,
    )


@functools.cache
def _has_kernel(device: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key("dlkit::batch_norm_statistics", device.upper())


def _check(input: Tensor, **vectors: Tensor | None) -> None:
    """Raises where batch_norm() would, before the other processes are waited for."""
    if not input.is_floating_point():
        raise NotImplementedError(f"SyncBatchNorm: expected input of a floating type, got {input.dtype}")
    for name, vector in vectors.items():
        if vector is None:
            continue
        if vector.shape != input.shape[1:2]:
            expected = f"[{input.size(1)}] (the channels of input {list(input.shape)})"
            raise RuntimeError(f"SyncBatchNorm: expected {name} of shape {expected}, got {list(vector.shape)}")
        if vector.device != input.device:
            raise RuntimeError(f"SyncBatchNorm: expected {name} on {input.device} as input, got {vector.device}")
        fp32 = vector.dtype == torch.float32 and input.dtype != torch.float64
        if name in ("weight", "bias") and not fp32 and vector.dtype != input.dtype:
            raise RuntimeError(f"SyncBatchNorm: expected {name} of {input.dtype} as input, or fp32, got {vector.dtype}")


class _Synchronised(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        num_batches_tracked: Tensor | None,
        momentum: float | None,
        eps: float,
        activation: int,
        negative_slope: float,
        group: Any,
    ) -> Tensor:
        exact_mean, exact_var, count = _global_statistics(input, group)
        if num_batches_tracked is not None:
            num_batches_tracked.add_(1)
        if running_mean is not None and running_var is not None:
            # If the input is empty on every process, running statistics stay.
            factor = (count > 0).double()
            if momentum is not None:
                factor = factor * momentum
            else:
                factor = factor * 0 if num_batches_tracked is None else factor / num_batches_tracked
            running_mean.lerp_(exact_mean.to(running_mean.dtype), factor.to(running_mean.dtype))
            unbiased = exact_var * (count / (count - 1))
            running_var.lerp_(unbiased.to(running_var.dtype), factor.to(running_var.dtype))
        accumulate = torch.float64 if input.dtype == torch.float64 else torch.float32
        mean, rstd = exact_mean.to(accumulate), (exact_var + eps).rsqrt().to(accumulate)
        empty = input.numel() == 0
        rest = (residual, weight, bias, mean, rstd, activation, negative_slope)
        y = torch.empty_like(input) if empty else _apply(input, *rest)
        ctx.activation, ctx.negative_slope, ctx.group = activation, negative_slope, group
        # Backward finds a ReLU's mask after a residual add from y. In all other cases it computes the activation's
        # input again, from input, residual and bias. Where that is not needed, the bias only tells its dtype.
        known = None if residual is None or activation == 0 else y if activation == ACTIVATIONS["relu"] else residual
        finds = activation != 0 and not (activation == ACTIVATIONS["relu"] and residual is not None)
        kept_bias = bias if bias is None or finds else torch.empty_like(bias)
        ctx.save_for_backward(input, known, weight, kept_bias, mean, rstd, count)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, known, weight, bias, mean, rstd, count = ctx.saved_tensors
        needs_input, needs_residual, needs_weight, needs_bias = ctx.needs_input_grad[:4]
        empty = input.numel() == 0
        saved = (grad_output, input, known, weight, bias, mean, rstd)
        slope = {"negative_slope": ctx.negative_slope}
        if empty:
            sums = mean.new_zeros(2, mean.numel())
            grad_weight = torch.zeros_like(weight) if needs_weight else None
            grad_bias = torch.zeros_like(bias) if needs_bias else None
        else:
            sums, grad_weight, grad_bias = _backward_sums(*saved, ctx.activation, [needs_weight, needs_bias], **slope)
        if needs_input:
            dist.all_reduce(sums, group=ctx.group)
            sums = sums / count
        if empty:
            grad_input = torch.empty_like(input) if needs_input else None
            grad_residual = torch.empty_like(input) if needs_residual else None
        else:
            grad_input, grad_residual = _backward_apply(
                *saved, sums, ctx.activation, [needs_input, needs_residual], **slope
            )
        return grad_input, grad_residual, grad_weight, grad_bias, *[None] * 8


def _global_statistics(input: Tensor, group: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The mean, the biased variance and the number of elements of each channel over all processes, in fp64."""
    channels = input.size(1)
    count = input.numel() // channels
    if count > 0:
        own = torch.cat(_statistics(input, 0))
    else:
        own = input.new_zeros(2 * channels, dtype=torch.float64 if input.dtype == torch.float64 else torch.float32)
    message = own.new_zeros(HEADER + FIRST_MESSAGE)
    for i, number in enumerate((channels, count // HALF, count % HALF)):
        message[i] = number
    message[HEADER : HEADER + own.numel()] = own[:FIRST_MESSAGE]
    messages = _gather(message, group)
    counts = messages[:, 1:2].double() * HALF + messages[:, 2:3]
    _check_agreement(messages[:, 0], counts, channels)
    all_own = messages[:, HEADER : HEADER + own.numel()]
    if own.numel() > FIRST_MESSAGE:
        all_own = torch.cat([all_own, _gather(own[FIRST_MESSAGE:], group)], dim=1)
    means, variances = all_own.double().split(channels, dim=1)
    total = counts.sum()
    weights = counts / total.clamp(min=1)
    mean = (weights * means).sum(0)
    var = (weights * (variances + (means - mean).square())).sum(0)
    return mean, var, total


def _gather(message: Tensor, group: Any) -> Tensor:
    """The message of every process, [processes, *]."""
    processes = dist.get_world_size(group)
    gathered = message.new_empty(processes * message.numel())
    _all_gather(gathered, message, group=group)
    return gathered.view(processes, -1)


def _check_agreement(channels: Tensor, counts: Tensor, expected: int) -> None:
    differ = "SyncBatchNorm: expected the same number of channels in every process"
    single = "SyncBatchNorm: expected more than 1 value per channel when training, got 1 in all processes together"
    if channels.device.type != "cpu":  # assertions on the device: they do not wait for it
        torch._assert_async((channels == expected).all(), differ)
        torch._assert_async(counts.sum() != 1, single)
        return
    if (channels != expected).any():
        raise ValueError(f"{differ}, got {[int(number) for number in channels.tolist()]} in order of rank")
    if counts.sum() == 1:
        raise ValueError(single)
