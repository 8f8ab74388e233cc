"""LayerNorm and RMSNorm over the last dimensions, with the dropout and the residual add before them."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dlkit._ops import op
from dlkit.functional._arguments import Generator, check_flag, check_probability, raise_norm, split_generator

_layer_norm = op("layer_norm")
_rms_norm = op("rms_norm")
_add_layer_norm = op("add_layer_norm")
_add_rms_norm = op("add_rms_norm")
_dropout_add_layer_norm = op("dropout_add_layer_norm")
_dropout_add_rms_norm = op("dropout_add_rms_norm")


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
        raise_norm("layer_norm", error, normalized_shape, eps, input=input, weight=weight, bias=bias)


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
        raise_norm("rms_norm", error, normalized_shape, eps, input=input, weight=weight)


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
        raise_norm(
            "add_layer_norm", error, normalized_shape, eps, input=input, residual=residual, weight=weight, bias=bias
        )


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
        raise_norm("add_rms_norm", error, normalized_shape, eps, input=input, residual=residual, weight=weight)


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

    The mask is that of :func:`dropout` for the same generator. Backward reads each tensor once, and draws the
    mask again or, on a CPU, reads its bits. Gradients flow through both outputs.

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
        raise_norm("dropout_add_layer_norm", error, normalized_shape, eps, **tensors)
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
        raise_norm("dropout_add_rms_norm", error, normalized_shape, eps, input=input, residual=residual, weight=weight)
    return (y, total) if prenorm else y
