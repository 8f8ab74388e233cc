"""What a step asks of its arguments, as csrc/optim/op.cpp does, before anything is written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._dynamic_map import BLOCK
from ._optim_launch import REAL, real_type

OPTIONS = 14  # a group; csrc/optim/op.cpp says which
STATES = 3
_STATE_TYPES = (torch.float32, torch.bfloat16, torch.uint8)


def check_step(
    algorithm: str,
    params: list[Tensor],
    grads: list[Tensor],
    states: list[list[Tensor]],
    scales: list[list[Tensor]],
    remainders: list[Tensor],
    ema: list[Tensor],
    steps: list[Tensor],
    groups: list[int],
    options: list[float],
    lr: list[Tensor],
) -> None:
    if algorithm not in ("adam", "sgd", "rmsprop"):
        raise ValueError(f"optim_step_(): expected algorithm of adam, sgd or rmsprop, got {algorithm}")
    count, group_count = len(params), len(options) // OPTIONS
    _expect(len(options) == group_count * OPTIONS, f"{OPTIONS} options a group", len(options))
    _expect(len(lr) in (0, group_count), f"lr of {group_count} tensors (one a group) or none", len(lr))

    def check_length(name: str, values: Sequence[Any], optional: bool) -> None:
        _expect(len(values) == count or (optional and not values), f"{count} tensors in {name}", len(values))

    check_length("grads", grads, False)
    check_length("groups", groups, False)
    check_length("remainders", remainders, True)
    check_length("ema", ema, True)
    check_length("steps", steps, algorithm != "adam")
    coded = bool(states[0]) and states[0][0].dtype == torch.uint8
    for s in range(STATES):
        needed = s < 2 if algorithm == "adam" else algorithm == "rmsprop" and s == 0
        check_length(f"state{s + 1}", states[s], not needed)
        check_length(f"scales{s + 1}", scales[s], not coded or not states[s])
    for i, param in enumerate(params):
        dtype = param.dtype
        real = real_type(dtype)
        _expect(real in REAL, f"params[{i}] of a floating or complex type", dtype)
        _expect(param.device == params[0].device, f"params[{i}] on {params[0].device}", param.device)
        check_overlap("params", i, param)
        given = grads[i].dtype
        serves = real_type(given) in REAL and given.is_complex == dtype.is_complex
        _check_like("grads", i, grads[i], param, given if serves else dtype)
        _expect(0 <= groups[i] < group_count, f"groups[{i}] below {group_count}", groups[i])
        for s in range(STATES):
            if not states[s]:
                continue
            state = states[0][i].dtype
            serves = state == dtype or (not dtype.is_complex and real != torch.float64 and state in _STATE_TYPES)
            _expect(serves, f"state1[{i}] of a type that goes with {dtype}", state)
            _check_like(f"state{s + 1}", i, states[s][i], param, state)
            if state == torch.uint8:
                scale, blocks = scales[s][i], -(-param.numel() // BLOCK)
                fits = scale.dtype == torch.float32 and scale.numel() == blocks and scale.is_contiguous()
                _expect(fits, f"scales{s + 1}[{i}] contiguous, of {blocks} elements of Float", list(scale.shape))
        if remainders:
            _expect(dtype in (torch.bfloat16, torch.float16), f"params[{i}] of 16 bits with a remainder", dtype)
            rest = dtype if remainders[i].dtype == dtype else torch.int16
            _check_like("remainders", i, remainders[i], param, rest)
        if ema:
            _check_like("ema", i, ema[i], param, torch.float32 if dtype.itemsize == 2 else dtype)
        if steps:
            fits = steps[i].numel() == 1 and steps[i].dtype in (torch.float32, torch.float64)
            _expect(fits, f"steps[{i}] of one Float or Double", steps[i].dtype)


def _check_like(name: str, i: int, tensor: Tensor, param: Tensor, dtype: torch.dtype) -> None:
    _expect(tensor.layout == torch.strided, f"a dense {name}[{i}]", tensor.layout)
    _expect(tensor.device == param.device, f"{name}[{i}] on {param.device}", tensor.device)
    _expect(tensor.dtype == dtype, f"{name}[{i}] of {dtype} (params[{i}] is {param.dtype})", tensor.dtype)
    _expect(tensor.shape == param.shape, f"{name}[{i}] of shape {list(param.shape)}", list(tensor.shape))


def check_overlap(name: str, i: int, tensor: Tensor) -> None:
    shared = any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
    _expect(not shared, f"{name}[{i}] without elements that share memory; clone() it first", tensor.stride())


def _expect(condition: bool, expected: str, got: object) -> None:
    if not condition:
        raise RuntimeError(f"optim_step_(): expected {expected}, got {got}")
