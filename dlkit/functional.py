"""The names and signatures of torch.nn.functional, and the fused operations beside them."""

import numbers
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
import torch.fx
from torch import Tensor
from torch.compiler import is_exporting

from dlkit import _native, random
from dlkit._ops import op

_layer_norm = op("layer_norm")
_rms_norm = op("rms_norm")
_add_layer_norm = op("add_layer_norm")
_add_rms_norm = op("add_rms_norm")
_batch_norm = op("batch_norm")
_group_norm = op("group_norm")
_instance_norm = op("instance_norm")
_dropout = op("dropout")
_dropout_ = op("dropout_")
_dropout_add = op("dropout_add")
_bias_act_dropout = op("bias_act_dropout")
_dropblock2d = op("dropblock2d")
_dropblock2d_ = op("dropblock2d_")
_dropout_add_layer_norm = op("dropout_add_layer_norm")
_dropout_add_rms_norm = op("dropout_add_rms_norm")
_cross_entropy = op("cross_entropy")
_linear_cross_entropy = op("linear_cross_entropy")


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Layer normalization over the last dimensions, as :func:`torch.nn.functional.layer_norm`.

    ``y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias``, with the biased variance of each row.

    Args:
        input: ``[*, *normalized_shape]``, fp64, fp32, bf16 or fp16, any strides.
        normalized_shape: the sizes of the dimensions to normalize over.
        weight: ``normalized_shape``, in the input's dtype or fp32 (on every device), or None.
        bias: ``normalized_shape``, in the dtype of ``weight``, or None.
        eps: added to the variance.

    Returns:
        The input's shape and dtype, contiguous. Statistics are computed in fp32 (fp64 for fp64 input).

    Raises:
        RuntimeError: a shape, dtype or device does not fit.
        NotImplementedError: input is not of a floating type.
        TypeError: an argument is of the wrong Python type.

    Source: `Layer Normalization <https://arxiv.org/abs/1607.06450>`_.
    """
    try:
        return _layer_norm(input, normalized_shape, weight, bias, eps)
    except (RuntimeError, ValueError) as error:
        _raise("layer_norm", error, normalized_shape, eps, input=input, weight=weight, bias=bias)


def rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """Root mean square normalization over the last dimensions, as :func:`torch.nn.functional.rms_norm`.

    ``y = x / sqrt(mean(x**2) + eps) * weight``.

    Args:
        input: ``[*, *normalized_shape]``, fp64, fp32, bf16 or fp16, any strides.
        normalized_shape: the sizes of the dimensions to normalize over.
        weight: ``normalized_shape``, any floating dtype, or None.
        eps: added to the mean square; None stands for the machine epsilon of fp32 (of fp64 for fp64 input).

    Returns:
        The input's shape and dtype, contiguous (4-D and 5-D channels_last input: channels_last, as torch does).

    Raises:
        RuntimeError: a shape or device does not fit.
        ValueError: the input has fewer dimensions than ``normalized_shape``.
        NotImplementedError: input is not of a floating type.
        TypeError: an argument is of the wrong Python type.

    Source: `Root Mean Square Layer Normalization <https://arxiv.org/abs/1910.07467>`_.
    """
    try:
        return _rms_norm(input, normalized_shape, weight, eps)
    except (RuntimeError, ValueError) as error:
        _raise("rms_norm", error, normalized_shape, eps, input=input, weight=weight)


def add_layer_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """``sum = input + residual`` and ``y = layer_norm(sum)`` in one pass over memory.

    Gradients flow through both outputs.

    Args:
        input: ``[*, *normalized_shape]``, fp64, fp32, bf16 or fp16, any strides.
        residual: broadcasts and promotes with ``input`` as in an addition; the fast case is equal shapes and dtypes.
        normalized_shape: the sizes of the dimensions to normalize over.
        weight: ``normalized_shape``, in the dtype of ``sum`` or fp32, or None.
        bias: ``normalized_shape``, in the dtype of ``weight``, or None.
        eps: added to the variance.

    Returns:
        ``(y, sum)``, both of the shape and dtype of ``input + residual``.

    Raises:
        RuntimeError: a shape, dtype or device does not fit.
        NotImplementedError: the sum is not of a floating type.
        TypeError: an argument is of the wrong Python type.

    Source: `Layer Normalization <https://arxiv.org/abs/1607.06450>`_.
    """
    try:
        return _add_layer_norm(input, residual, normalized_shape, weight, bias, eps)
    except (RuntimeError, ValueError) as error:
        _raise("add_layer_norm", error, normalized_shape, eps, input=input, residual=residual, weight=weight, bias=bias)


def add_rms_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> tuple[Tensor, Tensor]:
    """``sum = input + residual`` and ``y = rms_norm(sum)`` in one pass over memory.

    Gradients flow through both outputs.

    Args:
        input: ``[*, *normalized_shape]``, fp64, fp32, bf16 or fp16, any strides.
        residual: broadcasts and promotes with ``input`` as in an addition; the fast case is equal shapes and dtypes.
        normalized_shape: the sizes of the dimensions to normalize over.
        weight: ``normalized_shape``, any floating dtype, or None.
        eps: added to the mean square; None stands for the machine epsilon of fp32 (of fp64 for an fp64 sum).

    Returns:
        ``(y, sum)``, both of the shape and dtype of ``input + residual``.

    Raises:
        RuntimeError: a shape or device does not fit.
        ValueError: the input has fewer dimensions than ``normalized_shape``.
        NotImplementedError: the sum is not of a floating type.
        TypeError: an argument is of the wrong Python type.

    Source: `Root Mean Square Layer Normalization <https://arxiv.org/abs/1910.07467>`_.
    """
    try:
        return _add_rms_norm(input, residual, normalized_shape, weight, eps)
    except (RuntimeError, ValueError) as error:
        _raise("add_rms_norm", error, normalized_shape, eps, input=input, residual=residual, weight=weight)


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
    the running ones else.

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
    return _normalize_batch(
        "batch_norm", input, running_mean, running_var, weight, bias, None, training, momentum, eps, False
    )


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
) -> NoReturn:
    """Raises TypeError where an argument was of the wrong Python type, as torch does, else the error itself."""
    tensors = {"input": input, "running_mean": running_mean, "running_var": running_var, "weight": weight}
    _raise_channels(name, error, tensors | {"bias": bias, "residual": residual}, momentum=momentum, eps=eps)


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
    relu: bool,
) -> Tensor:
    if momentum is None:
        number(name, "momentum", momentum)  # None is for layers, which count
    check_flag(name, "training", training)
    try:
        return _batch_norm(
            input, running_mean, running_var, weight, bias, residual, None, training, momentum, eps, relu
        )
    except (RuntimeError, ValueError) as error:
        refuse_batch_norm(name, error, input, running_mean, running_var, weight, bias, residual, momentum, eps)


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
        "batch_norm_relu", input, running_mean, running_var, weight, bias, residual, training, momentum, eps, True
    )


def group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """Group normalization of each sample, as :func:`torch.nn.functional.group_norm`.

    Args:
        input: ``[N, C, *]``, fp64, fp32, bf16 or fp16, contiguous or channels_last.
        num_groups: into how many groups of adjacent channels C is divided.
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
    if isinstance(num_groups, (bool, float)):
        raise TypeError(f"group_norm(): expected num_groups to be an int, got {type(num_groups).__name__}")
    try:
        return _group_norm(input, num_groups, weight, bias, eps)
    except (RuntimeError, ValueError) as error:
        _raise_channels(
            "group_norm", error, {"input": input, "weight": weight, "bias": bias}, num_groups=num_groups, eps=eps
        )


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
        _raise_channels("instance_norm", error, tensors | {"bias": bias}, momentum=momentum, eps=eps)


Generator = torch.Generator | random.Philox


def dropout(
    input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False, *, generator: Generator | None = None
) -> Tensor:
    """Dropout, as :func:`torch.nn.functional.dropout`: each element becomes 0 with probability ``p``, the others grow
    by ``1 / (1 - p)``.

    No mask is stored: backward draws it again from the seed and the offset that forward took from the generator. Which
    elements are dropped depends on these and on the logical index of the element alone, not on the device, the number
    of threads or the memory format. What is dropped is 0 even if it was NaN or infinite.

    Args:
        input: any shape and strides, fp64, fp32, bf16 or fp16; contiguous memory is the fast case.
        p: exact to 2^-32. 0 gives the input itself, 1 gives zeros; neither draws anything. Like every number here it
            may be a Python number, a scalar of NumPy or a tensor without dimensions.
        training: False gives the input itself.
        inplace: write the result into ``input``.
        generator: a :class:`torch.Generator` of the input's device or a :class:`dlkit.random.Philox`; None stands for
            the stream of :func:`dlkit.random.use`, or torch's default generator of the device.

    Returns:
        The input's shape, dtype and memory format.

    Raises:
        ValueError: p is not between 0 and 1.
        RuntimeError: p is NaN, the generator is of another device, or ``inplace`` on a leaf that requires grad.
        TypeError: an argument is of the wrong Python type. The generator is untouched by any of these.

    Source: `Dropout: A Simple Way to Prevent Neural Networks from Overfitting
    <https://jmlr.org/papers/v15/srivastava14a.html>`_; the stream is written down in ``csrc/common/philox.h``.
    """
    return _drop("dropout", input, p, training, inplace, generator)


def dropout_add(
    input: Tensor, residual: Tensor, p: float = 0.5, training: bool = True, *, generator: Generator | None = None
) -> Tensor:
    """``dropout(input) + residual`` in one pass over memory, with the mask of :func:`dropout`.

    Backward hands ``residual`` the output's gradient and draws ``input``'s mask again.

    Args:
        input: any shape and strides, fp64, fp32, bf16 or fp16.
        residual: broadcasts and promotes with ``input`` as in an addition; the fast case is equal shapes and dtypes,
            where the result is rounded once.
        p: the probability of an element to become 0; with 0 nothing is drawn.
        training: False gives ``input + residual``.
        generator: as in :func:`dropout`.

    Returns:
        The shape and dtype of ``input + residual``.

    Raises:
        ValueError: p is not between 0 and 1.
        RuntimeError: p is NaN, or a shape or device does not fit.
        TypeError: an argument is of the wrong Python type.

    Source: `Dropout: A Simple Way to Prevent Neural Networks from Overfitting
    <https://jmlr.org/papers/v15/srivastava14a.html>`_.
    """
    p = check_probability("dropout_add", p)
    check_flag("dropout_add", "training", training)
    if not training or p == 0:
        return input + residual
    generator, stream = split_generator("dropout_add", generator)
    try:
        return _dropout_add(input, residual, p, generator, stream)
    except RuntimeError:
        check_tensors("dropout_add", input=input, residual=residual)
        raise


def bias_gelu_dropout(
    input: Tensor,
    bias: Tensor | None = None,
    p: float = 0.5,
    training: bool = True,
    approximate: str = "none",
    *,
    generator: Generator | None = None,
) -> Tensor:
    """``dropout(gelu(input + bias))`` in one pass over memory, forward and backward, for what comes out of a matrix
    product.

    The mask is that of :func:`dropout` for the same generator. Backward works it and the activation out again: input
    and bias are all that is kept.

    Args:
        input: ``[*, C]``, fp64, fp32, bf16 or fp16; contiguous memory is the fast case.
        bias: ``[C]``, in the input's dtype or fp32, or None.
        p: the probability of an element to become 0; with 0 nothing is drawn.
        training: False drops nothing and draws nothing.
        approximate: "none" or "tanh", as in :func:`torch.nn.functional.gelu`.
        generator: as in :func:`dropout`.

    Returns:
        The input's shape and dtype, contiguous; rounded once.

    Raises:
        ValueError: p is not between 0 and 1.
        RuntimeError: the input is not of a floating type, the shape, dtype or device of ``bias`` does not fit,
            ``approximate`` is something else, or p is NaN.
        TypeError: an argument is of the wrong Python type.

    Source: `Gaussian Error Linear Units <https://arxiv.org/abs/1606.08415>`_.
    """
    if approximate not in ("none", "tanh"):
        raise RuntimeError(f"bias_gelu_dropout(): expected approximate to be none or tanh, got {approximate!r}")
    return _activate("bias_gelu_dropout", input, bias, 1 if approximate == "none" else 2, p, training, generator)


def bias_relu_dropout(
    input: Tensor,
    bias: Tensor | None = None,
    p: float = 0.5,
    training: bool = True,
    *,
    generator: Generator | None = None,
) -> Tensor:
    """``dropout(relu(input + bias))`` in one pass over memory, forward and backward, for what comes out of a matrix
    product.

    The mask is that of :func:`dropout` for the same generator. Backward works it and the activation out again: input
    and bias are all that is kept.

    Args:
        input: ``[*, C]``, fp64, fp32, bf16 or fp16; contiguous memory is the fast case.
        bias: ``[C]``, in the input's dtype or fp32, or None.
        p: the probability of an element to become 0; with 0 nothing is drawn.
        training: False drops nothing and draws nothing.
        generator: as in :func:`dropout`.

    Returns:
        The input's shape and dtype, contiguous; rounded once.

    Raises:
        ValueError: p is not between 0 and 1.
        RuntimeError: the input is not of a floating type, the shape, dtype or device of ``bias`` does not fit, or p is
            NaN.
        TypeError: an argument is of the wrong Python type.

    Source: `Dropout: A Simple Way to Prevent Neural Networks from Overfitting
    <https://jmlr.org/papers/v15/srivastava14a.html>`_.
    """
    return _activate("bias_relu_dropout", input, bias, 0, p, training, generator)


def _activate(
    name: str, input: Tensor, bias: Tensor | None, activation: int, p: float, training: bool, generator: Any
) -> Tensor:
    p = check_probability(name, p)
    check_flag(name, "training", training)
    own, stream = split_generator(name, generator)
    try:
        return _bias_act_dropout(input, bias, activation, p if training else 0.0, own, stream)
    except RuntimeError:
        check_tensors(name, input=input, **({} if bias is None else {"bias": bias}))
        raise


def dropout_add_layer_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    p: float = 0.5,
    eps: float = 1e-5,
    training: bool = True,
    prenorm: bool = False,
    *,
    generator: Generator | None = None,
) -> Any:
    """``sum = dropout(input) + residual`` and ``y = layer_norm(sum)`` in one pass over memory.

    The mask is that of :func:`dropout` for the same generator. Backward reads what it needs once and draws the mask
    again. Gradients flow through both outputs.

    Args:
        input: ``[*, *normalized_shape]``, fp64, fp32, bf16 or fp16, any strides.
        residual: broadcasts and promotes with ``input`` as in an addition; the fast case is equal shapes and dtypes.
        normalized_shape: the sizes of the dimensions to normalize over.
        weight: ``normalized_shape``, in the dtype of ``sum`` or fp32, or None.
        bias: ``normalized_shape``, in the dtype of ``weight``, or None.
        p: the probability of an element of ``input`` to become 0; with 0 nothing is drawn.
        eps: added to the variance.
        training: False drops nothing: the result is :func:`add_layer_norm`'s.
        prenorm: return the sum too, for blocks that add further to it.
        generator: as in :func:`dropout`.

    Returns:
        ``y``, or ``(y, sum)`` if ``prenorm``, of the shape and dtype of ``input + residual``.

    Raises:
        ValueError: p is not between 0 and 1.
        RuntimeError: a shape, dtype or device does not fit, or p is NaN.
        TypeError: an argument is of the wrong Python type.

    Source: `Layer Normalization <https://arxiv.org/abs/1607.06450>`_ and `Dropout
    <https://jmlr.org/papers/v15/srivastava14a.html>`_.
    """
    p = check_probability("dropout_add_layer_norm", p)
    check_flag("dropout_add_layer_norm", "training", training)
    if not training or p == 0:
        y, total = add_layer_norm(input, residual, normalized_shape, weight, bias, eps)
        return (y, total) if prenorm else y
    own, stream = split_generator("dropout_add_layer_norm", generator)
    try:
        y, total = _dropout_add_layer_norm(input, residual, normalized_shape, p, weight, bias, eps, own, stream)
    except (RuntimeError, ValueError) as error:
        tensors = {"input": input, "residual": residual, "weight": weight, "bias": bias}
        _raise("dropout_add_layer_norm", error, normalized_shape, eps, **tensors)
    return (y, total) if prenorm else y


def dropout_add_rms_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    p: float = 0.5,
    eps: float | None = None,
    training: bool = True,
    prenorm: bool = False,
    *,
    generator: Generator | None = None,
) -> Any:
    """``sum = dropout(input) + residual`` and ``y = rms_norm(sum)`` in one pass over memory.

    The mask is that of :func:`dropout` for the same generator. Gradients flow through both outputs.

    Args:
        input: ``[*, *normalized_shape]``, fp64, fp32, bf16 or fp16, any strides.
        residual: broadcasts and promotes with ``input`` as in an addition; the fast case is equal shapes and dtypes.
        normalized_shape: the sizes of the dimensions to normalize over.
        weight: ``normalized_shape``, any floating dtype, or None.
        p: the probability of an element of ``input`` to become 0; with 0 nothing is drawn.
        eps: added to the mean square; None stands for the machine epsilon of fp32 (of fp64 for an fp64 sum).
        training: False drops nothing: the result is :func:`add_rms_norm`'s.
        prenorm: return the sum too, for blocks that add further to it.
        generator: as in :func:`dropout`.

    Returns:
        ``y``, or ``(y, sum)`` if ``prenorm``, of the shape and dtype of ``input + residual``.

    Raises:
        ValueError: p is not between 0 and 1, or the sum has fewer dimensions than ``normalized_shape``.
        RuntimeError: a shape or device does not fit, or p is NaN.
        TypeError: an argument is of the wrong Python type.

    Source: `Root Mean Square Layer Normalization <https://arxiv.org/abs/1910.07467>`_ and `Dropout
    <https://jmlr.org/papers/v15/srivastava14a.html>`_.
    """
    p = check_probability("dropout_add_rms_norm", p)
    check_flag("dropout_add_rms_norm", "training", training)
    if not training or p == 0:
        y, total = add_rms_norm(input, residual, normalized_shape, weight, eps)
        return (y, total) if prenorm else y
    own, stream = split_generator("dropout_add_rms_norm", generator)
    try:
        y, total = _dropout_add_rms_norm(input, residual, normalized_shape, p, weight, eps, own, stream)
    except (RuntimeError, ValueError) as error:
        _raise("dropout_add_rms_norm", error, normalized_shape, eps, input=input, residual=residual, weight=weight)
    return (y, total) if prenorm else y


def dropout1d(
    input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False, *, generator: Generator | None = None
) -> Tensor:
    """Dropout of whole channels, as :func:`torch.nn.functional.dropout1d`.

    Args:
        input: ``[N, C, L]``, or ``[C, L]`` for one sample; fp64, fp32, bf16 or fp16.
        p: the probability of a channel to become 0; the others grow by ``1 / (1 - p)``.
        training: False gives the input itself.
        inplace: write the result into ``input``.
        generator: as in :func:`dropout`.

    Returns:
        The input's shape, dtype and memory format. The mask goes by the logical index of the channel, ``n * C + c``.

    Raises:
        ValueError: p is not between 0 and 1.
        RuntimeError: the input is of another shape, p is NaN, the generator is of another device, or ``inplace`` on a
            leaf that requires grad.
        TypeError: an argument is of the wrong Python type.

    Source: `Efficient Object Localization Using Convolutional Networks <https://arxiv.org/abs/1411.4280>`_.
    """
    p = check_probability("dropout1d", p)
    if input.dim() not in (2, 3):
        raise RuntimeError(f"dropout1d(): expected input of 2 or 3 dimensions, got shape {list(input.shape)}")
    return _drop("dropout1d", input, p, training, inplace, generator, input.dim() - 1)


def dropout2d(
    input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False, *, generator: Generator | None = None
) -> Tensor:
    """Dropout of whole channels, as :func:`torch.nn.functional.dropout2d`.

    Args:
        input: ``[N, C, H, W]``, contiguous or channels_last; fp64, fp32, bf16 or fp16. Other shapes warn, as in torch,
            and are taken for ``[N, C, *]``.
        p: the probability of a channel to become 0; the others grow by ``1 / (1 - p)``.
        training: False gives the input itself.
        inplace: write the result into ``input``.
        generator: as in :func:`dropout`.

    Returns:
        The input's shape, dtype and memory format. The mask goes by the logical index of the channel, ``n * C + c``.

    Raises:
        ValueError: p is not between 0 and 1.
        RuntimeError: p is NaN, the generator is of another device, or ``inplace`` on a leaf that requires grad.
        TypeError: an argument is of the wrong Python type.

    Source: `Efficient Object Localization Using Convolutional Networks <https://arxiv.org/abs/1411.4280>`_.
    """
    p = check_probability("dropout2d", p)
    if input.dim() != 4:
        _warn("dropout2d", "[N, C, H, W]", "[N, C, *]", input)
    return _drop("dropout2d", input, p, training, inplace, generator, 2)


def dropout3d(
    input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False, *, generator: Generator | None = None
) -> Tensor:
    """Dropout of whole channels, as :func:`torch.nn.functional.dropout3d`.

    Args:
        input: ``[N, C, D, H, W]``, or ``[C, D, H, W]`` for one sample; fp64, fp32, bf16 or fp16. Other shapes warn, as
            in torch, and are taken for ``[C, *]``.
        p: the probability of a channel to become 0; the others grow by ``1 / (1 - p)``.
        training: False gives the input itself.
        inplace: write the result into ``input``.
        generator: as in :func:`dropout`.

    Returns:
        The input's shape, dtype and memory format. The mask goes by the logical index of the channel, ``n * C + c``.

    Raises:
        ValueError: p is not between 0 and 1.
        RuntimeError: p is NaN, the generator is of another device, or ``inplace`` on a leaf that requires grad.
        TypeError: an argument is of the wrong Python type.

    Source: `Efficient Object Localization Using Convolutional Networks <https://arxiv.org/abs/1411.4280>`_.
    """
    p = check_probability("dropout3d", p)
    if input.dim() not in (4, 5):
        _warn("dropout3d", "[N, C, D, H, W] or [C, D, H, W]", "[C, *]", input)
    return _drop("dropout3d", input, p, training, inplace, generator, 2 if input.dim() == 5 else 1)


def alpha_dropout(
    input: Tensor, p: float = 0.5, training: bool = False, inplace: bool = False, *, generator: Generator | None = None
) -> Tensor:
    """Dropout that keeps zero mean and unit variance, as :func:`torch.nn.functional.alpha_dropout`.

    What is dropped becomes SELU's lower bound, -1.7581, then ``y = a * x + b`` for all, with
    ``a = 1 / sqrt((1 - p) * (1 + p * 1.7581**2))`` and ``b = 1.7581 * a * p``.

    Args:
        input: any shape and strides, fp64, fp32, bf16 or fp16.
        p: the probability of an element to be dropped.
        training: False, the default as in torch, gives the input itself.
        inplace: write the result into ``input``.
        generator: as in :func:`dropout`.

    Returns:
        The input's shape, dtype and memory format.

    Raises:
        ValueError: p is not between 0 and 1.
        RuntimeError: p is NaN, the generator is of another device, or ``inplace`` on a leaf that requires grad.
        TypeError: an argument is of the wrong Python type.

    Source: `Self-Normalizing Neural Networks <https://arxiv.org/abs/1706.02515>`_.
    """
    return _drop("alpha_dropout", input, p, training, inplace, generator, alpha=True)


def feature_alpha_dropout(
    input: Tensor, p: float = 0.5, training: bool = False, inplace: bool = False, *, generator: Generator | None = None
) -> Tensor:
    """:func:`alpha_dropout` of whole channels, as :func:`torch.nn.functional.feature_alpha_dropout`.

    The mask goes by the logical index of the channel, ``n * C + c``.

    Args:
        input: ``[N, C, *]``, fp64, fp32, bf16 or fp16.
        p: the probability of a channel to be dropped.
        training: False, the default as in torch, gives the input itself.
        inplace: write the result into ``input``.
        generator: as in :func:`dropout`.

    Returns:
        The input's shape, dtype and memory format.

    Raises:
        ValueError: p is not between 0 and 1.
        RuntimeError: fewer than 2 dimensions, p is NaN, the generator is of another device, or ``inplace`` on a leaf
            that requires grad.
        TypeError: an argument is of the wrong Python type.

    Source: `Self-Normalizing Neural Networks <https://arxiv.org/abs/1706.02515>`_.
    """
    return _drop("feature_alpha_dropout", input, p, training, inplace, generator, 2, alpha=True)


def drop_path(
    input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False, *, generator: Generator | None = None
) -> Tensor:
    """Stochastic depth: dropout of whole samples, the others grow by ``1 / (1 - p)``.

    Meant for the branch of a residual block: ``x + drop_path(branch(x))``.

    Args:
        input: ``[N, *]``, fp64, fp32, bf16 or fp16.
        p: the probability of a sample to become 0.
        training: False gives the input itself.
        inplace: write the result into ``input``.
        generator: as in :func:`dropout`; the mask goes by the index of the sample.

    Returns:
        The input's shape, dtype and memory format.

    Raises:
        ValueError: p is not between 0 and 1.
        RuntimeError: an input without dimensions, p is NaN, the generator is of another device, or ``inplace`` on a
            leaf that requires grad.
        TypeError: an argument is of the wrong Python type.

    Source: `Deep Networks with Stochastic Depth <https://arxiv.org/abs/1603.09382>`_.
    """
    return _drop("drop_path", input, p, training, inplace, generator, 1)


def dropblock2d(
    input: Tensor,
    p: float,
    block_size: int,
    training: bool = True,
    inplace: bool = False,
    *,
    generator: Generator | None = None,
) -> Tensor:
    """DropBlock: squares of ``block_size`` in each channel become 0, the rest grows so that the mean stays.

    Squares start at seeds, drawn wherever a whole square fits, with probability
    ``p / block_size**2 * H * W / ((H - block_size + 1) * (W - block_size + 1))``, so that about ``p`` of all elements
    are dropped (fewer where squares overlap). What is kept is multiplied by ``numel / kept``, counted over the whole
    tensor.

    Args:
        input: ``[N, C, H, W]``, fp64, fp32, bf16 or fp16, contiguous or channels_last.
        p: the share to drop.
        block_size: the side of a square; the smaller of H and W where it is larger than that.
        training: False gives the input itself.
        inplace: write the result into ``input``.
        generator: as in :func:`dropout`; seeds come from its stream, by their logical index in
            ``[N, C, H - block_size + 1, W - block_size + 1]``.

    Returns:
        The input's shape, dtype and memory format. Backward draws the mask again and keeps none.

    Raises:
        ValueError: p is not between 0 and 1, block_size is below 1, or the shape is another.
        RuntimeError: p is NaN, the generator is of another device, or ``inplace`` on a leaf that requires grad.
        TypeError: an argument is of the wrong Python type.

    Source: `DropBlock: A regularization method for convolutional networks <https://arxiv.org/abs/1810.12890>`_.
    """
    p = check_probability("dropblock2d", p)
    check_flag("dropblock2d", "training", training)
    check_tensors("dropblock2d", input=input)
    if not training or p == 0:
        return input
    own, stream = split_generator("dropblock2d", generator)
    if inplace:
        _dropblock2d_(input, p, block_size, own, stream)
        return input
    return _dropblock2d(input, p, block_size, own, stream)


for _name in ("dropout1d", "dropout2d", "dropout3d", "dropblock2d"):
    torch.fx.wrap(_name)  # they ask for the shape of their input, which torch.fx does not know


def _drop(
    name: str,
    input: Tensor,
    p: float,
    training: bool,
    inplace: bool,
    generator: Generator | None,
    mask_ndim: int = -1,
    alpha: bool = False,
) -> Tensor:
    """Every variant of dropout. The mask has the input's first ``mask_ndim`` dimensions, all of them if -1."""
    p = check_probability(name, p)
    check_flag(name, "training", training)
    if not training or p == 0:
        check_tensors(name, input=input)
        # A program that was exported in evaluation can be set to training later: the call stays in it.
        return _native.dropout(input, p, mask_ndim, alpha, training) if is_exporting() else input
    generator, stream = split_generator(name, generator)
    try:
        if inplace:
            _dropout_(input, p, mask_ndim, alpha, generator, stream)
            return input
        return _dropout(input, p, mask_ndim, alpha, generator, stream)
    except RuntimeError:
        check_tensors(name, input=input)
        raise


def check_tensors(name: str, **tensors: Any) -> None:
    for argument, value in tensors.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}(): expected {argument} to be a Tensor, got {type(value).__name__}") from None


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    lse_square_scale: float = 0.0,
    softcap: float | None = None,
    return_z_loss: bool = False,
    inplace_backward: bool = False,
) -> Any:
    """Cross entropy of logits, as :func:`torch.nn.functional.cross_entropy`, in one pass over them each way.

    ``-log(softmax(input)[target])``. Beside the logits only two numbers a row are kept for backward.

    Args:
        input: logits ``[C]``, ``[N, C]`` or ``[N, C, *]``, fp64, fp32, bf16 or fp16, contiguous or channels_last; other
            strides are copied first.
        target: classes, int64 ``[]``, ``[N]`` or ``[N, *]``; or probabilities, of the input's shape and dtype.
        weight: ``[C]``, a factor of each class, in the input's dtype or fp32, or None.
        size_average: deprecated, as in torch.
        ignore_index: rows with this class count for nothing.
        reduce: deprecated, as in torch.
        reduction: "mean" (over the weights of the targets), "sum", or "none": a loss for each row.
        label_smoothing: between 0 and 1, the share of the target that all classes have in equal parts.
        lse_square_scale: adds this times ``logsumexp(logits)**2`` (the z-loss), whose mean is over the rows that are
            not ignored, and which has no class weights.
        softcap: takes ``softcap * tanh(input / softcap)`` for the logits; None takes them as they are.
        return_z_loss: return ``(loss, z_loss)``; z_loss is part of the loss, and has no gradient of its own.
        inplace_backward: write the gradient over ``input``, which saves a tensor of its size. Compilers decide
            themselves, and ignore it.

    Returns:
        A scalar, or without a reduction the target's shape (for probabilities: the input's without C), in the input's
        dtype; sums are in fp32 (fp64 for fp64). Under autocast fp32, as torch's.

    Raises:
        IndexError: on the CPU, a class out of range; on a GPU the kernel stops, as torch's does.
        ValueError: another batch size in ``target``, an unknown reduction, softcap of 0 or less.
        RuntimeError: another shape, dtype or device; label_smoothing out of range; ``inplace_backward`` on a leaf or on
            strides that would need a copy, or a second backward after it.
        NotImplementedError: input is not of a floating type.
        TypeError: an argument is of the wrong Python type.

    Source: torch's page; `Rethinking the Inception Architecture <https://arxiv.org/abs/1512.00567>`_ for the smoothing,
    `PaLM <https://arxiv.org/abs/2204.02311>`_ for the z-loss.
    """
    if size_average is not None or reduce is not None:
        reduction = torch.nn._reduction.legacy_get_string(size_average, reduce)
    plain = type(label_smoothing) is type(lse_square_scale) is float and softcap is None  # half a microsecond
    numbers_ = (
        (label_smoothing, lse_square_scale, 0.0)
        if plain
        else _check_options("cross_entropy", label_smoothing, lse_square_scale, softcap)
    )
    try:
        loss, z_loss = _cross_entropy(
            input, target, weight, _reduction(reduction), ignore_index, *numbers_, inplace_backward
        )
    except (RuntimeError, ValueError) as error:
        _raise_loss("cross_entropy", error, ignore_index, weight, input=input, target=target)
    return _with_z_loss(loss, z_loss) if return_z_loss else loss


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    lse_square_scale: float = 0.0,
    softcap: float | None = None,
    return_z_loss: bool = False,
) -> Any:
    """``cross_entropy(linear(input, linear_weight, linear_bias), target)`` without the logits in memory.

    The arguments of :func:`torch.nn.functional.linear_cross_entropy` (torch 2.13 on), and those of
    :func:`cross_entropy`. Rows go in chunks of 256 or more. With a reduction, forward works out the gradients too, and
    keeps them in fp32 (fp64 for fp64): what is in memory is a chunk of logits and these, of the size of ``input`` and
    ``linear_weight``. Without a reduction backward computes the logits again.

    Args:
        input: ``[H]`` or ``[N, H]``, fp64, fp32, bf16 or fp16.
        linear_weight: ``[C, H]`` in the input's dtype, or ``[C, *, H]``, for which the logits are whole, as in torch.
        target: classes, int64 ``[]``, ``[N]`` or ``[N, *]``; or probabilities, ``[C]``, ``[N, C]`` or ``[N, C, *]``.
        linear_bias: ``[C]`` or ``[C, *]``, or None.
        weight: as in :func:`cross_entropy`, as are ``reduction`` and ``label_smoothing``.
        ignore_index: rows with this class count for nothing; None stands for -100.
        options: torch's choice of chunks; here it changes nothing, and torch's own limits do not hold.
        lse_square_scale: as in :func:`cross_entropy`, as are ``softcap`` and ``return_z_loss``.

    Returns:
        A scalar, or without a reduction the target's shape (for probabilities: without C), in the input's dtype; under
        autocast fp32.

    Raises:
        IndexError, ValueError, RuntimeError, NotImplementedError, TypeError: as :func:`cross_entropy`.

    Source: torch's page.
    """
    name = "linear_cross_entropy"
    check_tensors(name, input=input, linear_weight=linear_weight, target=target)
    if ignore_index is not None and target.is_floating_point():
        raise RuntimeError(f"{name}(): ignore_index is for classes, and target is of {target.dtype}: leave it out")
    ignore_index = -100 if ignore_index is None else ignore_index
    numbers_ = _check_options(name, label_smoothing, lse_square_scale, softcap)
    if linear_weight.dim() > 2 and input.dim() == 2:
        bias = None if linear_bias is None else linear_bias.flatten()
        logits = torch.nn.functional.linear(input, linear_weight.flatten(0, -2), bias)
        return cross_entropy(
            logits.view(-1, *linear_weight.shape[:-1]), target, weight, None, ignore_index, None, reduction,
            label_smoothing, lse_square_scale, softcap, return_z_loss,
        )  # fmt: skip
    alone = input.dim() == 1
    rows = (input[None], target[None]) if alone else (input, target)
    try:
        loss, z_loss = _linear_cross_entropy(
            rows[0], linear_weight, rows[1], linear_bias, weight, _reduction(reduction), ignore_index, *numbers_
        )
    except (RuntimeError, ValueError) as error:
        _raise_loss(name, error, ignore_index, weight, linear_bias=linear_bias)
    if alone and reduction == "none":
        loss, z_loss = loss[0], None if z_loss is None else z_loss[0]
    return _with_z_loss(loss, z_loss) if return_z_loss else loss


_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}  # as torch numbers them


def _reduction(name: str) -> int:
    return _REDUCTIONS[name] if name in _REDUCTIONS else torch.nn._reduction.get_enum(name)


def _check_options(name: str, label_smoothing: Any, lse_square_scale: Any, softcap: Any) -> tuple[Any, Any, Any]:
    """The three as Python numbers, 0 for no softcap."""
    softcap = 0.0 if softcap is None else number(name, "softcap", softcap) or -1.0  # the op refuses it
    return number(name, "label_smoothing", label_smoothing), number(name, "lse_square_scale", lse_square_scale), softcap


def _with_z_loss(loss: Tensor, z_loss: Tensor | None) -> tuple[Tensor, Tensor]:
    return loss, torch.zeros_like(loss) if z_loss is None else z_loss


def _raise_loss(name: str, error: Exception, ignore_index: Any, weight: Any, **tensors: Any) -> NoReturn:
    """Raises TypeError where an argument was of the wrong Python type, as torch does, else the error itself."""
    tensors |= {} if weight is None else {"weight": weight}
    check_tensors(name, **{key: value for key, value in tensors.items() if key != "linear_bias" or value is not None})
    if not isinstance(ignore_index, (int, torch.SymInt)):
        raise TypeError(f"{name}(): expected ignore_index to be an int, got {ignore_index!r}") from None
    raise error


def _warn(name: str, expected: str, taken: str, input: Tensor) -> None:
    if input.is_nested:
        return  # refused, and without a shape
    warnings.warn(
        f"{name}(): expected input {expected}, got shape {list(input.shape)}, which is taken for {taken} and may become"
        " an error",
        stacklevel=3,
    )


def number(name: str, argument: str, value: Any) -> Any:
    """``value`` as a Python number: one already, a scalar of NumPy, or a tensor without dimensions, as torch takes."""
    if isinstance(value, (float, int, torch.SymFloat, torch.SymInt)):
        return value
    if isinstance(value, Tensor):
        if value.dim() == 0 and not value.is_complex() and not value.requires_grad:
            return value.item()
        kind = f"a {value.dtype} tensor of shape {list(value.shape)}" + " that requires grad" * value.requires_grad
    else:
        kind = type(value).__name__
        if isinstance(value, numbers.Real) and hasattr(value, "dtype"):
            return float(value)
    raise TypeError(f"{name}(): expected {argument} to be a float, got {kind}")


def check_probability(name: str, p: Any) -> Any:
    """``p`` as a Python number between 0 and 1."""
    p = number(name, "p", p)
    if p < 0 or p > 1:
        raise ValueError(f"{name}(): expected p between 0 and 1, got {p}")
    if p != p:
        raise RuntimeError(f"{name}(): expected p between 0 and 1, got {p}")
    return p


def check_flag(name: str, argument: str, value: Any) -> None:
    if value is not True and value is not False and not isinstance(value, torch.SymBool):
        raise TypeError(f"{name}(): expected {argument} to be a bool, got {type(value).__name__}")


def split_generator(name: str, generator: Generator | None) -> tuple[torch.Generator | None, Tensor | None]:
    """(generator, stream) as the ops take them: the one a torch.Generator, the other a Philox stream's state."""
    if generator is None:
        default = random.default()
        return None, None if default is None else default._state
    if isinstance(generator, random.Philox):
        return None, generator._state
    if isinstance(generator, torch.Generator):
        return generator, None
    raise TypeError(
        f"{name}(): expected generator to be a torch.Generator or a dlkit.random.Philox, got {type(generator).__name__}"
    )


def _raise(name: str, error: Exception, normalized_shape: Any, eps: Any, **tensors: Any) -> NoReturn:
    """Raises TypeError where an argument was of the wrong Python type, as torch does, else the error itself."""
    for argument, value in tensors.items():
        optional = argument in ("weight", "bias")
        if not isinstance(value, Tensor) and not (optional and value is None):
            raise TypeError(f"{name}(): expected {argument} to be a Tensor, got {type(value).__name__}") from None
    if not isinstance(normalized_shape, (list, tuple)) or any(
        not isinstance(size, (int, torch.SymInt)) for size in normalized_shape
    ):
        raise TypeError(
            f"{name}(): expected normalized_shape to be a tuple of ints, got {normalized_shape!r}"
        ) from None
    if eps is not None or "rms" not in name:
        number(name, "eps", eps)
    raise error


def _raise_channels(name: str, error: Exception, tensors: dict[str, Any], **numbers_: Any) -> NoReturn:
    """The same for the norms of channels: ``tensors`` may be None, but for input; numbers may not."""
    for argument, value in tensors.items():
        if not isinstance(value, Tensor) and (argument == "input" or value is not None):
            raise TypeError(f"{name}(): expected {argument} to be a Tensor, got {type(value).__name__}") from None
    for argument, value in numbers_.items():
        number(name, argument, value)
    raise error
