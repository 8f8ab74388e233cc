"""dropout(act(x + bias)) in Triton, over the contract of csrc/bias_act_dropout/kernel.h and the random bits of dropout.

One kernel for both directions: a thread draws one Philox block for 8 elements. Each byte is read and written once,
except for grad_bias: the column sums of the rounded grad_input, as in torch's own backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._activation import activation, activation_gradient
from ._common import TRITON_TYPE, accumulate_type
from .dropout import _TILE, _begin, _jit, _kept_bytes, _scale, given_state, new_state


@triton.jit
def _tile(grad, x, bias, out, index, inside, keep, cols, scale, KIND: tl.constexpr, ACC: tl.constexpr):
    """``inside``: a mask, or None if the whole tile is inside."""
    value = tl.load(x + index, mask=inside).to(ACC)
    if bias is not None:
        value += tl.load(bias + index % cols, mask=inside).to(ACC)
    if grad is not None:
        value = activation_gradient(tl.load(grad + index, mask=inside).to(ACC) * scale, value, 0.0, KIND)
    else:
        value = activation(value, 0.0, KIND) * scale
    tl.store(out + index, tl.where(keep, value, 0.0).to(out.dtype.element_ty), mask=inside)


@_jit
def _act_drop(
    grad, x, bias, out, rng_state, seed: tl.int64, offset: tl.int64, high: tl.int32, low: tl.int32, numel: tl.int64,
    cols, scale,
    GIVEN: tl.constexpr, ACTIVE: tl.constexpr, KIND: tl.constexpr, ACC: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, 8)[None, :]
    if ACTIVE:
        seed, counter = _begin(rng_state, seed, offset, GIVEN)
        kept = _kept_bytes(seed, counter, program * BLOCKS + tl.arange(0, BLOCKS), high, low)
        keep = ((kept[:, None] >> lane.to(tl.uint32)) & 1) != 0
    else:
        keep = tl.full((BLOCKS, 8), True, tl.int1)
    start = program * (BLOCKS * 8)
    index = start + (tl.arange(0, BLOCKS)[:, None] * 8 + lane)
    if start + BLOCKS * 8 <= numel:
        _tile(grad, x, bias, out, index, None, keep, cols, scale, KIND, ACC)
    else:
        _tile(grad, x, bias, out, index, index < numel, keep, cols, scale, KIND, ACC)


def _launch(
    grad: Tensor | None, input: Tensor, bias: Tensor | None, activation: int, p: float,
    rng_state: Tensor | None, drawn: tuple[int, int] | None,
) -> Tensor:  # fmt: skip
    """``rng_state`` and ``drawn`` as in dropout's own launch."""
    output = torch.empty(input.shape, dtype=input.dtype, device=input.device)
    if input.numel() == 0:
        return output
    accumulate = accumulate_type(input.dtype)
    # A float argument has 32 bits, a constant has 64.
    kind: Callable[[float], Any] = tl.constexpr if accumulate == torch.float64 else float
    seed, offset = drawn or (0, 0)
    threshold = int(p * 2.0**32 + 0.5)
    tensors = [t if t is None else t.contiguous() for t in (grad, input, bias)]
    cols = 1 if bias is None else len(bias)
    with torch.cuda.device_of(input):
        _act_drop[(triton.cdiv(input.numel(), _TILE),)](
            *tensors, output, rng_state, seed, offset, threshold >> 16, threshold & 0xFFFF, input.numel(), cols,
            kind(_scale(p)), GIVEN=drawn is None, ACTIVE=p > 0, KIND=activation, ACC=TRITON_TYPE[accumulate],
            BLOCKS=_TILE // 8, num_warps=4,
        )  # fmt: skip
    return output


def bias_act_dropout_forward(
    input: Tensor, bias: Tensor | None, rng_state: Tensor | None, activation: int, p: float,
    generator: torch.Generator | None = None, keep_bits: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``dropout(act(input + bias))`` with the mask of ``rng_state`` or a new one. Returns (y, state). Keeps no bits."""
    if rng_state is not None:
        return _launch(None, input, bias, activation, p, *given_state(input, rng_state)), rng_state.clone()
    if p == 0 or input.numel() == 0:
        new: tuple[Tensor, Any] = torch.zeros(2, dtype=torch.int64, device=input.device), (0, 0)
    else:
        new = new_state(input, p, generator)
    return _launch(None, input, bias, activation, p, *new), new[0]


def bias_act_dropout_backward(
    grad_output: Tensor,
    input: Tensor,
    bias: Tensor | None,
    rng_state: Tensor,
    activation: int,
    p: float,
    needs_bias: bool,
) -> tuple[Tensor, Tensor | None]:
    """(grad_input, grad_bias), the latter None where it is not asked for."""
    grad = _launch(grad_output, input, bias, activation, p, *given_state(input, rng_state))
    if bias is None or not needs_bias:
        return grad, None
    rows = torch.atleast_2d(grad).flatten(end_dim=-2)
    return grad, rows.sum(0, dtype=accumulate_type(grad.dtype)).to(bias.dtype)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "bias_act_dropout_forward": bias_act_dropout_forward,
    "bias_act_dropout_backward": bias_act_dropout_backward,
}
