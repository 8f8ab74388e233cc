"""The optimizers in Triton: a step over many tensors, the norm of many gradients, and their scaling.

The kernels are in _optim_kernels.py. Step counters on the device go up in a launch of their own. Nothing of this has
run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._optim_row import Row
from . import _optim_kernels as kernels
from ._common import TRITON_TYPE, accumulate_type
from ._optim_launch import (
    CONSTANTS,
    EMA,
    GRAD,
    INDEX,
    NUMEL,
    PARAM,
    REMAINDER,
    ROW,
    SCALE,
    STATE,
    STEP,
    TYPE,
    WARPS,
    Arranger,
    bits_of,
    gradient_launches,
    real_type,
    table_of,
    vector,
)
from ._optim_states import dynamic_maps

STATES = 3
_COLUMNS = len(Row._fields)


def optim_step_kernel_(
    algorithm: str,
    params: list[Tensor],
    grads: list[Tensor],
    state1: list[Tensor],
    state2: list[Tensor],
    state3: list[Tensor],
    scales1: list[Tensor],
    scales2: list[Tensor],
    scales3: list[Tensor],
    remainders: list[Tensor],
    ema: list[Tensor],
    steps: list[Tensor],
    groups: list[int],
    options: list[float],
    lr: list[Tensor],
    grad_norm: Tensor | None,
    max_norm: float,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    write_grads: bool,
    seed: int | None,
) -> None:
    """One step of all tensors; csrc/optim/kernel.h says what each list holds. The public op has checked them."""
    if not params:
        return
    states, scales = [state1, state2, state3], [scales1, scales2, scales3]
    of_group = [Row(*options[first : first + _COLUMNS]) for first in range(0, len(options), _COLUMNS)]
    device = params[0].device
    on_device = bool(steps) and steps[0].device == device
    if found_inf is not None and steps and not on_device:
        # Host counters need the answer here; with counters on the device (fused=True, capturable=True) nothing waits.
        if float(found_inf) != 0:
            return
        found_inf = None

    arranger = Arranger()
    launches: dict[tuple[Any, ...], list[list[int]]] = {}
    counted_steps: list[float] = []  # of counters on the host
    for i, param in enumerate(params):
        arranger.begin(param, bool(states[0]) and states[0][i].dtype == torch.uint8)
        correction1 = correction2 = 1.0
        counter = 0
        if on_device:
            counter = steps[i].data_ptr()
        elif steps:
            counted_steps.append(float(steps[i]) + 1)  # at 2^24 an fp32 counter stays, as torch's does
            if algorithm == "adam":
                own = of_group[groups[i]]
                correction1, correction2 = (1 - beta ** counted_steps[-1] for beta in (own.beta1, own.beta2))
        row = [0] * ROW
        row[INDEX], row[STEP] = i, counter
        dtype, grad_dtype = real_type(param.dtype), real_type(grads[i].dtype)
        if torch.float64 in (dtype, grad_dtype):
            grad_dtype = torch.float64 if dtype == torch.float64 else torch.float32  # not 16 bits
        row[PARAM], row[GRAD] = arranger.place(param, True), arranger.place(grads[i], write_grads, grad_dtype)
        for s in range(STATES):
            if states[s]:
                row[STATE + s] = arranger.place(states[s][i], True)
            if scales[s]:
                row[SCALE + s] = scales[s][i].data_ptr()
        if remainders:
            row[REMAINDER] = arranger.place(remainders[i], True)
        if ema:
            row[EMA] = arranger.place(ema[i], True)
        state_dtype = real_type(states[0][i].dtype) if states[0] else dtype
        narrow = min(dtype, grad_dtype, state_dtype, key=lambda kind: kind.itemsize)
        if arranger.numel:
            wide = [row[column] for column in (PARAM, GRAD, *range(STATE, STATE + 3), REMAINDER, EMA)]
            vec, align = vector(narrow, arranger.numel, wide)
            row[NUMEL] = arranger.numel // vec
            step_dtype = steps[i].dtype if on_device else None
            key = (groups[i], correction1, correction2, dtype, grad_dtype, state_dtype, step_dtype, vec, align)
            launches.setdefault(key, []).append(row)

    for step, t in zip(steps, counted_steps, strict=False):
        step.fill_(t)
    with torch.cuda.device_of(params[0]):
        tables = []
        for key, rows in launches.items():
            group, correction1, correction2, dtype, grad_dtype, state_dtype, step_dtype, vec, align = key
            table, chunks = table_of(rows, vec, device)
            own = of_group[group]
            numbers = [
                own.lr, own.weight_decay, own.eps, own.beta1, own.beta2, own.momentum, own.dampening, own.alpha,
                own.ema_decay, correction1, correction2, max_norm,
            ]  # fmt: skip
            rounds = seed is not None
            maps = dynamic_maps(device) if state_dtype == torch.uint8 else None
            counted = None if step_dtype is None else TYPE[step_dtype]
            kernels.step[(chunks,)](
                table, len(rows), maps, lr[group] if lr else None, grad_norm, grad_scale, found_inf,
                *map(bits_of, numbers), seed or 0,
                ALGORITHM=algorithm, TYPE=TYPE[dtype], GRAD=TYPE[grad_dtype], STATE=TYPE[state_dtype],
                ACC=TRITON_TYPE[accumulate_type(dtype)], STEP=counted,
                HAS1=bool(states[0]), HAS2=bool(states[1]), HAS3=bool(states[2]),
                REMAINDER=bool(remainders), EMA=bool(ema),
                DECOUPLED=bool(own.decoupled_weight_decay) and algorithm == "adam",
                NESTEROV=bool(own.nesterov), MAXIMIZE=bool(own.maximize), DECAY=own.weight_decay != 0,
                WRITE_GRADS=write_grads,
                STOCHASTIC=bool(own.stochastic_rounding) and rounds and dtype.itemsize == 2 and not remainders,
                STOCHASTIC_STATES=int(own.stochastic_states) if rounds and state_dtype.itemsize == 2 else 0,
                VEC=vec, ALIGN=align, ROW=ROW, **CONSTANTS,
            )  # fmt: skip
            tables.append((table, len(rows), counted))
        for table, count, counted in tables:
            if counted is not None:
                kernels.advance[(count,)](table, count, found_inf, STEP=counted, ROW=ROW, num_warps=1)
    arranger.finish()
    _mark_changed(params, ema, grads if write_grads else [], *states)
    if on_device:
        empty = [step for step, param in zip(steps, params, strict=True) if param.numel() == 0]
        for step in empty:
            step += 1 if found_inf is None else (found_inf == 0).to(step.dtype).view_as(step)


def optim_grad_norm_kernel(grads: list[Tensor]) -> Tensor:
    """The 2-norm of all gradients together: sums in fp32 within a chunk, in fp64 and a fixed order between them."""
    device = grads[0].device
    wide = any(real_type(grad.dtype) == torch.float64 for grad in grads)
    arranger = Arranger()
    launches, chunks = gradient_launches(grads, arranger, False)
    norm = torch.empty((), dtype=torch.float64 if wide else torch.float32, device=device)
    partials = torch.empty(chunks, dtype=torch.float64, device=device)
    with torch.cuda.device_of(grads[0]):
        for table, count, own_chunks, constants in launches:
            kernels.sum_squares[(own_chunks,)](table, count, partials, **constants)
        kernels.finish_norm[(1,)](partials, chunks, norm, TILE=1024, num_warps=WARPS)
    return norm


def optim_clip_grads_kernel_(grads: list[Tensor], grad_norm: Tensor, max_norm: float) -> None:
    """grad = grad * min(1, max_norm / (grad_norm + 1e-6))."""
    arranger = Arranger()
    launches, _ = gradient_launches(grads, arranger, True)
    with torch.cuda.device_of(grads[0]):
        for table, count, chunks, constants in launches:
            kernels.scale_grads[(chunks,)](table, count, grad_norm, bits_of(max_norm), **constants)
    arranger.finish()
    _mark_changed(grads)


def _mark_changed(*lists: Sequence[Tensor]) -> None:
    """autograd must notice that what it may have saved has changed."""
    for tensors in lists:
        torch.autograd.graph.increment_version([t for t in tensors if not t.is_inference()])


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "optim_step_kernel_": optim_step_kernel_,
    "optim_grad_norm_kernel": optim_grad_norm_kernel,
    "optim_clip_grads_kernel_": optim_clip_grads_kernel_,
}
