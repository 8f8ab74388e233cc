"""A linear layer and the cross entropy of its output."""

from typing import Any

import torch
from torch import Tensor

from dlkit._ops import op
from dlkit.functional._arguments import check_tensors
from dlkit.functional._cross_entropy import check_options, cross_entropy, raise_loss, reduction_number, with_z_loss

_linear_cross_entropy = op("linear_cross_entropy")


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
    :func:`cross_entropy`. Rows are computed in chunks of 256 or more. With a reduction, forward computes the gradients
    too, and keeps them in fp32 (fp64 for fp64): memory holds a chunk of logits and the gradients, of the size of
    ``input`` and ``linear_weight``. Without a reduction backward computes the logits again.

    Args:
        input: ``[H]`` or ``[N, H]``, fp64, fp32, bf16 or fp16.
        linear_weight: ``[C, H]`` in the input's dtype, or ``[C, *, H]``: then memory holds all logits, as in torch.
        target: classes, int64 ``[]``, ``[N]`` or ``[N, *]``; or probabilities, ``[C]``, ``[N, C]`` or ``[N, C, *]``.
        linear_bias: ``[C]`` or ``[C, *]``, or None.
        weight: as in :func:`cross_entropy`, as are ``reduction`` and ``label_smoothing``.
        ignore_index: rows with this class count for nothing; None stands for -100.
        options: torch's choice of chunks; dlkit ignores it, and torch's own limits do not hold.
        lse_square_scale: as in :func:`cross_entropy`, as are ``softcap`` and ``return_z_loss``.

    Returns:
        A scalar, or without a reduction the target's shape (for probabilities: without C), in the input's dtype; under
        autocast fp32.

    Raises:
        IndexError, ValueError, RuntimeError, NotImplementedError, TypeError: as :func:`cross_entropy`.

    Source: the page of :func:`torch.nn.functional.linear_cross_entropy`.
    """
    name = "linear_cross_entropy"
    check_tensors(name, input=input, linear_weight=linear_weight, target=target)
    if ignore_index is not None and target.is_floating_point():
        raise RuntimeError(f"{name}(): ignore_index is for classes, and target is of {target.dtype}: leave it out")
    ignore_index = -100 if ignore_index is None else ignore_index
    numbers_ = check_options(name, label_smoothing, lse_square_scale, softcap)
    if linear_weight.dim() > 2 and input.dim() == 2:
        bias = None if linear_bias is None else linear_bias.flatten()
        logits = torch.nn.functional.linear(input, linear_weight.flatten(0, -2), bias)
        return cross_entropy(
            logits.view(-1, *linear_weight.shape[:-1]), target, weight, None, ignore_index, None, reduction,
            label_smoothing, lse_square_scale, softcap, return_z_loss,
        )  # fmt: skip
    unbatched = input.dim() == 1
    rows = (input[None], target[None]) if unbatched else (input, target)
    try:
        loss, z_loss = _linear_cross_entropy(
            rows[0], linear_weight, rows[1], linear_bias, weight, reduction_number(reduction), ignore_index, *numbers_
        )
    except (RuntimeError, ValueError) as error:
        raise_loss(name, error, ignore_index, weight, linear_bias=linear_bias)
    if unbatched and reduction == "none":
        loss, z_loss = loss[0], None if z_loss is None else z_loss[0]
    return with_z_loss(loss, z_loss) if return_z_loss else loss
