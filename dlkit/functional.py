"""The names and signatures of torch.nn.functional, and the fused operations beside them."""

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

_layer_norm = torch.ops.dlkit.layer_norm.default
_rms_norm = torch.ops.dlkit.rms_norm.default
_add_layer_norm = torch.ops.dlkit.add_layer_norm.default
_add_rms_norm = torch.ops.dlkit.add_rms_norm.default


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
        RuntimeError: a shape, dtype or device does not fit; NotImplementedError: input is not of a floating type;
        TypeError: an argument is of the wrong Python type.

    Source: `Layer Normalization <https://arxiv.org/abs/1607.06450>`_.
    """
    try:
        return _layer_norm(input, normalized_shape, weight, bias, eps)
    except RuntimeError as error:
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
        RuntimeError, ValueError: a shape or device does not fit; NotImplementedError: input is not of a floating type;
        TypeError: an argument is of the wrong Python type.

    Source: `Root Mean Square Layer Normalization <https://arxiv.org/abs/1910.07467>`_.
    """
    try:
        return _rms_norm(input, normalized_shape, weight, eps)
    except RuntimeError as error:
        _raise("rms_norm", error, normalized_shape, eps, input=input, weight=weight)


def add_layer_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """``sum = input + residual`` and ``layer_norm(sum)`` in one pass over memory; returns ``(y, sum)``.

    ``input`` and ``residual`` broadcast and promote as ``input + residual`` does, and ``sum`` has that shape and dtype;
    the fast case is equal shapes and dtypes. Gradients flow through both outputs. The rest is as :func:`layer_norm`.
    """
    try:
        return _add_layer_norm(input, residual, normalized_shape, weight, bias, eps)
    except RuntimeError as error:
        _raise("add_layer_norm", error, normalized_shape, eps, input=input, residual=residual, weight=weight, bias=bias)


def add_rms_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> tuple[Tensor, Tensor]:
    """``sum = input + residual`` and ``rms_norm(sum)`` in one pass over memory; returns ``(y, sum)``.

    See :func:`add_layer_norm` and :func:`rms_norm`.
    """
    try:
        return _add_rms_norm(input, residual, normalized_shape, weight, eps)
    except RuntimeError as error:
        _raise("add_rms_norm", error, normalized_shape, eps, input=input, residual=residual, weight=weight)


def _raise(name: str, error: RuntimeError, normalized_shape: Any, eps: Any, **tensors: Any) -> NoReturn:
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
    if not (eps is None or isinstance(eps, (float, int, torch.SymFloat))):
        raise TypeError(f"{name}(): expected eps to be a float, got {type(eps).__name__}") from None
    raise error
