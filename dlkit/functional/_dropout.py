"""Dropouts."""

import warnings

from torch import Tensor

from dlkit import _native
from dlkit._ops import is_exporting, op
from dlkit.functional._arguments import Generator, check_flag, check_probability, check_tensors, split_generator

_dropout = op("dropout")
_dropout_ = op("dropout_")
_dropout_add = op("dropout_add")


def dropout(
    input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False, *, generator: Generator | None = None
) -> Tensor:
    """Dropout, as :func:`torch.nn.functional.dropout`: each element becomes 0 with probability ``p``, the others grow
    by ``1 / (1 - p)``.

    No mask tensor is stored: backward draws the mask again from the seed and the offset that forward took from the
    generator, or on a CPU reads one bit per element. The mask depends only on seed, offset and the logical index of the
    element, not on the device, the number of threads or the memory format. A dropped element is 0 even if it was NaN or
    infinite.

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
    <https://jmlr.org/papers/v15/srivastava14a.html>`_; ``csrc/common/philox.h`` defines the stream.
    """
    return drop("dropout", input, p, training, inplace, generator)


def dropout_add(
    input: Tensor, residual: Tensor, p: float = 0.5, training: bool = True, *, generator: Generator | None = None
) -> Tensor:
    """``dropout(input) + residual`` in one pass over memory, with the mask of :func:`dropout`.

    In backward ``residual`` gets the output's gradient, and the mask of ``input`` is drawn again.

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
    return drop("dropout1d", input, p, training, inplace, generator, input.dim() - 1)


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
        warn_of_shape("dropout2d", "[N, C, H, W]", "[N, C, *]", input)
    return drop("dropout2d", input, p, training, inplace, generator, 2)


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
        warn_of_shape("dropout3d", "[N, C, D, H, W] or [C, D, H, W]", "[C, *]", input)
    return drop("dropout3d", input, p, training, inplace, generator, 2 if input.dim() == 5 else 1)


def alpha_dropout(
    input: Tensor, p: float = 0.5, training: bool = False, inplace: bool = False, *, generator: Generator | None = None
) -> Tensor:
    """Dropout that keeps zero mean and unit variance, as :func:`torch.nn.functional.alpha_dropout`.

    A dropped element becomes SELU's lower bound, -1.7581. Then all elements become ``y = a * x + b``, with
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
    return drop("alpha_dropout", input, p, training, inplace, generator, alpha=True)


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
    return drop("feature_alpha_dropout", input, p, training, inplace, generator, 2, alpha=True)


def drop_path(
    input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False, *, generator: Generator | None = None
) -> Tensor:
    """Stochastic depth: dropout of whole samples, the others grow by ``1 / (1 - p)``.

    It is for the branch of a residual block: ``x + drop_path(branch(x))``.

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
    return drop("drop_path", input, p, training, inplace, generator, 1)


def drop(
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


def warn_of_shape(name: str, expected: str, taken: str, input: Tensor) -> None:
    if input.is_nested:
        return  # a nested tensor has no shape, and the op refuses it
    warnings.warn(
        f"{name}(): expected input {expected}, got shape {list(input.shape)}, which is taken for {taken} and may become"
        " an error",
        stacklevel=3,
    )
