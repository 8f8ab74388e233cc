"""BatchNorm, GroupNorm and InstanceNorm, with a residual add and an activation."""

from typing import Any, NoReturn

from torch import Tensor

from dlkit._activation import ACTIVATIONS, number_of
from dlkit._ops import op
from dlkit.functional._arguments import check_flag, number, raise_channels

_batch_norm = op("batch_norm")
_group_norm = op("group_norm")
_instance_norm = op("instance_norm")


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Batch normalization of each channel over the batch, as :func:`torch.nn.functional.batch_norm`.

    ``y = (x - mean) / sqrt(var + eps) * weight + bias``, with the batch's mean and biased variance in training, and
    with the running ones in evaluation.

    Args:
        input: ``[N, C, *]`` of 2 dimensions or more, fp64, fp32, bf16 or fp16, contiguous or channels_last; each is
            computed in its own layout, others are copied first.
        running_mean: ``[C]``, any floating dtype; None together with ``running_var``. In training it moves towards the
            batch's mean by ``momentum``.
        running_var: the same for the unbiased variance.
        weight: ``[C]``, in the input's dtype or fp32, or None.
        bias: ``[C]``, in the dtype of ``weight``, or None.
        training: normalize by the batch's statistics and move the running ones.
        momentum: the share of the batch in the new running statistics, as a rule between 0 and 1.
        eps: added to the variance; above 0 in training, and not below 0 in evaluation.

    Returns:
        The input's shape, dtype and memory format. An empty batch gives an empty result and leaves the running
        statistics as they are, as torch does.

    Raises:
        ValueError: one value per channel in training, eps out of range, only one running statistic.
        RuntimeError: a shape, dtype or device does not fit; in evaluation, a running statistic is missing.
        NotImplementedError: input is not of a floating type.
        TypeError: an argument is of the wrong Python type. Running statistics are untouched by any of these.

    Source: `Batch Normalization <https://arxiv.org/abs/1502.03167>`_.
    """
    return _normalize_batch("batch_norm", input, running_mean, running_var, weight, bias, None, training, momentum, eps)


def refuse_batch_norm(
    name: str,
    error: Exception,
    input: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any,
    bias: Any,
    residual: Any,
    momentum: Any,
    eps: Any,
    negative_slope: Any,
) -> NoReturn:
    """Raises TypeError where an argument was of the wrong Python type, as torch does, else the error itself."""
    tensors = {"input": input, "running_mean": running_mean, "running_var": running_var, "weight": weight}
    numbers = {"momentum": momentum, "eps": eps, "negative_slope": negative_slope}
    raise_channels(name, error, tensors | {"bias": bias, "residual": residual}, **numbers)


def _normalize_batch(
    name: str,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    activation: int = 0,
    negative_slope: float = 0.01,
) -> Tensor:
    if momentum is None:
        number(name, "momentum", momentum)  # raises: None is only for layers, which count batches
    check_flag(name, "training", training)
    try:
        return _batch_norm(
            input,
            running_mean,
            running_var,
            weight,
            bias,
            residual,
            None,
            training,
            momentum,
            eps,
            activation,
            negative_slope,
        )
    except (RuntimeError, ValueError) as error:
        refuse_batch_norm(
            name, error, input, running_mean, running_var, weight, bias, residual, momentum, eps, negative_slope
        )


def batch_norm_relu(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    residual: Tensor | None = None,
) -> Tensor:
    """``relu(batch_norm(input) + residual)`` in one pass over memory, with :func:`batch_norm`'s statistics.

    Backward finds the ReLU's mask again from ``input``, or from the result where there is a residual: nothing else is
    kept.

    Args:
        input: ``[N, C, *]`` of 2 dimensions or more, fp64, fp32, bf16 or fp16, contiguous or channels_last.
        running_mean: ``[C]``, any floating dtype; None together with ``running_var``.
        running_var: the same for the unbiased variance.
        weight: ``[C]``, in the input's dtype or fp32, or None.
        bias: ``[C]``, in the dtype of ``weight``, or None.
        training: normalize by the batch's statistics and move the running ones.
        momentum: the share of the batch in the new running statistics.
        eps: added to the variance; above 0 in training, and not below 0 in evaluation.
        residual: broadcasts and promotes with the normalized input as in an addition, or None; the fast case is the
            input's shape and dtype.

    Returns:
        The input's shape, dtype and memory format; with a residual of another shape or dtype, those of the sum.

    Raises:
        ValueError: one value per channel in training, eps out of range, only one running statistic.
        RuntimeError: a shape, dtype or device does not fit; in evaluation, a running statistic is missing.
        NotImplementedError: input is not of a floating type.
        TypeError: an argument is of the wrong Python type. Running statistics are untouched by any of these.

    Source: `Batch Normalization <https://arxiv.org/abs/1502.03167>`_; the residual is that of `Deep Residual Learning
    <https://arxiv.org/abs/1512.03385>`_.
    """
    return _normalize_batch(
        "batch_norm_relu",
        input,
        running_mean,
        running_var,
        weight,
        bias,
        residual,
        training,
        momentum,
        eps,
        ACTIVATIONS["relu"],
    )


def batch_norm_act(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    activation: str | None = "silu",
    negative_slope: float = 0.01,
) -> Tensor:
    """``act(batch_norm(input) + residual)`` in one pass over memory, with :func:`batch_norm`'s statistics.

    Backward computes the activation again and keeps only ``input`` and ``residual``. With "relu" it is
    :func:`batch_norm_relu`.

    Args:
        input: ``[N, C, *]`` of 2 dimensions or more, fp64, fp32, bf16 or fp16, contiguous or channels_last.
        running_mean: ``[C]``, any floating dtype; None together with ``running_var``.
        running_var: the same for the unbiased variance.
        weight: ``[C]``, in the input's dtype or fp32, or None.
        bias: ``[C]``, in the dtype of ``weight``, or None.
        training: normalize by the batch's statistics and move the running ones.
        momentum: the share of the batch in the new running statistics.
        eps: added to the variance; above 0 in training, and not below 0 in evaluation.
        residual: broadcasts and promotes with the normalized input as in an addition, or None; the fast case is the
            input's shape and dtype.
        activation: "relu", "gelu", "gelu_tanh", "silu", "hardswish", "relu6", "leaky_relu", or None.
        negative_slope: the slope of "leaky_relu" below 0.

    Returns:
        The input's shape, dtype and memory format, rounded once; with a residual of another shape or dtype, those of
        the sum.

    Raises:
        ValueError: another activation, one value per channel in training, eps out of range, only one running statistic.
        RuntimeError: a shape, dtype or device does not fit; in evaluation, a running statistic is missing.
        NotImplementedError: input is not of a floating type.
        TypeError: an argument is of the wrong Python type. Running statistics are untouched by any of these.

    Source: `Batch Normalization <https://arxiv.org/abs/1502.03167>`_; "silu": `Searching for Activation Functions
    <https://arxiv.org/abs/1710.05941>`_.
    """
    return _normalize_batch(
        "batch_norm_act",
        input,
        running_mean,
        running_var,
        weight,
        bias,
        residual,
        training,
        momentum,
        eps,
        number_of("batch_norm_act", activation),
        negative_slope,
    )


def group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """Group normalization of each sample, as :func:`torch.nn.functional.group_norm`.

    Args:
        input: ``[N, C, *]``, fp64, fp32, bf16 or fp16, contiguous or channels_last.
        num_groups: the number of groups of adjacent channels into which C is divided.
        weight: ``[C]``, in the input's dtype or fp32, or None.
        bias: ``[C]``, in the dtype of ``weight``, or None.
        eps: added to the variance.

    Returns:
        The input's shape, dtype and memory format.

    Raises:
        ValueError: one value per group, or ``num_groups`` below 1.
        RuntimeError: a shape, dtype or device does not fit.
        NotImplementedError: input is not of a floating type.
        TypeError: an argument is of the wrong Python type.

    Source: `Group Normalization <https://arxiv.org/abs/1803.08494>`_.
    """
    return _normalize_groups("group_norm", input, num_groups, weight, bias, eps)


def _normalize_groups(
    name: str,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None = None,
    activation: int = 0,
    negative_slope: float = 0.01,
) -> Tensor:
    if isinstance(num_groups, (bool, float)):
        raise TypeError(f"{name}(): expected num_groups to be an int, got {type(num_groups).__name__}")
    try:
        return _group_norm(input, num_groups, weight, bias, eps, residual, activation, negative_slope)
    except (RuntimeError, ValueError) as error:
        tensors = {"input": input, "weight": weight, "bias": bias, "residual": residual}
        raise_channels(name, error, tensors, num_groups=num_groups, eps=eps, negative_slope=negative_slope)


def group_norm_act(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    activation: str | None = "silu",
    negative_slope: float = 0.01,
) -> Tensor:
    """``act(group_norm(input) + residual)`` in one pass over memory, with :func:`group_norm`'s statistics.

    Backward computes the activation again and keeps only ``input`` and ``residual``.

    Args:
        input: ``[N, C, *]``, fp64, fp32, bf16 or fp16, contiguous or channels_last.
        num_groups: the number of groups of adjacent channels into which C is divided.
        weight: ``[C]``, in the input's dtype or fp32, or None.
        bias: ``[C]``, in the dtype of ``weight``, or None.
        eps: added to the variance.
        residual: broadcasts and promotes with the normalized input as in an addition, or None; the fast case is the
            input's shape and dtype.
        activation: "relu", "gelu", "gelu_tanh", "silu", "hardswish", "relu6", "leaky_relu", or None.
        negative_slope: the slope of "leaky_relu" below 0.

    Returns:
        The input's shape, dtype and memory format, rounded once; with a residual of another shape or dtype, those of
        the sum.

    Raises:
        ValueError: another activation, one value per group, or ``num_groups`` below 1.
        RuntimeError: a shape, dtype or device does not fit.
        NotImplementedError: input is not of a floating type.
        TypeError: an argument is of the wrong Python type.

    Source: `Group Normalization <https://arxiv.org/abs/1803.08494>`_.
    """
    number = number_of("group_norm_act", activation)
    return _normalize_groups("group_norm_act", input, num_groups, weight, bias, eps, residual, number, negative_slope)


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Normalization of each channel of each sample, as :func:`torch.nn.functional.instance_norm`.

    Args:
        input: ``[N, C, *]`` of 3 dimensions or more, fp64, fp32, bf16 or fp16, contiguous or channels_last.
        running_mean: ``[C]``, or None. It moves towards the mean over the batch of each sample's mean.
        running_var: the same for the unbiased variance.
        weight: ``[C]``, in the input's dtype or fp32, or None.
        bias: ``[C]``, in the dtype of ``weight``, or None.
        use_input_stats: normalize by the input's statistics; False: by the running ones.
        momentum: the share of the batch in the new running statistics.
        eps: added to the variance.

    Returns:
        The input's shape, dtype and memory format; torch makes a channels_last input contiguous.

    Raises:
        ValueError: one value per channel, or another argument out of range.
        RuntimeError: a shape, dtype or device does not fit.
        NotImplementedError: input is not of a floating type.
        TypeError: an argument is of the wrong Python type.

    Source: `Instance Normalization <https://arxiv.org/abs/1607.08022>`_.
    """
    check_flag("instance_norm", "use_input_stats", use_input_stats)
    try:
        return _instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
    except (RuntimeError, ValueError) as error:
        tensors = {"input": input, "running_mean": running_mean, "running_var": running_var, "weight": weight}
        raise_channels("instance_norm", error, tensors | {"bias": bias}, momentum=momentum, eps=eps)
