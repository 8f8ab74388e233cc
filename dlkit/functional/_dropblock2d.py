"""DropBlock."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dlkit._native import refuse_generator
from dlkit._ops import op
from dlkit.functional._arguments import Generator, check_flag, check_probability, check_tensors, split_generator


def _native(input: Tensor, p: float, block_size: int, *, generator: Any, stream: Any) -> Tensor:
    refuse_generator(generator, stream)
    height, width = input.shape[2:]
    size = min(block_size, height, width)
    rows, columns = height - size + 1, width - size + 1
    probability = p / size**2 * height * width / (rows * columns)
    seeds = (torch.rand_like(input[:, :, :rows, :columns], dtype=torch.float32) < probability).float()
    keep = F.max_pool2d(F.pad(seeds, [size - 1] * 4), size, 1) == 0
    return torch.where(keep, input * (keep.numel() / keep.sum().clamp(min=1)), 0.0)


def _native_(input: Tensor, *args: Any, **generators: Any) -> None:
    input.copy_(_native(input, *args, **generators))


_dropblock2d = op("dropblock2d", _native)
_dropblock2d_ = op("dropblock2d_", _native_)


def dropblock2d(
    input: Tensor,
    p: float,
    block_size: int,
    training: bool = True,
    inplace: bool = False,
    *,
    generator: Generator | None = None,
) -> Tensor:
    """DropBlock: squares of ``block_size`` in each channel become 0; the other elements grow so that the mean stays.

    Squares start at seeds, drawn wherever a whole square fits, with probability
    ``p / block_size**2 * H * W / ((H - block_size + 1) * (W - block_size + 1))``, so that about ``p`` of all elements
    are dropped (fewer where squares overlap). The other elements are multiplied by ``numel / kept``, counted over the
    whole tensor.

    Args:
        input: ``[N, C, H, W]``, fp64, fp32, bf16 or fp16, contiguous or channels_last.
        p: the share of elements to drop.
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
