"""Adam and AdamW."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from dlkit.optim._optimizer import OnePass
from dlkit.optim._options import Options, host_rate, stands_still

_SPARSE = "Adam does not support sparse gradients, please consider SparseAdam instead"


class _AdamFamily(OnePass):
    _algorithm = "adam"
    _all_states = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    _sparse_error = _SPARSE
    _torch_class = torch.optim.Adam

    def _numbers(self, group: dict[str, Any], average: float) -> tuple[float, ...]:
        beta1, beta2 = group["betas"]
        decoupled, maximize = float(group["decoupled_weight_decay"]), float(group["maximize"])
        numbers = map(float, (group["weight_decay"], group["eps"], beta1, beta2))
        return (host_rate(group["lr"]), *numbers, 0.0, 0.0, 0.0, average, decoupled, 0.0, maximize)

    def _still_states(self, group: dict[str, Any]) -> int:
        return 2 + stands_still(group["betas"][0])

    def _state_names(self, group: dict[str, Any]) -> tuple[str | None, ...]:
        return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq" if group["amsgrad"] else None)


class Adam(_AdamFamily, torch.optim.Adam):
    """:class:`torch.optim.Adam`, with the same arguments, state and results, in one pass over memory.

    The arguments from ``max_norm`` on are dlkit's own; :class:`dlkit.optim._optimizer.OnePass` says in full what each
    does. Those from ``master_weights`` on may differ between param groups.

    Args:
        params: parameters, (name, parameter) pairs or param groups, as torch's optimizers take them; see
            :func:`dlkit.optim.param_groups`.
        lr: the learning rate, a number or a tensor of one element.
        betas: how much of themselves the running averages of the gradient and of its square keep at each step.
        eps: added to the denominator.
        weight_decay: the factor of the parameter that is added to its gradient.
        amsgrad: divide by the largest second moment so far.
        foreach: as in torch where torch's own step runs; dlkit's kernels ignore it.
        maximize: step up the gradient instead of down.
        capturable: keep step counters on the device, so that a CUDA graph can capture the step.
        differentiable: record the step for autograd; torch's own step runs then.
        fused: as in torch for a GradScaler, whose scaling the step then does itself; step counters are on the device.
        decoupled_weight_decay: decay as :class:`AdamW` does.

    Keyword Args:
        max_norm (float): clip: scale gradients so that the 2-norm of all of them together is at most this.
        norm_type (float): the order of the norm of ``max_norm``; only 2.
        error_if_nonfinite (bool): with ``max_norm``, raise where the norm is NaN or infinite, with nothing changed.
        clip_gradients_in_place (bool): with ``max_norm``, write the scaled gradients to ``p.grad``.
        process_group (ProcessGroup or DeviceMesh): with ``max_norm``, the processes over whose gradients the norm is
            taken, if each has parameters of its own.
        master_weights (bool): keep fp32 masters of bf16 and fp16 parameters.
        stochastic_rounding (bool): round 16-bit parameters without masters, and 16-bit states, up or down at random.
        state_dtype (torch.dtype or "int8"): how moments are stored: torch.float32, torch.bfloat16 or "int8"; None: as
            torch does.
        ema_decay (float): keep a running average of the weights, which keeps this share of itself at each step.
        ema_warmup (bool): with ``ema_decay``, let the average forget the first weights sooner.

    Raises:
        TypeError: an unknown keyword argument.
        ValueError: an argument is out of range, or contradicts another.

    Source: `Adam: A Method for Stochastic Optimization <https://arxiv.org/abs/1412.6980>`_.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        **options: Unpack[Options],
    ) -> None:
        self._accept(options)
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=decoupled_weight_decay,
        )


class AdamW(_AdamFamily, torch.optim.AdamW):
    """:class:`torch.optim.AdamW`, with the same arguments, state and results, in one pass over memory.

    The arguments from ``max_norm`` on are dlkit's own; :class:`dlkit.optim._optimizer.OnePass` says in full what each
    does. Those from ``master_weights`` on may differ between param groups.

    Args:
        params: parameters, (name, parameter) pairs or param groups, as torch's optimizers take them; see
            :func:`dlkit.optim.param_groups`.
        lr: the learning rate, a number or a tensor of one element.
        betas: how much of themselves the running averages of the gradient and of its square keep at each step.
        eps: added to the denominator.
        weight_decay: each step takes lr * weight_decay of the parameter from it.
        amsgrad: divide by the largest second moment so far.
        maximize: step up the gradient instead of down.
        foreach: as in torch where torch's own step runs; dlkit's kernels ignore it.
        capturable: keep step counters on the device, so that a CUDA graph can capture the step.
        differentiable: record the step for autograd; torch's own step runs then.
        fused: as in torch for a GradScaler, whose scaling the step then does itself; step counters are on the device.

    Keyword Args:
        max_norm (float): clip: scale gradients so that the 2-norm of all of them together is at most this.
        norm_type (float): the order of the norm of ``max_norm``; only 2.
        error_if_nonfinite (bool): with ``max_norm``, raise where the norm is NaN or infinite, with nothing changed.
        clip_gradients_in_place (bool): with ``max_norm``, write the scaled gradients to ``p.grad``.
        process_group (ProcessGroup or DeviceMesh): with ``max_norm``, the processes over whose gradients the norm is
            taken, if each has parameters of its own.
        master_weights (bool): keep fp32 masters of bf16 and fp16 parameters.
        stochastic_rounding (bool): round 16-bit parameters without masters, and 16-bit states, up or down at random.
        state_dtype (torch.dtype or "int8"): how moments are stored: torch.float32, torch.bfloat16 or "int8"; None: as
            torch does.
        ema_decay (float): keep a running average of the weights, which keeps this share of itself at each step.
        ema_warmup (bool): with ``ema_decay``, let the average forget the first weights sooner.

    Raises:
        TypeError: an unknown keyword argument.
        ValueError: an argument is out of range, or contradicts another.

    Source: `Decoupled Weight Decay Regularization <https://arxiv.org/abs/1711.05101>`_.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[Options],
    ) -> None:
        self._accept(options)
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )
