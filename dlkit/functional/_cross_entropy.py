"""Cross entropy."""

from typing import Any, NoReturn

import torch
from torch import Tensor

from dlkit._ops import op
from dlkit.functional._arguments import check_tensors, number

_cross_entropy = op("cross_entropy")


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

    ``-log(softmax(input)[target])``. Beside the logits, only two numbers per row are kept for backward.

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

    Source: the page of :class:`torch.nn.CrossEntropyLoss`; `Rethinking the Inception Architecture
    <https://arxiv.org/abs/1512.00567>`_ for the smoothing, `PaLM <https://arxiv.org/abs/2204.02311>`_ for the z-loss.
    """
    if size_average is not None or reduce is not None:
        reduction = torch.nn._reduction.legacy_get_string(size_average, reduce)
    plain = type(label_smoothing) is type(lse_square_scale) is float and softcap is None  # saves half a microsecond
    numbers_ = (
        (label_smoothing, lse_square_scale, 0.0)
        if plain
        else check_options("cross_entropy", label_smoothing, lse_square_scale, softcap)
    )
    try:
        loss, z_loss = _cross_entropy(
            input, target, weight, reduction_number(reduction), ignore_index, *numbers_, inplace_backward
        )
    except (RuntimeError, ValueError) as error:
        raise_loss("cross_entropy", error, ignore_index, weight, input=input, target=target)
    return with_z_loss(loss, z_loss) if return_z_loss else loss


_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}  # as torch numbers them


def reduction_number(name: str) -> int:
    return _REDUCTIONS[name] if name in _REDUCTIONS else torch.nn._reduction.get_enum(name)


def check_options(name: str, label_smoothing: Any, lse_square_scale: Any, softcap: Any) -> tuple[Any, Any, Any]:
    """The three options as Python numbers; 0 stands for no softcap."""
    # To the op 0 means no softcap: a 0 that the user gave becomes -1, which it refuses.
    softcap = 0.0 if softcap is None else number(name, "softcap", softcap) or -1.0
    return number(name, "label_smoothing", label_smoothing), number(name, "lse_square_scale", lse_square_scale), softcap


def with_z_loss(loss: Tensor, z_loss: Tensor | None) -> tuple[Tensor, Tensor]:
    return loss, torch.zeros_like(loss) if z_loss is None else z_loss


def raise_loss(name: str, error: Exception, ignore_index: Any, weight: Any, **tensors: Any) -> NoReturn:
    """Raises TypeError where an argument was of the wrong Python type, as torch does, else the error itself."""
    tensors |= {} if weight is None else {"weight": weight}
    check_tensors(name, **{key: value for key, value in tensors.items() if key != "linear_bias" or value is not None})
    if not isinstance(ignore_index, (int, torch.SymInt)):
        raise TypeError(f"{name}(): expected ignore_index to be an int, got {ignore_index!r}") from None
    raise error
