"""Bias, activation and dropout in one pass."""

from typing import Any

from torch import Tensor

from dlkit._activation import ACTIVATIONS
from dlkit._ops import op
from dlkit.functional._arguments import Generator, check_flag, check_probability, check_tensors, split_generator

_bias_act_dropout = op("bias_act_dropout")


def bias_gelu_dropout(
    input: Tensor,
    bias: Tensor | None = None,
    p: float = 0.5,
    training: bool = True,
    approximate: str = "none",
    *,
    generator: Generator | None = None,
) -> Tensor:
    """``dropout(gelu(input + bias))`` in one pass over memory, forward and backward, for the result of a matrix
    product.

    The mask is that of :func:`dropout` for the same generator. Backward computes the mask and the activation again, and
    keeps only input and bias.

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
    activation = ACTIVATIONS["gelu" if approximate == "none" else "gelu_tanh"]
    return _activate("bias_gelu_dropout", input, bias, activation, p, training, generator)


def bias_relu_dropout(
    input: Tensor,
    bias: Tensor | None = None,
    p: float = 0.5,
    training: bool = True,
    *,
    generator: Generator | None = None,
) -> Tensor:
    """``dropout(relu(input + bias))`` in one pass over memory, forward and backward, for the result of a matrix
    product.

    The mask is that of :func:`dropout` for the same generator. Backward computes the mask and the activation again, and
    keeps only input and bias.

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
    return _activate("bias_relu_dropout", input, bias, ACTIVATIONS["relu"], p, training, generator)


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
